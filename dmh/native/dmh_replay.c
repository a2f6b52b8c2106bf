/*
 * The simulator's loops: a trace of page numbers against a policy, and against the best that is possible.
 *
 * Plays the part of everything around a policy: the application's uses, LPET's runs, the idle source.
 * dmh/simulate/replay.py calls it, and has the same in Python for policies that are not in this module.
 */
#include "policy.h"

#define AWAY 0                  /* not local */
#define RESIDENT 1
#define STAGED 2                /* marked without accessed bits: in the victim buffer until it is touched or evicted */
#define USED 4                  /* since it was marked; together with RESIDENT */

#define BATCH 256

static void tell(struct dmh_policy *p, uint64_t page, uint8_t kind) { dmh_policy_learn(p, &page, &kind, 1); }

/* One step of LPET towards `quota` pages fewer; 0: nothing can be evicted. */
static int step(struct dmh_policy *p, uint8_t *state, struct dmh_replay *r, uint64_t quota)
{
    uint64_t pages[BATCH], marks[BATCH], n, marked;
    uint8_t kinds[BATCH];
    uint64_t most = quota < BATCH ? quota : BATCH;
    uint64_t looked = dmh_policy_look(p, pages, most);
    for (uint64_t i = 0; i < looked; i++)
        kinds[i] = p->accessed ? (state[pages[i]] & USED ? DMH_EV_USED : DMH_EV_IDLE)
                               : (state[pages[i]] == STAGED ? DMH_EV_IDLE : DMH_EV_USED);
    dmh_policy_learn(p, pages, kinds, looked);
    r->looks += looked;
    uint64_t room = p->accessed ? BATCH : r->slots - r->staged;
    dmh_policy_choose(p, most, room < BATCH ? room : BATCH, pages, &n, marks, &marked);
    r->marks += p->accessed ? marked : 0;
    for (uint64_t i = 0; i < marked; i++)
        state[marks[i]] = p->accessed ? RESIDENT : STAGED;
    r->staged += p->accessed ? 0 : marked;
    for (uint64_t i = 0; i < n; i++) {
        r->staged -= state[pages[i]] == STAGED;
        state[pages[i]] = AWAY;
    }
    r->local -= n;
    r->evicted += n;
    return looked || n || marked;
}

/*
 * Use the pages of a trace one after another.  `state` is one byte a page, all zero before the first call; a trace may come in parts.
 * 0, or -ENOSPC where the policy named no victim.
 */
int dmh_replay_trace(struct dmh_policy *p, const uint64_t *trace, uint64_t n, uint8_t *state, struct dmh_replay *r)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = trace[i];
        if (page >= p->pages)
            return -ERANGE;
        if (state[page] & RESIDENT) {
            state[page] |= USED;
            if (r->every)
                tell(p, page, DMH_EV_SOFT);
            continue;
        }
        if (state[page] == STAGED) {
            r->soft++;
            r->staged--;
            state[page] = RESIDENT | USED;
            tell(p, page, DMH_EV_SOFT);
        } else {
            if (r->local >= r->high)
                while (r->local > r->low)
                    if (!step(p, state, r, r->local - r->low))
                        return -ENOSPC;
            r->local++;
            r->hard++;
            state[page] = RESIDENT | USED;
            tell(p, page, DMH_EV_FAULT);
        }
        if (p->accessed)
            step(p, state, r, 0); /* mark what has just come in, after its first use */
    }
    return 0;
}

/* ---- a program on the table of a simulated service ---- */

/*
 * Let the program run until the clock says `until`, or, with `while_unrung`, until it has rung LPET or waits for room.  What is LPET's of the table
 * changes only between two calls.  mapped: a byte a page, set by a use, cleared by a mark.  0, or -ERANGE: a page that does not exist.
 */
