/* The monitor's loop: read messages, look each page up in the table, and hand on only what needs a resolver. */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#define MESSAGES 64

#define QUIET_NS 20000000ull
#define SPIN_MOST_NS 100000ull
#define GAP_MOST_NS 1000000ull

static int outstanding(struct dmh_shared *s)
{
    for (uint64_t w = 0; w < s->workers; w++)
        if (LOAD(&s->completed[w]) < LOAD(&s->dispatched[w]))
            return 1;
    return 0;
}

/*
 * From any thread: a resolver has died, and what was handed to it with it.  The monitor forgets which faults it has handed on and wakes
 * everybody, so that the faults that still matter are raised again, and none counts as a duplicate.
 */
void dmh_forget_dispatched(struct dmh_ctx *c)
{
    STORE(&c->forget, 1u);
    dmh_interrupt(c);
}

static void forget_if_told(struct dmh_ctx *c)
{
    if (!LOAD(&c->forget))
        return;
    STORE(&c->forget, 0u);
    memset(c->seen, 0, c->s->pages * sizeof *c->seen);
    dmh_wake_all(c);
}

static uint64_t preemptions(void)
{
    struct rusage u;
    getrusage(RUSAGE_THREAD, &u);
    return (uint64_t)u.ru_nivcsw;
}

/*
 * Waking a sleeping thread on another processor costs more than most faults do (25 µs on small virtual machines), so for a while after
 * a message this one looks again and again instead of sleeping.  How long is learned: twice the usual gap between messages, and not at all where
 * the gap is longer than SPIN_MOST_NS.  While a resolver is at work the processor, which they may share, is offered to it at every turn.  After
 * being preempted (somebody else needs the processor) there is no spinning for a while.
 */
static uint64_t spin_until(struct dmh_ctx *c, int spin_us, uint64_t now)
{
    /* On the processor that we share with the thread that faults, spinning would keep it from faulting. */
    if (!spin_us || c->followed_cpu >= 0 || now < c->quiet_until_ns)
        return 0;
    if (spin_us > 0)
        return c->last_ns + (uint64_t)spin_us * 1000;
    return c->gap_ns > SPIN_MOST_NS ? 0 : c->last_ns + 2 * c->gap_ns;
}

static int wait_for_messages(struct dmh_ctx *c, struct epoll_event *ready, int timeout_ms, int spin_us)
{
    uint64_t now = c->last_ns, end = spin_until(c, spin_us, now);
    if (now < end) {
        int n;
        uint64_t before = preemptions();
        while (now < end) {
            if ((n = epoll_wait(c->epoll_fd, ready, MESSAGES, 0)) != 0)
                return n;
            if (outstanding(c->s))
                sched_yield();
            now = now_ns();
        }
        if (preemptions() != before)
            c->quiet_until_ns = now + QUIET_NS;
    }
    return epoll_wait(c->epoll_fd, ready, MESSAGES, timeout_ms);
}

/* Resolve here, without asking anybody, what cannot block; stored pages from the page file where the kernel has them in memory. */
void dmh_ctx_inline(struct dmh_ctx *c, int store_fd, const uint64_t *store_index)
{
    c->page_buffer = aligned_alloc(DMH_KERNEL_PAGE, c->s->page_size);
    c->plan = calloc(1, sizeof *c->plan);
    c->store_fd = store_fd;
    c->store_index = store_index;
    c->inline_on = c->page_buffer && c->plan;
}

/* A resolver is done with a request, as far as others are concerned. */
static int count_done(struct dmh_ctx *c)
{
    if (c->worker)
        ADD(&c->s->completed[c->worker], 1);
    return 1;
}

/* 1: done, the thread runs again.  0: it would block, or the page has changed: a resolver is needed.  The lock is not held. */
int dmh_resolve_inline(struct dmh_ctx *c, const struct dmh_request *r)
{
    struct dmh_plan *p = c->plan;
    uint64_t page = r->page, w = LOAD(&c->words[page]);
    if (!c->inline_on)
        return 0;
    switch (word_state(w)) {
    case DMH_STORED:
        /* Read before the claim: while the word stays as it is the store's copy does not change, and a claim given up would wake in vain. */
        if (c->store_fd < 0 || dmh_fetch_pages(c->store_fd, c->store_index, &page, 1, c->s->page_size, c->page_buffer, &p->found[0], 1) < 0)
            return 0;
        break;
    case DMH_NEW:
    case DMH_STAGED:
        break;
    case DMH_RESIDENT:
        /* It was put behind a window that has brought it in, and woken then; a message that is older than that is not read any more. */
        if (!page_is_present(c, page << c->s->page_shift, c->s->page_size))
            return 0;
        dmh_wake_pages(c, page, 1);
        return count_done(c);
    case DMH_EVICTING:
        if (!leave_to_evictor(c, page, w))
            dmh_wake_pages(c, page, 1);
        return count_done(c);
    case DMH_FETCHING:
        return count_done(c); /* who ends this state wakes */
    default:
        return 0;
    }
    if (!claim_word(c, p, page, w))
        return 0;
    p->view = r->view;
    p->thread = r->thread;
    p->ns = r->ns;
    count_done(c); /* what is left does not block: the next request may come here */
    if (!c->worker)
        count(c, DMH_C_INLINE, 1);
    dmh_install(c, p, c->page_buffer, 1);
    report_lost(p);
    return 1;
}

