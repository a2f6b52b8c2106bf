/*
 * The native module's interface, as cffi reads it and as the C files include it.
 *
 * C here is what must run without the interpreter lock or once a page: system calls, atomics, loops over a batch.
 * Decisions are Python's.  Functions return 0 or a count, or -errno.
 */

/* ---- the shared table (LSPT): one memfd, mapped by every dmh process ---- */

struct dmh_ctx;
struct dmh_plan;
struct dmh_redis;
struct dmh_streams;

#define DMH_MAX_WORKERS 72
#define DMH_MAX_COUNTERS 64
#define DMH_BUCKETS 64
#define DMH_MAX_RUN 1024
#define DMH_MAX_VIEWS 256

struct dmh_shared {
    uint64_t magic, version;
    uint64_t page_size, page_shift, pages, slots, workers, ring_entries;
    uint64_t resident_max;      /* pages; memory.limit less the victim buffer: the hard bound */
    uint64_t high, low;         /* pages; LPET's thresholds, over local pages */
    uint64_t words_at, sums_at, copies_at, pins_at, advice_at, calm_at, slots_at, rings_at, journal_at, lanes_at, posts_at, bytes; /* offsets from here */
    uint64_t resident;          /* pages that occupy, or are promised, memory of the region; <= resident_max */
    uint64_t staged;            /* slots in use; <= slots */
    uint64_t rung_at;           /* local pages that the fault which rang had found; 0: nobody has since LPET last ran */
    uint64_t rung_ns;           /* when that was */
    uint64_t clock;             /* orders the arrivals of pages */
    uint64_t pinned;            /* pages with a pin */
    uint32_t bell;              /* futex: rung to wake LPET */
    uint32_t room;              /* futex: changes when LPET has made room */
    uint32_t frozen;            /* futex: 1 + the worker that repairs the table, which nobody else changes meanwhile; 0: nobody does */
    uint32_t park;              /* tests: 1 + the step at which a worker is to stop, for good; see lspt/steps.py */
    uint32_t left_to_evictor;   /* a fault on a page that was being evicted was dropped: whoever publishes that page wakes it */
    uint32_t parked;            /* futex: 1 + the worker that has stopped there */
    uint32_t stop;              /* set once: nobody waits any more */
    uint32_t events_lost;       /* a ring was full: LPET must look at the table */
    uint32_t evicting_on;       /* 1 + the processor that LPET is at work on; 0: it waits for the bell */
    uint32_t unused;
    uint32_t heal_due;          /* a page is POISONED only because the DMS did not answer, or one was: the evictor looks */
    uint32_t quiet;             /* number of the period that lasts in which no program can write to the region; 0: one can.  See dmh_drop.c */
    uint32_t quiets;            /* how many such periods there were: numbers are not used again */
    uint32_t pids[72];          /* per worker: its process; 0: there is none now */
    uint64_t store_away[72];    /* per worker: since when the store fails it, CLOCK_MONOTONIC; 0: it does not */
    uint64_t dispatched[72];    /* per resolver: messages sent to it */
    uint64_t completed[72];     /* per resolver: messages it is done with */
};

/* What one worker is in the middle of; a cache line each. */
struct dmh_post {
    uint32_t busy;              /* between two steps that must be seen together: a page's word, its slot, the count of room */
    uint32_t waits;             /* for room */
    uint32_t unused[14];
};

struct dmh_counters {
    uint64_t cell[64];
    uint64_t fault_ns[64];      /* log2 buckets of nanoseconds from receipt of a fault to its page's installation */
};

/* A resolver's lane: how the monitor hands it a request while it is awake.  A sleeping resolver is woken over ZeroMQ. */
struct dmh_request {
    uint64_t page;
    int64_t stride;
    uint32_t window, view, thread, demand;
    uint64_t ns;
    int32_t resolver;           /* what dmh_hand_over said of it; within the monitor only */
    uint32_t given;             /* to which resolver */
};
struct dmh_lane {
    uint32_t awake;             /* it will look at the lane again, if need be after the bell */
    uint32_t asleep;            /* it waits for the bell; otherwise it looks at head before it waits */
    uint32_t bell;              /* futex: rung after head has moved */
    uint32_t unused;
    uint64_t head, tail;        /* head: written by the monitor; tail: by the resolver; head - tail <= 64 */
    struct dmh_request entry[64];
};

