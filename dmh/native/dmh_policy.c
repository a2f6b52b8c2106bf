/*
 * Eviction policies: what they have in common.  Owns the events' meaning, the pages read ahead, and the queue of pages to be marked.
 *
 * Used by the evictor, by the simulator (dmh_replay.c) and by tests; all three run the same code.
 */
#include <math.h>

#include "policy.h"

static const struct operations *const operations[] = {
    &policy_fifo, &policy_idle_walk, &policy_random, &policy_clock, &policy_s3fifo, &policy_lirs, &policy_pgr, &policy_duel,
};

/* How many pages that were read ahead may be local without being known to have been used, where `limit` pages are: more leave first. */
uint32_t dmh_ahead_cap(uint64_t limit)
{
    uint64_t windows = limit / 4 < 512 ? limit / 4 : 512; /* in little memory, too, there must be room for whole windows */
    return (uint32_t)(limit / 20 > windows ? limit / 20 : windows);
}

struct dmh_policy *dmh_policy_new(const char *name, uint64_t pages, uint64_t limit, int accessed, uint64_t seed,
                                  const double *tuning, uint64_t n_tuning)
{
    const struct operations *op = NULL;
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        if (!strcmp(operations[i]->name, name))
            op = operations[i];
    if (!op || pages >= UINT32_MAX || limit < 1 || limit > pages || n_tuning > 8)
        return NULL;
    struct dmh_policy *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->op = op;
    p->pages = (uint32_t)pages;
    p->limit = (uint32_t)limit;
    p->accessed = accessed;
    p->random = seed * 0x9e3779b97f4a7c15ull + 0x853c49e6748fea9bull;
    p->random = p->random ? p->random : 1;
    if (n_tuning)
        memcpy(p->tuning, tuning, n_tuning * sizeof *tuning);
    p->ahead_cap = dmh_ahead_cap(p->limit);
    p->queue_size = 64;
    while (p->queue_size < p->limit && p->queue_size < 1u << 20)
        p->queue_size *= 2;
    p->entry = calloc(pages, sizeof *p->entry);
    p->second = op->second_links ? calloc(pages, sizeof *p->second) : NULL;
    p->queue = accessed ? calloc(p->queue_size, sizeof *p->queue) : NULL;
    p->own = calloc(1, op->own_bytes ? op->own_bytes : 1);
    p->bytes = sizeof *p + op->own_bytes + pages * (sizeof *p->entry + (p->second ? sizeof *p->second : 0)) +
               (p->queue ? p->queue_size * sizeof *p->queue : 0);
    if (!p->entry || (op->second_links && !p->second) || (accessed && !p->queue) || !p->own) {
        dmh_policy_free(p);
        return NULL;
    }
    if (op->start)
        op->start(p);
    return p;
}

void dmh_policy_free(struct dmh_policy *p)
{
    if (p->own && p->op->end)
        p->op->end(p);
    free(p->entry);
    free(p->second);
    free(p->queue);
    free(p->own);
    free(p);
}

uint64_t dmh_policy_count(struct dmh_policy *p) { return p->known; }
uint64_t dmh_policy_bytes(struct dmh_policy *p) { return p->bytes; }

void dmh_policy_lists(struct dmh_policy *p, const uint64_t *pages, uint64_t n, uint8_t *out)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = pages[i] < p->pages && is_local(&p->entry[pages[i]]) ? p->entry[pages[i]].list : OUT;
}

/* ---- marks ---- */

/* Have a page marked by and by.  A full queue leaves it unmarked: nothing is known of its use, which is no error. */
void queue_mark(struct dmh_policy *p, uint32_t page)
{
    struct entry *e = &p->entry[page];
    e->flags &= (uint8_t)~ABOUT_MARKS;
    if (!p->accessed || e->flags & QUEUED || p->queue_tail - p->queue_head == p->queue_size)
        return;
    e->flags |= QUEUED;
    p->queue[p->queue_tail++ % p->queue_size] = page;
}

static void mark_queued(struct dmh_policy *p, struct choice *c)
{
    while (p->accessed && p->queue_head != p->queue_tail && c->mark_n < c->mark_most) {
        uint32_t page = p->queue[p->queue_head++ % p->queue_size];
        struct entry *e = &p->entry[page];
        e->flags &= (uint8_t)~QUEUED;
        if (!is_local(e))
            continue; /* left meanwhile */
        e->flags |= MARKED;
        c->mark[c->mark_n++] = page;
    }
}

