/*
 * After a death: the worker that takes the dead one's number sets right what it left half done, before it does anything else.
 *
 * What can be left: pages in FETCHING or EVICTING with its number, a run on its way through the pipe, slots and room counted for pages that have
 * none.  Truth about presence is the memfd, about a page's other copy its word (a slot, or that it was fetched) and the table.  Nothing here
 * needs to know at which instruction it died.
 */
#include "internal.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/ioctl.h>

void wait_until_thawed(struct dmh_ctx *c)
{
    struct timespec t = { 0, 100000000l };
    uint32_t frozen = LOAD(&c->s->frozen);
    if (frozen)
        futex(&c->s->frozen, FUTEX_WAIT, frozen, &t);
}

/* Launcher: this worker is dead and reaped.  Nobody waits for it, hands it work, or counts it as waiting. */
void dmh_worker_gone(struct dmh_shared *s, uint32_t worker)
{
    STORE(&s->pids[worker], 0u);
    STORE(&s->store_away[worker], 0ull);
    STORE(&dmh_lane_of(s, worker)->awake, 0u);
    STORE(&post_of(s, worker)->waits, 0u);
    STORE(&post_of(s, worker)->busy, 0u);
}

/* Nobody else is between enter and leave from here on.  What a worker that died in here froze, its successor thaws. */
static void freeze(struct dmh_ctx *c)
{
    struct dmh_shared *s = c->s;
    for (;;) {
        uint32_t none = 0;
        if (CAS(&s->frozen, &none, c->worker + 1) || none == c->worker + 1)
            break;
        wait_until_thawed(c);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t w = 0; w < s->workers; w++)
        while (w != c->worker && __atomic_load_n(&post_of(s, w)->busy, __ATOMIC_SEQ_CST))
            sched_yield();
}

static void thaw(struct dmh_ctx *c)
{
    STORE(&c->s->frozen, 0u);
    futex(&c->s->frozen, FUTEX_WAKE, INT_MAX, NULL);
}

static void set(struct dmh_ctx *c, uint64_t page, uint64_t word, uint32_t state, uint32_t worker, int32_t slot)
{
    if (!move_word(c, page, &word, state, worker, slot))
        dmh_die("page %llu changed while the table was being repaired", (unsigned long long)page);
}

static int mine(struct dmh_ctx *c, uint64_t word, uint32_t state)
{
    return word_state(word) == state && word_worker(word) == c->worker;
}

/*
 * A page that was being brought in, or dropped (dmh_drop.c).  All of it is there: it was verified before, and the program may have changed it since, so
 * it is RESIDENT.  Nothing is there: it is what it was.  Part of it is there (a page of several kernel pages): that part stays and the rest is filled in.
 * 0: done.  1: the rest has to come from the DMS; the page stays as it is, and the caller's.
 */
static int settle_claim(struct dmh_ctx *c, uint64_t page, uint64_t word)
{
    const uint64_t size = c->s->page_size, offset = page * size;
    int32_t slot = word_slot(word);
    int from_store = word_state(word) == DMH_EVICTING ? c->copies[page] == DMH_COPY_VALID : word_from_store(word);
    uint64_t there = pages_present(c, offset, size) * DMH_KERNEL_PAGE;
    if (!there) {
        set(c, page, word, slot >= 0 ? DMH_STAGED : from_store ? DMH_STORED : DMH_NEW, 0, slot);
        return 0;
    }
    if (there < size && slot < 0 && from_store)
        return 1;
    if (there < size && fill(c, own_view(c), offset, size, slot >= 0 ? c->slots_base + (uint64_t)slot * size : NULL, 1) != V_DONE)
        dmh_die("page %llu: what a dead worker had begun to install cannot be finished", (unsigned long long)page);
    set(c, page, word, DMH_RESIDENT, 0, -1);
    return 0;
}