/* What the evictor is in the middle of, so that whoever comes after it can finish it. */
struct dmh_journal {
    uint64_t count;             /* pages between splice and STAGED; 0: none */
    uint64_t read, end;         /* of their bytes: so many are in their slots for sure; so many were in the pipe before any beyond `read` was punched */
    uint64_t page[1024];
    uint32_t slot[1024];
};

int      dmh_shared_create(uint64_t pages, uint64_t page_size, uint64_t slots, uint64_t workers);
struct dmh_shared *dmh_shared_map(int fd);
void     dmh_shared_unmap(struct dmh_shared *s);
uint64_t *dmh_words(struct dmh_shared *s);
uint64_t *dmh_sums(struct dmh_shared *s);
uint8_t  *dmh_copies(struct dmh_shared *s);
uint8_t  *dmh_pins(struct dmh_shared *s);
uint8_t  *dmh_advice(struct dmh_shared *s);
uint32_t *dmh_calm(struct dmh_shared *s);
struct dmh_counters *dmh_counters_of(struct dmh_shared *s, uint32_t worker);
struct dmh_journal *dmh_journal_of(struct dmh_shared *s);
void     dmh_count(struct dmh_shared *s, uint32_t worker, uint32_t counter, uint64_t n);

int      dmh_move(struct dmh_shared *s, uint64_t page, uint64_t expected, uint32_t state, uint32_t worker, int32_t slot);
int64_t  dmh_count_states(struct dmh_shared *s, uint64_t *out_by_state);
uint64_t dmh_pages_in_state(struct dmh_shared *s, uint32_t state, uint64_t first, uint64_t end, uint64_t *out, uint64_t max);

/* ---- what becomes of a dead worker's pages ---- */

void     dmh_worker_gone(struct dmh_shared *s, uint32_t worker);
int64_t  dmh_recover(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t *partial, uint64_t max);
int      dmh_install_rest(struct dmh_ctx *c, uint64_t page, const uint8_t *content);
void     dmh_wake_all(struct dmh_ctx *c);
void     dmh_step(struct dmh_ctx *c, uint32_t step);

uint64_t dmh_reserve(struct dmh_shared *s, uint64_t wanted);
void     dmh_release(struct dmh_shared *s, uint64_t n);
int      dmh_wait_room(struct dmh_ctx *c, int ahead, int timeout_ms);
int      dmh_room_wanted(struct dmh_shared *s);
void     dmh_want_room(struct dmh_ctx *c, int wanted);
void     dmh_ring_bell(struct dmh_shared *s);
int      dmh_wait_bell(struct dmh_shared *s, uint32_t seen, int timeout_ms);
void     dmh_stop(struct dmh_shared *s);
void     dmh_hold_slots(struct dmh_ctx *c, const uint32_t *slots, uint64_t n, int on);
int64_t  dmh_take_slots(struct dmh_ctx *c, uint32_t *out, uint64_t n, uint64_t from);
void     dmh_return_slots(struct dmh_ctx *c, const uint32_t *slots, const uint8_t *outcome, uint64_t n);

/* order: of installation; ns: when the fault was received. */
struct dmh_event { uint64_t order; uint64_t page; uint64_t ns; uint32_t kind; uint32_t thread; };
/* Kinds of events: those of policies (dmh/evict/policies/base.py) and of recordings (dmh/observe/trace.py). */
#define DMH_EV_FAULT 0          /* a page came in because it was touched */
#define DMH_EV_SOFT 1           /* a page came back from the victim buffer because it was touched */
#define DMH_EV_PREFETCH 2       /* a page came in ahead of use */
/* Told to policies by the evictor; never in a ring. */
#define DMH_EV_GONE 3           /* a page is not local any more, or not the policy's to choose: discarded, pinned */
#define DMH_EV_KEPT 4           /* a page is local although it was chosen, or nobody knows why; no use is known */
#define DMH_EV_USED 5           /* the answer to `look`: used since it was marked */
#define DMH_EV_IDLE 6           /* the answer to `look`: not used */
/* In a ring only: policies are told FAULT. */
#define DMH_EV_NEW 7            /* a new page was touched */
#define DMH_EV_EXPECTED 9       /* a scan is about to come to a page that is local; policies take it for used */
int64_t  dmh_drain(struct dmh_shared *s, struct dmh_event *out, uint64_t max);