int dmh_replay_program(struct dmh_shared *s, struct dmh_program *r, const uint64_t *trace, uint64_t n, uint8_t *mapped, uint64_t until,
                       int while_unrung)
{
    struct dmh_ctx c; /* what is used of it */
    struct dmh_plan arrival;
    c.s = s, c.worker = 0, c.words = dmh_words(s), c.counters = dmh_counters_of(s, 0);
    arrival.thread = 1;
    uint32_t *waits = &post_of(s, 0)->waits;
    for (; r->at < n && r->now < until && !(while_unrung && s->rung_at); r->at++) {
        uint64_t page = trace[r->at];
        if (page >= s->pages)
            return -ERANGE;
        uint32_t state = word_state(c.words[page]);
        if (state == DMH_RESIDENT) {
            r->now += r->use_ns + (mapped[page] ? 0 : r->remap_ns);
            mapped[page] = 1;
            continue;
        }
        if (!dmh_reserve(s, 1)) {
            count(&c, DMH_C_ROOM_WAITS, !*waits);
            *waits = 1;
            r->now = while_unrung ? r->now : until;
            return 0;
        }
        *waits = 0;
        uint64_t rung_at = s->rung_at;
        ring_at_high(&c, page, 1);
        if (s->rung_at && !rung_at)
            s->rung_ns = r->now;
        arrival.ns = r->now;
        int soft = state == DMH_STAGED;
        s->staged -= (uint64_t)soft;
        r->soft += (uint64_t)soft;
        r->hard += !soft;
        r->now += r->use_ns + (soft ? r->soft_ns : r->hard_ns);
        c.words[page] = DMH_RESIDENT;
        mapped[page] = 1;
        uint32_t kind = soft ? DMH_EV_SOFT : DMH_EV_FAULT;
        note_arrivals(&c, &page, 1, kind, kind, &arrival);
    }
    return 0;
}

/* ---- Belady's OPT ---- */

struct use {
    uint64_t next, page;
};

/* A heap of uses, the furthest next one on top. */
static void sift_up(struct use *h, uint64_t i)
{
    struct use u = h[i];
    for (; i && h[(i - 1) / 2].next < u.next; i = (i - 1) / 2)
        h[i] = h[(i - 1) / 2];
    h[i] = u;
}

static void sift_down(struct use *h, uint64_t n)
{
    struct use u = h[0];
    uint64_t i = 0;
    for (uint64_t k; (k = 2 * i + 1) < n; i = k) {
        if (k + 1 < n && h[k + 1].next > h[k].next)
            k++;
        if (h[k].next <= u.next)
            break;
        h[i] = h[k];
    }
    h[i] = u;
}

/* Faults of the best possible order of victims: always the page whose next use is furthest away.  -ENOMEM, -ERANGE. */
int64_t dmh_replay_optimal(const uint64_t *trace, uint64_t n, uint64_t pages, uint64_t limit)
{
    uint64_t *next = malloc((n + 1) * sizeof *next), *when = malloc((pages + 1) * sizeof *when);
    struct use *heap = malloc((n + 1) * sizeof *heap);
    int64_t faults = next && when && heap ? 0 : -ENOMEM;
    for (uint64_t page = 0; when && page < pages; page++)
        when[page] = UINT64_MAX;
    for (uint64_t i = n; !faults && i-- > 0;) {
        if (trace[i] >= pages) {
            faults = -ERANGE;
            break;
        }
        next[i] = when[trace[i]];
        when[trace[i]] = i;
    }
    uint64_t heaped = 0, local = 0;
    for (uint64_t page = 0; faults == 0 && page < pages; page++)
        when[page] = 0; /* from here on: one more than the next use of a page that is local; 0: it is not */
    int failed = faults < 0;
    for (uint64_t i = 0; !failed && i < n; i++) {
        uint64_t page = trace[i];
        if (!when[page]) {
            faults++;
            if (local == limit) {
                /* A page's older uses are still in the heap; only the latest counts. */
                while (when[heap[0].page] != heap[0].next) {
                    heap[0] = heap[--heaped];
                    sift_down(heap, heaped);
                }
                when[heap[0].page] = 0;
                local--;
            }
            local++;
        }
        when[page] = next[i] == UINT64_MAX ? UINT64_MAX : next[i] + 1;
        heap[heaped] = (struct use){ when[page], page };
        sift_up(heap, heaped++);
    }
    free(next);
    free(when);
    free(heap);
    return faults;
}