/* A page that was on its way out but is not in the journal: nothing of it has moved, or it was being given up. */
static void settle_eviction(struct dmh_ctx *c, uint64_t page, uint64_t word)
{
    const uint64_t size = c->s->page_size, offset = page * size;
    if (word_slot(word) < 0) {
        if (punch(c, offset, size) < 0)
            dmh_die("punching a hole at page %llu failed: %s", (unsigned long long)page, strerror(errno));
        if (c->copies[page] != DMH_COPY_NONE)
            STORE(&c->copies[page], DMH_COPY_STALE);
        set(c, page, word, DMH_NEW, 0, -1);
    } else if (page_is_present(c, offset, size)) {
        set(c, page, word, DMH_RESIDENT, 0, -1);
    } else {
        /* Something outside dmh had removed its memory: found by the dead worker, not yet said. */
        poison(c, page, word, 0);
        count(c, DMH_C_POISONED, 1);
    }
}

/* How many bytes at the start of the group are out of the region. */
static uint64_t bytes_out(struct dmh_ctx *c, const struct dmh_journal *j, uint64_t bytes)
{
    const uint64_t size = c->s->page_size;
    uint64_t out = 0;
    while (out < bytes && !pages_present(c, j->page[out / size] * size + out % size, DMH_KERNEL_PAGE))
        out += DMH_KERNEL_PAGE;
    return out;
}

/*
 * The group that the journal names.  Its first `read` bytes were read into their slots for sure.  Those from there to `end` are in the pipe, but for
 * a beginning that may have been read as well; so they are read, though some may still be in the region, too.  What is out of the region is in its slot then.
 */
static void finish_group(struct dmh_ctx *c, int pipe_out, int pipe_in, struct dmh_journal *j)
{
    const uint64_t size = c->s->page_size, bytes = j->count * size;
    int piped = 0;
    if (ioctl(pipe_out, FIONREAD, &piped) < 0)
        dmh_die("the capture pipe cannot be looked into: %s", strerror(errno));
    uint64_t out = bytes; /* where publishing had begun, all had been read */
    if (mine(c, LOAD(&c->words[j->page[0]]), DMH_EVICTING)) {
        if (j->end > j->read)
            read_out(c, pipe_out, j, j->end - (uint64_t)piped, (uint64_t)piped);
        else
            drain(pipe_out); /* a piece that was not complete: nothing of it was punched */
        out = bytes_out(c, j, bytes);
        /* A page that is out in part must go out whole. */
        uint64_t whole = (out + size - 1) & ~(size - 1);
        STORE(&j->end, out);
        STORE(&j->read, out);
        move_out(c, pipe_out, pipe_in, j, whole);
        out = whole;
    }
    for (uint64_t i = 0; i < j->count; i++) {
        uint64_t word = LOAD(&c->words[j->page[i]]);
        if (mine(c, word, DMH_EVICTING) && i * size < out)
            set(c, j->page[i], word, DMH_STAGED, 0, (int32_t)j->slot[i]);
    }
    STORE(&j->count, 0ull);
}

/* Room and slots, counted anew from the words.  Everybody else is outside, so the words are all there is to count. */
static void recount(struct dmh_ctx *c)
{
    struct dmh_shared *s = c->s;
    uint32_t *flags = slot_flags(s);
    uint64_t resident = 0, staged = 0;
    uint8_t *named = calloc(s->slots + 1, 1);
    if (!named)
        dmh_die("no memory to repair the table");
    for (uint64_t page = 0; page < s->pages; page++) {
        uint64_t w = LOAD(&c->words[page]);
        uint32_t state = word_state(w);
        resident += state == DMH_FETCHING || state == DMH_RESIDENT || state == DMH_EVICTING;
        if (word_slot(w) >= 0)
            named[word_slot(w)] = 1;
    }
    for (uint64_t k = 0; k < s->slots; k++) {
        uint32_t flag = LOAD(&flags[k]);
        if (named[k])
            STORE(&flags[k], SLOT_NAMED);
        else if (flag == SLOT_NAMED || (flag == SLOT_ASIDE && c->worker + 1 == s->workers))
            STORE(&flags[k], SLOT_FREE); /* those set aside are the evictor's, which has the last number */
        staged += LOAD(&flags[k]) != SLOT_FREE;
    }
    free(named);
    STORE(&s->resident, resident);
    STORE(&s->staged, staged);
}