/* ---- userfaultfd and mappings ---- */

#define DMH_UFFD_DEVICE 1       /* /dev/userfaultfd: kernel faults allowed */
#define DMH_UFFD_SYSCALL 2      /* the system call: kernel faults allowed */
#define DMH_UFFD_USER_ONLY 3    /* faults from user mode only */
int      dmh_uffd_open(int *how, uint64_t *features);
int      dmh_uffd_open_following(int *how, uint64_t *features);
int      dmh_uffd_register(int uffd, void *base, uint64_t bytes);
int      dmh_uffd_wake(int uffd, uint64_t base, uint64_t bytes);
int      dmh_uffd_exact(uint64_t features);
void    *dmh_map_region(int memfd, uint64_t bytes, uint64_t align, int writable);
int      dmh_unmap(void *base, uint64_t bytes);
int      dmh_seal_mapping(void *base, uint64_t bytes);
int      dmh_guard_mapping(void *base, uint64_t bytes);
int      dmh_region_create(const char *name, uint64_t bytes);
int      dmh_probe_uffd(int kind, uint64_t wanted, uint64_t *features);
int      dmh_probe_mseal(void);
int      dmh_touch(void *base, uint64_t bytes, uint64_t step);

/* A process's table of the mappings that can fault: applications' and its own. */
struct dmh_ctx *dmh_ctx_new(struct dmh_shared *s, int region_fd, void *slots_base, uint32_t worker);
int      dmh_ctx_watch(struct dmh_ctx *c, int follow, int keep, struct dmh_streams *streams);
int      dmh_view_add(struct dmh_ctx *c, uint32_t id, int uffd, uint64_t base, int pid, int own);
int      dmh_view_remove(struct dmh_ctx *c, uint32_t id);
void     dmh_interrupt(struct dmh_ctx *c);
void     dmh_wake_pages(struct dmh_ctx *c, uint64_t page, uint64_t n);

/* ---- following forks ---- */

struct dmh_birth {
    uint32_t view;
    int32_t uffd;               /* a child of the view's process; -1: not a birth, but the touch of one's birth page */
    int32_t pid;                /* by which the view's process is known */
    uint64_t base;
};
int      dmh_birth_page(void *base, uint64_t bytes);
int      dmh_follow_forks(void *base, uint64_t bytes);
int      dmh_be_born(void *base, uint64_t bytes);
int      dmh_birth_answer(int uffd, uint64_t base, uint64_t bytes, int refuse);
int      dmh_view_is_gone(int uffd, uint64_t base);
void     dmh_view_process(struct dmh_ctx *c, uint32_t id, int pid);
int      dmh_next_birth(struct dmh_ctx *c, struct dmh_birth *out);

/* ---- read-ahead: which pages a thread will want next ---- */

struct dmh_window { int64_t first, stride; uint32_t count; };
struct dmh_streams *dmh_streams_new(uint32_t limit, uint32_t ahead);
void     dmh_streams_free(struct dmh_streams *s);
/*
 * What read-ahead looks at: the table's words, by which local pages are told, how far each resolver is, and what the program has said of each page.
 * NULL: nothing is local; nobody is behind; nothing was said.
 */
struct dmh_outlook { const uint64_t *words; uint64_t pages; const uint64_t *completed; const uint8_t *advice; };
int      dmh_streams_observe(struct dmh_streams *s, uint32_t thread, uint64_t fault, const struct dmh_outlook *o, struct dmh_window *out);
void     dmh_streams_given(struct dmh_streams *s, uint32_t resolver, uint64_t ticket);
uint64_t dmh_streams_used(const struct dmh_streams *s);
uint64_t dmh_streams_wasted(const struct dmh_streams *s);

/* ---- monitor: receive ---- */

int      dmh_schedule(int batch, uint32_t slice_us);
struct dmh_lane *dmh_lane_of(struct dmh_shared *s, uint32_t worker);
int      dmh_hand_over(struct dmh_ctx *c, struct dmh_request *r);
int      dmh_next_request(struct dmh_ctx *c, struct dmh_request *out, int doze_ms);