/* Resolved on the spot, or handed to a resolver that is awake.  0: neither. */
static int resolve_here(struct dmh_ctx *c, struct dmh_request *r)
{
    if (dmh_resolve_inline(c, r))
        return 1;
    r->resolver = dmh_hand_over(c, r);
    return r->resolver == 0;
}

/* 1: the fault goes on to a resolver. */
static int look_up(struct dmh_ctx *c, struct view *v, uint64_t address, uint64_t page)
{
    for (;;) {
        uint64_t w = LOAD(&c->words[page]);
        switch (word_state(w)) {
        case DMH_FETCHING:
            if (c->seen[page] != word_generation(w))
                count(c, DMH_C_LATE, 1); /* not the fault that it was handed on for: it is on its way ahead of use */
            /* Who ends this state wakes the page after publishing, so this message is not needed. */
            count(c, DMH_C_DROPPED, 1);
            return 0;
        case DMH_EVICTING:
            if (!leave_to_evictor(c, page, w))
                continue;
            count(c, DMH_C_DROPPED, 1);
            return 0;
        case DMH_RESIDENT: {
            uint64_t offset = (address - v->base) & ~(uint64_t)(DMH_KERNEL_PAGE - 1);
            if (page_is_present(c, offset, DMH_KERNEL_PAGE)) {
                wake_view(v, offset, DMH_KERNEL_PAGE);
                count(c, DMH_C_WOKEN, 1);
                return 0;
            }
            if (LOAD(&c->words[page]) != w)
                continue; /* it was being evicted while we looked */
            return 1;     /* resident by the table, absent in the file: a resolver deals with the damage */
        }
        case DMH_POISONED:
            return 1; /* never a duplicate: each program that joins has to be given the mark, and the word stays as it is */
        default:
            if (c->seen[page] == word_generation(w) + 1) {
                count(c, DMH_C_DUPLICATES, 1);
                return 0;
            }
            c->seen[page] = word_generation(w) + 1;
            return 1;
        }
    }
}

/* What is known of a page lies in as many arrays; the processor fetches from all of them at once if it is told in time. */
static void look_forward_to(const struct dmh_ctx *c, uint64_t page)
{
    __builtin_prefetch(&c->words[page]);
    __builtin_prefetch(&c->seen[page]);
    __builtin_prefetch(&c->advice[page]);
    __builtin_prefetch(&c->sums[page]);
    __builtin_prefetch(&c->copies[page]);
    if (c->store_index)
        __builtin_prefetch(&c->store_index[page]);
}

/* Read what is ready, look every page up, and list the faults that are still wanted.  *interrupted: dmh_interrupt was called. */
static int read_messages(struct dmh_ctx *c, const struct epoll_event *ready, int events, struct dmh_request *out, int max,
                         uint64_t at, int *interrupted)
{
    struct uffd_msg messages[MESSAGES];
    int n = 0;
    pthread_rwlock_rdlock(&c->lock);
    for (int i = 0; i < events; i++) {
        if (ready[i].data.u32 == 0) {
            uint64_t calls;
            *interrupted |= read(c->event_fd, &calls, 8) == 8;
            continue;
        }
        struct view *v = find_view(c, ready[i].data.u32);
        if (!v || n >= max)
            continue;
        int room = max - n < MESSAGES ? max - n : MESSAGES;
        ssize_t got = read(v->uffd, messages, (size_t)room * sizeof *messages);
        if (got < 0)
            continue; /* EAGAIN after POLLIN is normal: the thread was woken meanwhile */
        int k = (int)(got / (ssize_t)sizeof *messages);
        count(c, DMH_C_MESSAGES, (uint64_t)k);
        for (int j = 0; j < k; j++) {
            if (messages[j].event == UFFD_EVENT_FORK)
                note_birth(c, (struct dmh_birth){ .view = v->id, .base = v->base, .uffd = (int)messages[j].arg.fork.ufd });
            if (messages[j].event != UFFD_EVENT_PAGEFAULT)
                continue;
            uint64_t address = messages[j].arg.pagefault.address;
            uint64_t page = (address - v->base) >> c->s->page_shift;
            if (page == c->s->pages) {
                note_birth(c, (struct dmh_birth){ .view = v->id, .uffd = -1, .pid = (int)messages[j].arg.pagefault.feat.ptid });
                continue;
            }
            if (address < v->base || page > c->s->pages) {
                count(c, DMH_C_REFUSED, 1);
                continue;
            }
            look_forward_to(c, page);
            if (c->follow)
                dmh_follow(c, v, messages[j].arg.pagefault.feat.ptid, at);
            if (look_up(c, v, address, page))
                out[n++] = (struct dmh_request){ .page = page, .stride = 1, .view = v->id, .demand = 1, .ns = at,
                                                 .thread = messages[j].arg.pagefault.feat.ptid };
        }
    }
    pthread_rwlock_unlock(&c->lock);
    return n;
}