/*
 * Set right what the last holder of this worker's number left.  The views are known, the evictor has the pipe (others: -1).  Returns how many
 * pages are still FETCHING (or EVICTING) because part of them has to come from the DMS, listed in partial[]: dmh_install_rest finishes them.
 */
int64_t dmh_recover(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t *partial, uint64_t max)
{
    struct dmh_shared *s = c->s;
    struct dmh_journal *journal = dmh_journal_of(s);
    struct dmh_lane *lane = dmh_lane_of(s, c->worker);
    uint64_t n = 0;
    freeze(c);
    if (pipe_out >= 0 && LOAD(&journal->count))
        finish_group(c, pipe_out, pipe_in, journal);
    if (pipe_out >= 0)
        drain(pipe_out);
    for (uint64_t page = 0; page < s->pages; page++) {
        uint64_t word = LOAD(&c->words[page]);
        if (word_marked(word) && (mine(c, word, DMH_EVICTING) || mine(c, word, DMH_FETCHING)))
            settle_marked(c, page, word);
        else if (mine(c, word, DMH_EVICTING) && !word_from_store(word))
            settle_eviction(c, page, word);
        else if ((mine(c, word, DMH_EVICTING) || mine(c, word, DMH_FETCHING)) && settle_claim(c, page, word) && n < max)
            partial[n++] = page;
    }
    recount(c);
    /* What the monitor had put in the lane, or counted on its way, is not needed: who still waits faults again. */
    STORE(&lane->tail, LOAD(&lane->head));
    STORE(&s->completed[c->worker], LOAD(&s->dispatched[c->worker]));
    for (uint32_t w = 1; c->worker == 0 && w < s->workers; w++)
        STORE(&s->dispatched[w], LOAD(&s->completed[w]) + LOAD(&dmh_lane_of(s, w)->head) - LOAD(&dmh_lane_of(s, w)->tail));
    STORE(&s->heal_due, 1u);    /* it may have died before it could say so */
    STORE(&s->events_lost, 1u); /* LPET may not have heard of a page that became RESIDENT */
    count(c, DMH_C_RESTARTS, 1);
    thaw(c);
    dmh_ring_bell(s);
    dmh_wake_all(c);
    return (int64_t)n;
}

/* Finish a page of partial[]: `content` is what the DMS has of it.  0, or -EILSEQ: it is not what was stored, and the page is lost. */
int dmh_install_rest(struct dmh_ctx *c, uint64_t page, const uint8_t *content)
{
    const uint64_t size = c->s->page_size;
    uint64_t word = LOAD(&c->words[page]);
    int good = dmh_hash(content, size) == LOAD(&c->sums[page]);
    enter(c);
    if (good && fill(c, own_view(c), page * size, size, content, 1) == V_DONE) {
        set(c, page, word, DMH_RESIDENT, 0, -1);
    } else {
        poison(c, page, word, 0);
        dmh_release(c->s, 1);
        count(c, DMH_C_POISONED, 1);
    }
    leave(c);
    dmh_wake_pages(c, page, 1);
    return good ? 0 : -EILSEQ;
}

/* Whoever waits for a page of the region looks again: the kernel raises again every fault that still matters. */
void dmh_wake_all(struct dmh_ctx *c) { dmh_wake_pages(c, 0, c->s->pages + 1); } /* and who waits in a birth page behind them */

/* Tests: this worker stops here, once, and says so; it goes on when they clear `parked`. */
void dmh_step(struct dmh_ctx *c, uint32_t step)
{
    uint32_t here = step + 1;
    if (!CAS(&c->s->park, &here, 0u))
        return;
    STORE(&c->s->parked, c->worker + 1);
    futex(&c->s->parked, FUTEX_WAKE, INT_MAX, NULL);
    const struct timespec soon = { 0, 2000000 }; /* they do not wake */
    while (LOAD(&c->s->parked) == c->worker + 1)
        futex(&c->s->parked, FUTEX_WAIT, c->worker + 1, &soon);
}