int      dmh_receive(struct dmh_ctx *c, struct dmh_request *out, int max, int timeout_ms, int spin_us);
void     dmh_forget_dispatched(struct dmh_ctx *c);
void     dmh_ctx_inline(struct dmh_ctx *c, int store_fd, const uint64_t *store_index);
void     dmh_ctx_remote(struct dmh_ctx *c, struct dmh_redis *remote);
int      dmh_resolve_inline(struct dmh_ctx *c, const struct dmh_request *r);

/* ---- resolver: claim, install ---- */

/* One demand page and the window after it: claimed pages in the order of their numbers. */
struct dmh_plan {
    uint32_t n;                 /* pages claimed; page[0] is the demand page if demand is 1 */
    uint32_t demand;
    uint32_t view, thread;
    uint64_t ns;                /* when the fault was received */
    uint32_t stored_n;          /* of them, pages to fetch */
    uint32_t room_wanted;       /* no room was found: for the demand page, or for any of the window */
    uint32_t looked;            /* steps of the window that were claimed or need nothing; the rest found no room */
    uint32_t expected_n;        /* of them, pages that are local already */
    uint64_t page[1024];
    uint64_t word[1024];        /* the claim: the word as this worker left it */
    uint8_t  kind[1024];        /* DMH_NEW, DMH_STORED, DMH_STAGED, DMH_POISONED: what it was */
    uint64_t stored[1024];      /* page numbers to fetch */
    uint8_t  found[1024];       /* filled in by the store: 1 row i of the buffer holds stored[i], 0 it has no such page, 2 it is damaged, 3 no answer */
    uint64_t expected[1024];
    uint64_t lost[8];           /* out: pages that raise SIGBUS from now on */
    uint8_t  lost_why[8];       /* DMH_LOST_... */
    uint32_t lost_n;
};
#define DMH_CHUNK 262144        /* bytes installed in one call: the faulting thread goes on while the rest of its window is installed */
#define DMH_AHEAD_WAITS 10      /* times a window waits for room, DMH_AHEAD_MS each, before the rest of it is given up */
#define DMH_AHEAD_MS 10
#define DMH_LOST_MISSING 1
#define DMH_LOST_ALTERED 2
#define DMH_LOST_AWAY 3         /* not lost: the store does not answer; also as found[] of every row */
int      dmh_claim(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, int demand, int64_t stride, uint32_t window);
int      dmh_install(struct dmh_ctx *c, struct dmh_plan *p, const uint8_t *buffer, uint32_t chunk);
void     dmh_give_back(struct dmh_ctx *c, struct dmh_plan *p, uint32_t keep);

/* ---- pages that raise SIGBUS ---- */

uint64_t dmh_withheld(struct dmh_ctx *c, uint64_t *out, uint64_t max);
int      dmh_heal(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, uint8_t found, const uint8_t *content);

/* ---- evictor: capture ---- */

#define DMH_OUT_SKIPPED 0       /* not resident (any more), pinned, or taken back */
#define DMH_OUT_DIRTY 1         /* STAGED, to be written */
#define DMH_OUT_CLEAN 2         /* the DMS has these bytes: STORED */
#define DMH_OUT_ZERO 3          /* all zeros: NEW */
#define DMH_OUT_LOST 4          /* POISONED: its memory was taken away behind dmh's back */
int      dmh_pipe(int *fds, uint64_t wanted);
int      dmh_pipe_bytes(int fd);
int      dmh_probe_capture(uint64_t page_size);
void     dmh_capture(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t pipe_bytes, const uint64_t *pages, uint64_t n,
                     const uint32_t *slots, uint8_t *outcome);
struct dmh_leaving {
    uint64_t n;                 /* in: pages in page[] */
    uint64_t rotor;             /* where to look for slots; kept from call to call */
    uint64_t left;              /* out: how many at the end of page[] found no slot */
    uint32_t stayed_n, lost_n;
    uint64_t page[1024];        /* out, the first ones: STAGED, to be written */
    uint64_t sum[1024];         /* their hashes, */
    uint32_t slot[1024];        /* their slots */
    uint64_t stayed[1024];      /* out: not RESIDENT, or pinned */
    uint64_t lost[1024];        /* out: POISONED */
};
int      dmh_leave(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t pipe_bytes, struct dmh_leaving *l);
int      dmh_drop_clean(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *outcome);
int      dmh_settle(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, const uint32_t *slots, uint8_t *outcome,
                    uint64_t *sums, int keep);
