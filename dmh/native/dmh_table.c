/* The shared table (LSPT): layout, compare-and-swap, room, bell, slots, arrival rings. */
#include "internal.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define RING_ENTRIES 32768u

struct ring {
    uint64_t head;              /* written by the producer */
    uint64_t pad0[7];
    uint64_t tail;              /* written by the evictor */
    uint64_t pad1[7];
    struct dmh_event entry[RING_ENTRIES];
};

void dmh_die(const char *format, ...)
{
    va_list a;
    va_start(a, format);
    fprintf(stderr, "dmh[%d]: fatal: ", (int)getpid());
    vfprintf(stderr, format, a);
    fprintf(stderr, "\n");
    va_end(a);
    abort();
}

long futex(uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) & ~(to - 1); }

int dmh_shared_create(uint64_t pages, uint64_t page_size, uint64_t slots, uint64_t workers)
{
    struct dmh_shared h;
    memset(&h, 0, sizeof h);
    if (workers > DMH_MAX_WORKERS || slots >= (1ull << DMH_SLOT_BITS) - 1)
        return -EINVAL;
    h.magic = DMH_MAGIC;
    h.version = 1;
    h.page_size = page_size;
    h.page_shift = (uint64_t)__builtin_ctzll(page_size);
    h.pages = pages;
    h.slots = slots;
    h.workers = workers;
    h.ring_entries = RING_ENTRIES;
    uint64_t at = align_up(sizeof h, 4096);
    at += align_up(workers * sizeof(struct dmh_counters), 4096); /* counters follow the header */
    h.journal_at = at, at = align_up(at + sizeof(struct dmh_journal), 4096);
    h.posts_at = at, at = align_up(at + workers * sizeof(struct dmh_post), 4096);
    h.lanes_at = at, at = align_up(at + workers * sizeof(struct dmh_lane), 4096);
    h.words_at = at, at = align_up(at + pages * 8, 4096);
    h.sums_at = at, at = align_up(at + pages * 8, 4096);
    h.copies_at = at, at = align_up(at + pages, 4096);
    h.pins_at = at, at = align_up(at + pages, 4096);
    h.advice_at = at, at = align_up(at + pages, 4096);
    h.calm_at = at, at = align_up(at + pages * 4, 4096);
    h.slots_at = at, at = align_up(at + slots * 4, 4096);
    h.rings_at = at, at = align_up(at + workers * sizeof(struct ring), 4096);
    h.bytes = at;
    int fd = memfd_create("dmh-lspt", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)at) < 0 || pwrite(fd, &h, sizeof h, 0) != (ssize_t)sizeof h) {
        int e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

struct dmh_shared *dmh_shared_map(int fd)
{
    struct dmh_shared h;
    if (pread(fd, &h, sizeof h, 0) != (ssize_t)sizeof h || h.magic != DMH_MAGIC || h.version != 1)
        return NULL;
    void *p = mmap(NULL, h.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return p == MAP_FAILED ? NULL : p;
}

void dmh_shared_unmap(struct dmh_shared *s) { munmap(s, s->bytes); }

uint64_t *dmh_words(struct dmh_shared *s) { return (uint64_t *)((uint8_t *)s + s->words_at); }
uint64_t *dmh_sums(struct dmh_shared *s) { return (uint64_t *)((uint8_t *)s + s->sums_at); }
uint8_t *dmh_copies(struct dmh_shared *s) { return (uint8_t *)s + s->copies_at; }
uint8_t *dmh_pins(struct dmh_shared *s) { return (uint8_t *)s + s->pins_at; }
uint8_t *dmh_advice(struct dmh_shared *s) { return (uint8_t *)s + s->advice_at; }
uint32_t *dmh_calm(struct dmh_shared *s) { return (uint32_t *)((uint8_t *)s + s->calm_at); }
struct dmh_journal *dmh_journal_of(struct dmh_shared *s) { return (struct dmh_journal *)((uint8_t *)s + s->journal_at); }

struct dmh_counters *dmh_counters_of(struct dmh_shared *s, uint32_t worker)
{
    return (struct dmh_counters *)((uint8_t *)s + align_up(sizeof *s, 4096)) + worker;
}

void dmh_count(struct dmh_shared *s, uint32_t worker, uint32_t counter, uint64_t n)
{
    ADD(&dmh_counters_of(s, worker)->cell[counter], n);
}

int dmh_move(struct dmh_shared *s, uint64_t page, uint64_t expected, uint32_t state, uint32_t worker, int32_t slot)
{
    uint64_t n = next_word(page, expected, state, worker, slot);
    return CAS(&dmh_words(s)[page], &expected, n);
}

int64_t dmh_count_states(struct dmh_shared *s, uint64_t *out_by_state)
{
    uint64_t *words = dmh_words(s);
    memset(out_by_state, 0, 16 * sizeof *out_by_state);
    for (uint64_t p = 0; p < s->pages; p++)
        out_by_state[word_state(LOAD(&words[p]))]++;
    return (int64_t)s->pages;
}

uint64_t dmh_pages_in_state(struct dmh_shared *s, uint32_t state, uint64_t first, uint64_t end, uint64_t *out, uint64_t max)
{
    uint64_t *words = dmh_words(s), n = 0;
    for (uint64_t p = first; p < end && n < max; p++)
        if (word_state(LOAD(&words[p])) == state)
            out[n++] = p;
    return n;
}

/* ---- room: pages of the region's memory that may still be filled ---- */

/* Up to `wanted` pages of room, `keep` of what is left untouched; 0 where there is no more. */
uint64_t reserve_but(struct dmh_shared *s, uint64_t wanted, uint64_t keep)
{
    uint64_t r = LOAD(&s->resident), most = s->resident_max - keep;
    for (;;) {
        uint64_t free = r >= most ? 0 : most - r;
        uint64_t take = wanted < free ? wanted : free;
        if (!take || CAS(&s->resident, &r, r + take))
            return take;
    }
}

/* Up to `wanted` pages of room; 0 when the hard limit is reached. */
uint64_t dmh_reserve(struct dmh_shared *s, uint64_t wanted) { return reserve_but(s, wanted, 0); }

/*
 * Of the room, what reading ahead leaves to the faults that wait for theirs.  Less than lies above the high threshold: where a window finds no room
 * LPET must be due.
 */
uint64_t kept_from_windows(const struct dmh_shared *s)
{
    uint64_t above = s->resident_max > s->high ? (s->resident_max - s->high) / 2 : 0;
    return above < 32 ? above : 32;
}

void dmh_release(struct dmh_shared *s, uint64_t n)
{
    SUB(&s->resident, n);
    if (dmh_room_wanted(s)) {
        ADD(&s->room, 1);
        futex(&s->room, FUTEX_WAKE, INT_MAX, NULL);
    }
}

/* Does a fault wait for room? */
int dmh_room_wanted(struct dmh_shared *s)
{
    for (uint32_t w = 0; w < s->workers; w++)
        if (LOAD(&post_of(s, w)->waits))
            return 1;
    return 0;
}

/* Evictor: it wants room itself, for pages that it heals; LPET then makes some. */
void dmh_want_room(struct dmh_ctx *c, int wanted) { STORE(&post_of(c->s, c->worker)->waits, (uint32_t)wanted); }

/* Wait until there may be room; `ahead`: for a window, which has less.  1: look again; 0: timed out or stopping. */
int dmh_wait_room(struct dmh_ctx *c, int ahead, int timeout_ms)
{
    struct dmh_shared *s = c->s;
    struct timespec t = { timeout_ms / 1000, (timeout_ms % 1000) * 1000000l };
    uint32_t *waits = &post_of(s, c->worker)->waits;
    __atomic_store_n(waits, 1u, __ATOMIC_SEQ_CST);
    uint32_t seen = LOAD(&s->room);
    uint64_t most = s->resident_max - (ahead ? kept_from_windows(s) : 0);
    int there = __atomic_load_n(&s->resident, __ATOMIC_SEQ_CST) < most; /* it may have come before we were seen to wait */
    if (!there && !LOAD(&s->stop)) {
        dmh_ring_bell(s);
        there = futex(&s->room, FUTEX_WAIT, seen, &t) == 0 || errno == EAGAIN;
    }
    STORE(waits, 0u);
    return there;
}

void dmh_ring_bell(struct dmh_shared *s)
{
    ADD(&s->bell, 1);
    futex(&s->bell, FUTEX_WAKE, 1, NULL);
}

int dmh_wait_bell(struct dmh_shared *s, uint32_t seen, int timeout_ms)
{
    struct timespec t = { timeout_ms / 1000, (timeout_ms % 1000) * 1000000l };
    STORE(&s->evicting_on, 0u);
    if (LOAD(&s->bell) == seen && !LOAD(&s->stop))
        futex(&s->bell, FUTEX_WAIT, seen, &t);
    return LOAD(&s->bell) != seen;
}

void dmh_stop(struct dmh_shared *s)
{
    STORE(&s->stop, 1);
    ADD(&s->bell, 1);
    ADD(&s->room, 1);
    futex(&s->bell, FUTEX_WAKE, INT_MAX, NULL);
    futex(&s->room, FUTEX_WAKE, INT_MAX, NULL);
}

/* ---- slots of the victim buffer: the evictor takes, whoever empties one frees ---- */

int64_t dmh_take_slots(struct dmh_ctx *c, uint32_t *out, uint64_t n, uint64_t from)
{
    struct dmh_shared *s = c->s;
    uint32_t *flags = slot_flags(s);
    uint64_t got = 0;
    enter(c);
    for (uint64_t i = 0; i < s->slots && got < n; i++) {
        uint64_t k = (from + i) % s->slots;
        if (LOAD(&flags[k]) != SLOT_FREE || (c->held && c->held[k]))
            continue;
        STORE(&flags[k], SLOT_ASIDE);
        out[got++] = (uint32_t)k;
    }
    ADD(&s->staged, got);
    leave(c);
    AT(c, DMH_AT_SLOTS_TAKEN);
    return (int64_t)got;
}

/* Evictor: what is in these slots is being written, so they are not to be given out, whoever gives them up; or not any more. */
void dmh_hold_slots(struct dmh_ctx *c, const uint32_t *slots, uint64_t n, int on)
{
    if (!c->held && !(c->held = calloc(c->s->slots, 1)))
        dmh_die("no memory for %llu bytes", (unsigned long long)c->s->slots);
    for (uint64_t i = 0; i < n; i++)
        c->held[slots[i]] = (uint8_t)on;
}

/* Evictor: the slots that no page went into (every outcome but DIRTY) are free again. */
void dmh_return_slots(struct dmh_ctx *c, const uint32_t *slots, const uint8_t *outcome, uint64_t n)
{
    enter(c);
    for (uint64_t i = 0; i < n; i++)
        if (outcome[i] != DMH_OUT_DIRTY)
            dmh_free_slot(c, slots[i]);
    leave(c);
}

/* The caller has entered, and the word that named the slot does not any more. */
void dmh_free_slot(struct dmh_ctx *c, uint32_t slot)
{
    STORE(&slot_flags(c->s)[slot], SLOT_FREE);
    SUB(&c->s->staged, 1);
}

/* ---- lanes: the monitor hands requests to resolvers that are awake ---- */

/* How this thread shares a processor: `batch`: being woken takes it from nobody; slice_us: asked for at a time.  -errno where the kernel refuses. */
int dmh_schedule(int batch, uint32_t slice_us)
{
    struct { /* sched_attr, which older headers do not have */
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } a = { .size = sizeof a, .policy = batch ? SCHED_BATCH : SCHED_OTHER, .runtime = slice_us * 1000ull };
    errno = 0;
    a.nice = getpriority(PRIO_PROCESS, 0);
    return syscall(SYS_sched_setattr, 0, &a, 0u) < 0 ? -errno : 0;
}

struct dmh_lane *dmh_lane_of(struct dmh_shared *s, uint32_t worker)
{
    return (struct dmh_lane *)((uint8_t *)s + s->lanes_at) + worker;
}

/*
 * Monitor: give a request to resolver n, behind what it has.  0: handed over.  N > 0: resolver N sleeps, or its lane is full: send it the request over
 * ZeroMQ.  -N: the request is in the lane of N, which may have fallen asleep meanwhile: send it an empty frame.
 */
int hand_to(struct dmh_ctx *c, struct dmh_request *r, uint32_t n)
{
    struct dmh_lane *lane = dmh_lane_of(c->s, n);
    ADD(&c->s->dispatched[n], 1);
    r->given = n;
    uint64_t head = lane->head;
    if (!LOAD(&lane->awake) || head - LOAD(&lane->tail) == 64)
        return (int)n;
    lane->entry[head % 64] = *r;
    __atomic_store_n(&lane->head, head + 1, __ATOMIC_SEQ_CST);
    /* It clears `awake` and then looks at head; we move head and then look at `awake`: one of us sees the other. */
    if (!__atomic_load_n(&lane->awake, __ATOMIC_SEQ_CST))
        return -(int)n;
    if (__atomic_load_n(&lane->asleep, __ATOMIC_SEQ_CST)) {
        ADD(&lane->bell, 1);
        futex(&lane->bell, FUTEX_WAKE, 1, NULL);
    }
    return 0;
}

/* Monitor: to the resolver with the least to do; of those, to the lowest number, which stays warm while the others sleep.  Returns as hand_to. */
int dmh_hand_over(struct dmh_ctx *c, struct dmh_request *r)
{
    struct dmh_shared *s = c->s;
    uint64_t least = UINT64_MAX;
    /* A window is work beside the program's; resolver 1 may be on the program's own processor. */
    uint32_t first = r->window && s->workers > 3 ? 2 : 1;
    uint32_t best = first;
    for (uint32_t n = first; n + 1 < s->workers && least; n++) {
        uint64_t done = LOAD(&s->completed[n]), load = s->dispatched[n] > done ? s->dispatched[n] - done : 0;
        if (!LOAD(&s->pids[n]))
            load += UINT32_MAX; /* it has died, and its successor is not there yet */
        if (load < least)
            best = n, least = load;
    }
    return hand_to(c, r, best);
}

/* 1: there may be something in the lane, or the table is closing; 0: timed out. */
static int wait_for_lane(struct dmh_lane *lane, int doze_ms)
{
    struct timespec t = { doze_ms / 1000, (doze_ms % 1000) * 1000000l };
    uint32_t seen = LOAD(&lane->bell);
    int timed_out = 0;
    __atomic_store_n(&lane->asleep, 1u, __ATOMIC_SEQ_CST);
    /* The monitor moves head and then looks at `asleep`; we set `asleep` and then look at head: one of us sees the other. */
    if (__atomic_load_n(&lane->head, __ATOMIC_SEQ_CST) == lane->tail)
        timed_out = futex(&lane->bell, FUTEX_WAIT, seen, &t) < 0 && errno == ETIMEDOUT;
    STORE(&lane->asleep, 0u);
    return !timed_out;
}

/*
 * Resolver: the next request from the lane that needs Python; what does not is resolved here.  0 after doze_ms without one: the resolver is no longer
 * awake, and must wait for a frame.
 */
int dmh_next_request(struct dmh_ctx *c, struct dmh_request *out, int doze_ms)
{
    struct dmh_shared *s = c->s;
    struct dmh_lane *lane = dmh_lane_of(s, c->worker);
    STORE(&lane->awake, 1u);
    while (!LOAD(&s->stop)) {
        uint64_t tail = lane->tail;
        if (LOAD(&lane->head) != tail) {
            *out = lane->entry[tail % 64];
            STORE(&lane->tail, tail + 1);
            if (!(out->demand ? !out->window && (dmh_resolve_inline(c, out) || bring_stored(c, out)) : bring_ahead(c, out)))
                return 1;
        } else if (!wait_for_lane(lane, doze_ms)) {
            __atomic_store_n(&lane->awake, 0u, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&lane->head, __ATOMIC_SEQ_CST) == lane->tail)
                return 0;
            STORE(&lane->awake, 1u);
        }
    }
    return 0;
}

/* ---- arrivals: what came in, told to the evictor's policy ---- */

static struct ring *ring_of(struct dmh_shared *s, uint32_t worker)
{
    return (struct ring *)((uint8_t *)s + s->rings_at) + worker;
}

void note_arrivals(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint32_t first_kind, uint32_t kind, const struct dmh_plan *p)
{
    struct dmh_shared *s = c->s;
    struct ring *r = ring_of(s, c->worker);
    uint64_t order = ADD(&s->clock, n);
    uint64_t head = r->head, tail = LOAD(&r->tail);
    if (head + n - tail > RING_ENTRIES) {
        /* The evictor has fallen behind or is being restarted; it reads the table instead. */
        STORE(&s->events_lost, 1u);
        dmh_ring_bell(s);
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        struct dmh_event *e = &r->entry[(head + i) % RING_ENTRIES];
        e->order = order + i;
        e->page = pages[i];
        e->ns = p->ns;
        e->kind = i ? kind : first_kind;
        e->thread = p->thread;
    }
    STORE(&r->head, head + n);
    if (head - tail < RING_ENTRIES / 2 && head + n - tail >= RING_ENTRIES / 2)
        dmh_ring_bell(s);
}

int64_t dmh_drain(struct dmh_shared *s, struct dmh_event *out, uint64_t max)
{
    uint64_t n = 0;
    for (uint32_t w = 0; w < s->workers; w++) {
        struct ring *r = ring_of(s, w);
        uint64_t tail = r->tail, head = LOAD(&r->head);
        while (tail != head && n < max)
            out[n++] = r->entry[tail++ % RING_ENTRIES];
        STORE(&r->tail, tail);
    }
    return (int64_t)n;
}

void note_latency(struct dmh_ctx *c, uint64_t since_ns)
{
    uint64_t d = now_ns() - since_ns;
    uint32_t b = d ? 63u - (uint32_t)__builtin_clzll(d) : 0;
    c->counters->fault_ns[b]++;
}
