/* What the C files share: the interface, atomics, the table of views.  Not seen by cffi. */
#ifndef DMH_INTERNAL_H
#define DMH_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "generated.h" /* by build.py: states, transitions, counters */

#define DMH_KERNEL_PAGE 4096u
#define DMH_MAGIC 0x3130545053484d44ull /* "DMHSPT01" */

#define LOAD(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define ADD(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
#define SUB(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_ACQ_REL)
#define CAS(p, expected, v) \
    __atomic_compare_exchange_n((p), (expected), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)

static inline uint32_t word_state(uint64_t w) { return w & ((1u << DMH_STATE_BITS) - 1); }
static inline uint32_t word_worker(uint64_t w) { return (w >> DMH_WORKER_SHIFT) & ((1u << DMH_WORKER_BITS) - 1); }
/* -1 where the word names no slot */
static inline int32_t word_slot(uint64_t w) { return (int32_t)((w >> DMH_SLOT_SHIFT) & ((1u << DMH_SLOT_BITS) - 1)) - 1; }
/* of a FETCHING page: its content has to come from the DMS; of a POISONED one: the DMS was away, and may have it; of an EVICTING one: it is dropped */
static inline int word_from_store(uint64_t w) { return (w >> DMH_FROM_STORE_SHIFT) & 1; }
/* of a FETCHING or EVICTING page: programs' mappings carry the mark that raises SIGBUS, or some of them do */
static inline int word_marked(uint64_t w) { return (w >> DMH_MARKED_SHIFT) & 1; }
static inline uint32_t word_generation(uint64_t w) { return (uint32_t)(w >> DMH_GENERATION_SHIFT); }

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* A mapping that can fault: an application's, or this process's own view of the region. */
struct view {
    uint32_t id;
    int uffd;
    int pid;
    int own;
    uint64_t base;
    int pidfd, pagemap_fd;      /* where the context looks into processes (dmh_idle.c); else -1 */
};

struct dmh_ctx {
    struct dmh_shared *s;
    uint64_t *words, *sums;
    uint8_t *copies, *pins, *advice;
    uint32_t *calm;             /* per page: in which quiet period it came in (dmh_drop.c) */
    struct dmh_counters *counters;
    int region_fd;
    uint8_t *slots_base, *own_base;
    uint32_t worker;
    int holds_wakes;            /* fill() wakes nobody: dmh_install does, for several pages at once */
    uint32_t depth;             /* of enter(); only the thread that works on pages uses it */
    pthread_rwlock_t lock;      /* views[] and their descriptors: read-held over every use of one */
    uint32_t nviews;
    struct view views[DMH_MAX_VIEWS];
    uint8_t *held;              /* evictor, per slot: being written; NULL: none ever was */
    int look;                   /* evictor: views carry a pidfd and their process's pagemap */
    /* monitor only */
    int epoll_fd, event_fd;
    uint32_t *seen;             /* per page: generation of the word that was last dispatched, plus one */
    uint32_t forget;            /* told by dmh_forget_dispatched */
    int inline_on, store_fd;    /* resolve here what cannot block; store_fd -1: stored pages are not to be had here */
    const uint64_t *store_index;
    uint8_t *page_buffer;
    struct dmh_plan *plan;
    struct dmh_redis *remote;   /* resolvers: over which stored pages are to be had without Python; NULL: over none */
    uint8_t *window_buffer;     /* as large as the largest window that was read ahead here */
    uint64_t window_bytes;
    uint64_t apart_ns;          /* not before that is it to leave LPET's processor again */
    struct dmh_streams *streams; /* the caller's */
    uint64_t last_ns;           /* when the last message came: for spinning */
    int follow, followed_cpu;   /* dmh_follow.c.  -1: nobody in particular, run anywhere */
    uint32_t followed_thread, other_threads;
    uint64_t look_at_ns;        /* when to look again where the thread runs */
    uint64_t moved_ns, not_following_until_ns;
    uint32_t chases;            /* moves in a row, each soon after the last */
    int may_keep, keeper_started; /* the other of two processors may be kept from being idle; there is a thread for it, the keeper */
    int keeper, keeper_cpu;     /* its id; where it spins, -1: nowhere */
    uint32_t keeping;           /* it sleeps on this while it is 0 */
    uint64_t keep_until_ns, keep_not_before_ns;
    uint32_t late;              /* faults in a row that came so late that it may run elsewhere */
    int stat_fd;                /* /proc/.../stat of stat_thread; -1: none */
    uint32_t stat_thread;
    uint64_t gap_ns;            /* the usual time from one message to the next, smoothed */
    uint64_t quiet_until_ns;    /* no spinning before: somebody else needed the processor */
    struct dmh_birth *births;   /* read and not yet told to the launcher */
    uint32_t births_n, births_room;
};