int      dmh_acknowledge(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, const uint32_t *slots, const uint64_t *sums,
                         int keep);
int      dmh_take_back(struct dmh_ctx *c, const uint64_t *pages, uint64_t n);
int      dmh_discard(struct dmh_ctx *c, uint64_t first, uint64_t n, uint64_t *busy);

/* ---- eviction policies: decisions only; dmh/evict/policies/ has the algorithms ---- */

struct dmh_policy;
uint32_t dmh_ahead_cap(uint64_t limit);
struct dmh_policy *dmh_policy_new(const char *name, uint64_t pages, uint64_t limit, int accessed, uint64_t seed,
                                  const double *tuning, uint64_t n_tuning);
void     dmh_policy_free(struct dmh_policy *p);
void     dmh_policy_learn(struct dmh_policy *p, const uint64_t *pages, const uint8_t *kinds, uint64_t n);
uint64_t dmh_policy_look(struct dmh_policy *p, uint64_t *out, uint64_t most);
void     dmh_policy_choose(struct dmh_policy *p, uint64_t evict_most, uint64_t mark_most, uint64_t *evict, uint64_t *evict_n,
                           uint64_t *mark, uint64_t *mark_n);
void     dmh_policy_lists(struct dmh_policy *p, const uint64_t *pages, uint64_t n, uint8_t *out);
uint64_t dmh_policy_count(struct dmh_policy *p);
uint64_t dmh_policy_bytes(struct dmh_policy *p);
const char *dmh_policy_validate(struct dmh_policy *p);

/* A simulated run: settings and figures. */
struct dmh_replay {
    uint64_t high, low;         /* a fault that finds `high` local pages has LPET evict down to `low` first */
    uint64_t slots;             /* pages that may be staged, of those that are local */
    uint64_t every;             /* the policy is told of every use */
    uint64_t local, staged;     /* now */
    uint64_t hard, soft, evicted, marks, looks;
};
int      dmh_replay_trace(struct dmh_policy *p, const uint64_t *trace, uint64_t n, uint8_t *state, struct dmh_replay *r);
int64_t  dmh_replay_optimal(const uint64_t *trace, uint64_t n, uint64_t pages, uint64_t limit);

/* A simulated program on a table, of which it is worker 0. */
struct dmh_program {
    uint64_t at;                /* uses made */
    uint64_t now;               /* ns, of the simulated clock */
    uint64_t use_ns, remap_ns, soft_ns, hard_ns; /* what takes how long: a use, of an unmapped page in addition, a fault */
    uint64_t hard, soft;
};
int      dmh_replay_program(struct dmh_shared *s, struct dmh_program *r, const uint64_t *trace, uint64_t n, uint8_t *mapped, uint64_t until,
                            int while_unrung);

/* ---- evictor: was a page used since it was marked? ---- */

void     dmh_ctx_look(struct dmh_ctx *c);
int      dmh_view_pids(struct dmh_ctx *c, int *out, int max);
int      dmh_mark_unmap(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *marked);
int      dmh_look_unmap(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *used);
int      dmh_mark_page_idle(struct dmh_ctx *c, int bitmap_fd, const uint64_t *pages, uint64_t n, uint8_t *marked);
int      dmh_look_page_idle(struct dmh_ctx *c, int bitmap_fd, const uint64_t *pages, uint64_t n, uint8_t *used);
int      dmh_probe_frames(void);
int      dmh_probe_unmap(void);

/* ---- page contents ---- */

uint64_t dmh_hash(const uint8_t *p, uint64_t n);
void     dmh_hash_pages(const uint8_t *p, uint64_t n, uint64_t page_size, uint64_t *out);
int      dmh_is_zero(const uint8_t *p, uint64_t n);
int      dmh_fetch_pages(int fd, const uint64_t *index, const uint64_t *pages, uint64_t n, uint64_t page_size, uint8_t *out,
                         uint8_t *found, int nowait);
int      dmh_write_pages(int fd, const uint64_t *pages, uint64_t n, uint64_t page_size, const uint8_t *data);
int      dmh_punch_file(int fd, uint64_t offset, uint64_t bytes);