/* ---- pools ---- */

/* Make room for one more. */
void pool_grow(struct dmh_policy *p, struct pool *in)
{
    if (in->count < in->room)
        return;
    uint32_t room = in->room ? in->room * 2 : 64;
    uint32_t *at = realloc(in->at, room * sizeof *at);
    if (!at)
        dmh_die("no memory for a pool of %u pages", room);
    p->bytes += (room - in->room) * sizeof *at;
    in->at = at;
    in->room = room;
}

void pool_add(struct dmh_policy *p, struct pool *in, uint8_t which, uint32_t page)
{
    pool_grow(p, in);
    p->entry[page].list = which;
    p->entry[page].next = in->count;
    in->at[in->count++] = page;
    p->list[which].count++;
    p->known++;
}

void pool_take_out(struct dmh_policy *p, struct pool *in, uint32_t page)
{
    struct entry *e = &p->entry[page];
    uint32_t last = in->at[--in->count];
    in->at[e->next] = last;
    p->entry[last].next = e->next;
    p->list[e->list].count--;
    p->known--;
    e->next = NONE;
    e->list = OUT;
}

const char *check_pool(struct dmh_policy *p, const struct pool *in, uint8_t which)
{
    for (uint32_t i = 0; i < in->count; i++)
        if (p->entry[in->at[i]].list != which || p->entry[in->at[i]].next != i)
            return "a pool's places are wrong";
    return in->count == p->list[which].count ? NULL : "a pool's count is wrong";
}

/* The coldest of a few pages drawn at random. */
uint32_t coldest_of(struct dmh_policy *p, const struct pool *in, int sample)
{
    uint32_t best = in->at[draw(p, in->count)];
    while (--sample > 0) {
        uint32_t other = in->at[draw(p, in->count)];
        if (p->entry[other].heat < p->entry[best].heat)
            best = other;
    }
    return best;
}

/*
 * A page's heat is the sum over its uses of e^(-age).  What is kept is the logarithm of the sum of e^(time of use), which compares the same and
 * never has to be aged.
 */
float fade_in(float heat, float now) { return fmaxf(heat, now) + log1pf(expf(-fabsf(heat - now))); }

/* ---- events ---- */

static void depart(struct dmh_policy *p, uint32_t page)
{
    struct entry *e = &p->entry[page];
    if (e->list == AHEAD)
        take_out(p, page);
    else if (e->list != OUT)
        p->op->unlist(p, page);
    e->flags &= (uint8_t)~ABOUT_MARKS;
}

static void learn(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    struct entry *e = &p->entry[page];
    switch (kind) {
    case DMH_EV_PREFETCH:
        if (!p->op->plain_ahead) {
            if (is_local(e))
                return;
            if (e->list != OUT) {
                p->op->unlist(p, page);
                e->flags |= WAS_GHOST;
            }
            if (p->op->ahead)
                p->op->ahead(p, page);
            push_back(p, AHEAD, page);
            queue_mark(p, page);
            return;
        }
        kind = DMH_EV_FAULT;
        /* fall through */
    case DMH_EV_FAULT:
    case DMH_EV_SOFT:
        if (e->list == AHEAD)
            take_out(p, page);
        if (is_local(e))
            p->op->touch(p, page);
        else
            p->op->arrive(p, page, kind);
        e->flags &= (uint8_t)~WAS_GHOST;
        return;
    case DMH_EV_EXPECTED:
        if (is_local(e) && e->list != AHEAD)
            p->op->touch(p, page);
        return;
    case DMH_EV_GONE:
        depart(p, page);
        e->stamp = 0; /* what comes there next is another page */
        return;
    case DMH_EV_KEPT:
        if (p->op->unmark)
            p->op->unmark(p, page);
        e->flags &= (uint8_t)~ABOUT_MARKS;
        if (!is_local(e))
            p->op->arrive(p, page, kind);
        return;
    case DMH_EV_USED:
    case DMH_EV_IDLE:
        if (e->flags & MARKED)
            e->flags = (uint8_t)((e->flags & ~(SEEN_USED | SEEN_IDLE)) | (kind == DMH_EV_USED ? SEEN_USED : SEEN_IDLE));
        return;
    }
}