void dmh_die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/*
 * A slot of the victim buffer: free, set aside by the evictor for a page that is still RESIDENT, or named by a page's word.  A slot that is
 * NAMED although no word names it was left by a worker that died between the two.
 */
enum { SLOT_FREE, SLOT_ASIDE, SLOT_NAMED };
static inline uint32_t *slot_flags(struct dmh_shared *s) { return (uint32_t *)((uint8_t *)s + s->slots_at); }
static inline struct dmh_post *post_of(struct dmh_shared *s, uint32_t worker) { return (struct dmh_post *)((uint8_t *)s + s->posts_at) + worker; }

/* The word that follows w: its new state, and a generation nobody has seen. */
static inline uint64_t next_word(uint64_t page, uint64_t w, uint32_t state, uint32_t worker, int32_t slot)
{
    if (!(dmh_legal[word_state(w)] & (1u << state)))
        dmh_die("page %llu cannot go from %s to %s: this is a defect in dmh", (unsigned long long)page,
                dmh_state_name[word_state(w)], dmh_state_name[state]);
    uint64_t marked = state == DMH_FETCHING && word_state(w) == DMH_POISONED;
    uint64_t from_store = state == DMH_FETCHING && (word_state(w) == DMH_STORED || (marked && word_from_store(w)));
    return (uint64_t)state | from_store << DMH_FROM_STORE_SHIFT | marked << DMH_MARKED_SHIFT | (uint64_t)worker << DMH_WORKER_SHIFT |
           (uint64_t)(uint32_t)(slot + 1) << DMH_SLOT_SHIFT | (uint64_t)(word_generation(w) + 1) << DMH_GENERATION_SHIFT;
}

/* Compare-and-swap one page's word; on success *w is the new word, on failure the one found. */
static inline int move_word(struct dmh_ctx *c, uint64_t page, uint64_t *w, uint32_t state, uint32_t worker, int32_t slot)
{
    uint64_t n = next_word(page, *w, state, worker, slot);
    if (!CAS(&c->words[page], w, n))
        return 0;
    *w = n;
    return 1;
}