/* ---- pages out of a Redis server, over a connection that its client library has made ---- */

struct dmh_redis {
    int32_t fd;                 /* the connection, a plain socket; -1: there is none that could be used */
    uint32_t broken;            /* the connection has to be made again: native code has met an error that nobody was told of */
    uint32_t silence_ms;        /* the longest wait for more bytes */
    uint64_t connect_ms, slowest, most_ms; /* a request's limit: so long and its bytes at so many a ms, but not longer than that */
    uint32_t keys, ahead;       /* of one command; commands sent ahead of the reply that is waited for */
    uint64_t page_size;
    uint32_t at, have;          /* buffer[at] to buffer[have - 1] have been received and not been looked at */
    uint8_t *buffer;
    uint8_t *record, *command;  /* one key as a command has it, and a whole command */
    uint32_t number_at, record_bytes; /* where in the record the page's number stands */
    uint32_t flowing;           /* bytes have come since the last wait: look for more before waiting again */
};
struct dmh_redis *dmh_redis_new(const uint8_t *prefix, uint32_t prefix_bytes, uint64_t page_size, uint32_t keys, uint32_t ahead);
void     dmh_redis_free(struct dmh_redis *r);
int      dmh_redis_get(struct dmh_redis *r, const uint64_t *pages, uint64_t n, uint8_t *out, uint8_t *found, uint64_t *length);

/* ---- the application's guardian thread ---- */

#define DMH_SERVED 0            /* connected */
#define DMH_WAITING 1           /* the launcher is gone, workers live: one may take over */
#define DMH_DESERTED 2          /* nobody is left, or the service does not know this program: its end is near */
int      dmh_guardian_start(int socket_fd, const char *directory, const char *name, int grace_ms, int launcher_grace_ms);
int      dmh_guardian_resume(int handle, const char *message);
int      dmh_guardian_state(int handle);
int      dmh_guardian_rejoined(int handle, uint32_t *seen);
void     dmh_guardian_stop(int handle);
void     dmh_guardians_forget(void);
int      dmh_die_with_parent(void);

/* ---- measurements ---- */

void     dmh_time_touch(uint8_t *base, const uint64_t *offsets, uint64_t n, int write, uint64_t *out_ns);
uint64_t dmh_sum_words(const uint8_t *base, uint64_t bytes);
uint64_t dmh_increment_words(uint8_t *base, uint64_t bytes);
uint64_t dmh_triad_words(uint8_t *a, const uint8_t *b, const uint8_t *c, uint64_t d, uint64_t bytes);
uint64_t dmh_access_words(uint8_t *base, const uint64_t *numbers, uint64_t n, int write);
int64_t  dmh_access_by_threads(uint8_t *base, const uint64_t *numbers, uint64_t n, uint32_t threads, uint64_t *sum);
int      dmh_floor_handler(int uffd, uint64_t page_size, int stop_fd, int spin);
int      dmh_pager_watch(void *base, uint64_t bytes);
int      dmh_floor_pager(int uffd, int memory, int file, uint64_t base, uint64_t pages, uint64_t page_size, uint64_t limit,
                         int control);

/* ---- the workload of `dmh stress` ---- */

/* What one thread has of the pages: words lane, lane + lanes, ... of each. */
struct dmh_stress {
    uint8_t *base;
    uint16_t *versions;         /* the shadow, one for each word of the lane, a row a page: how often it was written */
    uint64_t first, pages;      /* number of the first page within the region; how many */
    uint64_t page_size, seed, random;
    uint32_t lanes, lane;
    int32_t scratch_fd;         /* a file for system calls to move words through; -1: none */
    uint32_t wrong;             /* out: 1 where a word was not what it had to be; the rest says which */
    uint64_t wrong_page, wrong_word, wrong_version, expected, got, again;
    uint64_t older;             /* out: what was read is so many versions old; 0: it is none of them */
    uint64_t done, page;        /* for the watchdog: operations, and the page that is being touched */
    uint64_t longest_ns;        /* out: the longest that one operation took */
};
int      dmh_stress_run(struct dmh_stress *s, uint64_t operations);
int      dmh_stress_verify(struct dmh_stress *s, uint64_t from, uint64_t n);