void dmh_policy_learn(struct dmh_policy *p, const uint64_t *pages, const uint8_t *kinds, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        if (i + 8 < n && pages[i + 8] < p->pages)
            __builtin_prefetch(&p->entry[pages[i + 8]], 1);
        if (pages[i] < p->pages)
            learn(p, (uint32_t)pages[i], kinds[i]);
    }
}

/* ---- choices ---- */

/* Pages read ahead that are too many: those that nobody used leave, the others arrive. */
static int ahead_is_over(struct dmh_policy *p) { return p->list[AHEAD].count > p->ahead_cap; }

static void choose_ahead(struct dmh_policy *p, struct choice *c, int all)
{
    struct list *l = &p->list[AHEAD];
    while (l->count && (all || ahead_is_over(p)) && c->evict_n < c->evict_most) {
        uint32_t page = l->front - 1;
        struct entry *e = &p->entry[page];
        enum seen use = seen(p, e);
        if (use == NOT_YET_ASKED && !all)
            return;
        depart(p, page);
        if (use == IN_USE)
            p->op->arrive(p, page, DMH_EV_USED);
        else
            choose_page(c, page); /* its stamp stays: reading ahead is no use */
        if (use != IN_USE && e->flags & WAS_GHOST)
            push_back(p, FIRST_GHOST, page);
        e->flags &= (uint8_t)~WAS_GHOST;
    }
}

uint64_t dmh_policy_look(struct dmh_policy *p, uint64_t *out, uint64_t most)
{
    uint64_t n = 0;
    if (ahead_is_over(p)) {
        /* Of those that may be chosen next: the list may be long, and nothing on it marked. */
        uint64_t over = p->list[AHEAD].count - p->ahead_cap, next = over < most ? over : most;
        for (uint32_t at = p->list[AHEAD].front; at && next--; at = p->entry[at - 1].next)
            if (p->entry[at - 1].flags & MARKED)
                out[n++] = at - 1;
    }
    return n < most && p->op->look ? n + p->op->look(p, out + n, most - n) : n;
}

void dmh_policy_choose(struct dmh_policy *p, uint64_t evict_most, uint64_t mark_most, uint64_t *evict, uint64_t *evict_n,
                       uint64_t *mark, uint64_t *mark_n)
{
    struct choice c = { .evict = evict, .mark = mark, .evict_most = evict_most, .mark_most = mark_most };
    choose_ahead(p, &c, 0);
    if (c.evict_n < evict_most || mark_most)
        p->op->choose(p, &c);
    if (c.evict_n < evict_most && p->known == p->list[AHEAD].count)
        choose_ahead(p, &c, 1);
    if (c.evict_n)
        p->spared = 0;
    for (uint64_t i = 0; i < c.evict_n; i++) /* a policy that takes no notice of marks may have got some for pages that were read ahead once */
        p->entry[c.evict[i]].flags &= (uint8_t)~ABOUT_MARKS;
    mark_queued(p, &c);
    *evict_n = c.evict_n;
    *mark_n = c.mark_n;
}

/* ---- invariants ---- */

/* NULL, or what is wrong with a list's links or count. */
const char *count_list(struct dmh_policy *p, uint8_t which)
{
    uint32_t n = 0, before = NONE;
    for (uint32_t at = p->list[which].front; at; at = p->entry[at - 1].next) {
        if (p->entry[at - 1].list != which || p->entry[at - 1].prev != before || n++ > p->pages)
            return "a list's links lead astray";
        before = at;
    }
    return p->list[which].back == before && n == p->list[which].count ? NULL : "a list's count is wrong";
}

/* NULL, or which invariant does not hold.  Walks over every page: for tests. */
const char *dmh_policy_validate(struct dmh_policy *p)
{
    uint32_t listed = 0;
    for (uint32_t page = 0; page < p->pages; page++) {
        struct entry *e = &p->entry[page];
        listed += is_local(e);
        if (!is_local(e) && e->flags & ABOUT_MARKS)
            return "a page that is not local is marked";
        if (!(e->flags & MARKED) && e->flags & (SEEN_USED | SEEN_IDLE))
            return "a page was seen without having been marked";
    }
    if (listed != p->known)
        return "a page is in no list, or in two";
    const char *wrong = count_list(p, AHEAD);
    return wrong ? wrong : p->op->validate(p);
}