/* How many of `most` pages the program has called sequential, without a gap: other pages are not part of what it scans. */
static uint32_t sequential_from(struct dmh_ctx *c, uint64_t page, uint32_t most)
{
    uint32_t n = 0;
    while (n < most && page + n < c->s->pages && LOAD(&c->advice[page + n]) == DMH_ADVICE_SEQUENTIAL)
        n++;
    return n;
}

/*
 * Ask for the windows that a fault calls for, of resolvers that are awake; those for sleeping ones are put in out[], *left of them.  Returns the
 * resolver that has the page itself still to do, or 0.
 */
static uint32_t read_ahead(struct dmh_ctx *c, const struct dmh_request *fault, struct dmh_request *out, int *left)
{
    struct dmh_window window[2];
    struct dmh_outlook outlook = { c->words, c->s->pages, c->s->completed, c->advice };
    uint64_t used = dmh_streams_used(c->streams), wasted = dmh_streams_wasted(c->streams);
    int n = dmh_streams_observe(c->streams, fault->thread, fault->page, &outlook, window);
    count(c, DMH_C_AHEAD_USED, dmh_streams_used(c->streams) - used);
    count(c, DMH_C_AHEAD_WASTED, dmh_streams_wasted(c->streams) - wasted);
    for (int i = 0; i < n; i++) {
        struct dmh_request r = { .page = (uint64_t)window[i].first, .stride = window[i].stride, .window = window[i].count,
                                 .view = fault->view, .thread = fault->thread, .ns = fault->ns };
        if (r.page >= c->s->pages) /* the region's end, or, as a negative number, its beginning */
            continue;
        if (LOAD(&c->advice[fault->page]) == DMH_ADVICE_SEQUENTIAL && !(r.window = sequential_from(c, r.page, r.window)))
            continue;
        r.resolver = dmh_hand_over(c, &r);
        dmh_streams_given(c->streams, r.given, c->s->dispatched[r.given]);
        if (r.resolver)
            out[(*left)++] = r;
    }
    return n < 0 ? (uint32_t)-n : 0;
}

/*
 * Wait for page faults, answer here what can be answered here, and return what Python has to send: requests for resolvers that sleep.  Several
 * messages for one page count as one; a fault makes at most three requests.  0 after timeout_ms without any, after
 * dmh_interrupt, or for dmh_next_birth.
 */
int dmh_receive(struct dmh_ctx *c, struct dmh_request *out, int max, int timeout_ms, int spin_us)
{
    struct epoll_event ready[MESSAGES];
    struct dmh_request fault[MESSAGES];
    for (;;) {
        int events = wait_for_messages(c, ready, timeout_ms, spin_us), interrupted = 0, left = 0;
        if (events <= 0)
            return events < 0 && errno != EINTR ? -errno : 0;
        forget_if_told(c);
        uint64_t at = now_ns(), gap = at - c->last_ns;
        c->gap_ns = (7 * c->gap_ns + (gap < GAP_MOST_NS ? gap : GAP_MOST_NS)) / 8;
        int n = read_messages(c, ready, events, fault, max / 3 < MESSAGES ? max / 3 : MESSAGES, at, &interrupted);
        for (int i = 0; i < n; i++) {
            /* First what others are to do: once its page is there the thread may take the processor from us. */
            uint32_t behind = read_ahead(c, &fault[i], out, &left);
            if (behind)
                fault[i].resolver = hand_to(c, &fault[i], behind);
            if (behind ? fault[i].resolver : !resolve_here(c, &fault[i]))
                out[left++] = fault[i];
        }
        STORE(&c->last_ns, now_ns());
        if (left || interrupted || c->births_n)
            return left;
    }
}