/* Counters have one writer each: this worker.  Its threads may race and lose a count, never more. */
static inline void count(struct dmh_ctx *c, uint32_t counter, uint64_t n)
{
    __atomic_store_n(&c->counters->cell[counter],
                     __atomic_load_n(&c->counters->cell[counter], __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

/*
 * Between enter and leave a worker changes what must be seen together: words, slots, the count of room.  Short, never waiting for anybody, so that
 * who repairs the table after a death can wait until all others are outside, and then count.  They nest.
 */
void wait_until_thawed(struct dmh_ctx *c);
static inline void enter(struct dmh_ctx *c)
{
    if (c->depth++)
        return;
    for (;;) {
        /* Both orders must be visible: we are busy, then is it frozen; it freezes, then is anybody busy. */
        __atomic_store_n(&post_of(c->s, c->worker)->busy, 1u, __ATOMIC_SEQ_CST);
        uint32_t frozen = __atomic_load_n(&c->s->frozen, __ATOMIC_SEQ_CST);
        if (!frozen || frozen == c->worker + 1)
            return;
        STORE(&post_of(c->s, c->worker)->busy, 0u);
        wait_until_thawed(c);
    }
}
static inline void leave(struct dmh_ctx *c)
{
    if (!--c->depth)
        STORE(&post_of(c->s, c->worker)->busy, 0u);
}

/* How many of pages[i..] are neighbours, at most `most`. */
static inline uint64_t run_of(const uint64_t *pages, uint64_t n, uint64_t i, uint64_t most)
{
    uint64_t k = 1;
    while (i + k < n && k < most && pages[i + k] == pages[i] + k)
        k++;
    return k;
}

/*
 * A fault on a page that is EVICTING by its word w is the evictor's to wake.  It publishes and then looks at left_to_evictor; we set that and then look
 * at the word again: one of us sees the other.  0: the page is EVICTING no more, and nobody may wake it.
 */
static inline int leave_to_evictor(struct dmh_ctx *c, uint64_t page, uint64_t w)
{
    __atomic_store_n(&c->s->left_to_evictor, 1u, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&c->words[page], __ATOMIC_SEQ_CST) == w;
}

/* A step that tests may stop a worker at. */
#define AT(c, step) \
    do { \
        if (__builtin_expect(__atomic_load_n(&(c)->s->park, __ATOMIC_RELAXED) == (step) + 1u, 0)) \
            dmh_step((c), (step)); \
    } while (0)

/* A thread of our own in a process whose signals are for the threads that run Python, or the program.  0, or -errno. */
static inline int start_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = -pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r;
}

long futex(uint32_t *word, int op, uint32_t value, const struct timespec *timeout);
void dmh_free_slot(struct dmh_ctx *c, uint32_t slot);
void drain(int pipe_out);
void read_out(struct dmh_ctx *c, int pipe_out, const struct dmh_journal *j, uint64_t at, uint64_t bytes);
void move_out(struct dmh_ctx *c, int pipe_out, int pipe_in, struct dmh_journal *j, uint64_t bytes);
int uffd_open_as(int kind); /* DMH_UFFD_...; a descriptor, or -errno */
void note_birth(struct dmh_ctx *c, struct dmh_birth birth);
uint64_t reserve_but(struct dmh_shared *s, uint64_t wanted, uint64_t keep);
uint64_t kept_from_windows(const struct dmh_shared *s);
void leave_lpet_alone(struct dmh_ctx *c, uint64_t now);
void dmh_follow(struct dmh_ctx *c, struct view *v, uint32_t thread, uint64_t now);
int hand_to(struct dmh_ctx *c, struct dmh_request *r, uint32_t n);
void report_lost(const struct dmh_plan *p);
int bring_ahead(struct dmh_ctx *c, struct dmh_request *r);
int bring_stored(struct dmh_ctx *c, const struct dmh_request *r);
int claim_word(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, uint64_t word);
void ring_at_high(struct dmh_ctx *c, uint64_t page, uint64_t granted);
void note_arrivals(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint32_t first_kind, uint32_t kind, const struct dmh_plan *p);
void note_latency(struct dmh_ctx *c, uint64_t since_ns);

/* Debian 12's headers are older than the kernels it runs on. */
struct poison_request { struct { uint64_t start, len; } range; uint64_t mode; int64_t updated; };
#define IOC_POISON _IOWR(0xAA, 0x08, struct poison_request)

/* What an ioctl's errno means; nobody else interprets it. */
enum verdict { V_DONE, V_RETRY, V_EXISTS, V_GONE, V_NOMEM, V_BAD };
enum verdict uffd_verdict(int error);
enum verdict fill(struct dmh_ctx *c, struct view *v, uint64_t offset, uint64_t bytes, const uint8_t *from, int resume);
int poison(struct dmh_ctx *c, uint64_t page, uint64_t word, int away);
void unmark(struct dmh_ctx *c, uint64_t page);
int discard_poisoned(struct dmh_ctx *c, uint64_t page, uint64_t word);
void settle_marked(struct dmh_ctx *c, uint64_t page, uint64_t word);
int punch(struct dmh_ctx *c, uint64_t offset, uint64_t bytes);
void wake_view(struct view *v, uint64_t offset, uint64_t bytes);
void open_for_looking(struct dmh_ctx *c, struct view *v);
void close_after_looking(struct view *v);
/* The caller holds the lock. */
struct view *find_view(struct dmh_ctx *c, uint32_t id);
struct view *own_view(struct dmh_ctx *c);
void wake_others(struct dmh_ctx *c, struct view *except, uint64_t page, uint64_t n);
uint64_t pages_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes);
int nothing_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes);
int page_is_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes);

#endif
