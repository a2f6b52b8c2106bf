/* Set duelling between CLOCK and random-coldest: dmh/evict/policies/duel.py has the algorithm. */
#include <math.h>

#include "policy.h"

enum { PROBATION_SHARE, GHOST_WINDOW, SAMPLE, FADES_OVER, LEADERS, HORIZON, MARGIN, PATIENCE }; /* p->tuning */

#define CLOCK_LEADERS 0         /* groups of pages: those that always play CLOCK, */
#define COLDEST_LEADERS 1       /* those that always play random-coldest, */
#define FOLLOWERS 2             /* and those that do what serves the leaders better */
#define GROUPS 3
#define PROBATION(g) (uint8_t)(FIRST_OWN + 2 * (g))
#define MAIN(g) (uint8_t)(FIRST_OWN + 2 * (g) + 1)
#define GROUP_OF(list) (((list) - FIRST_OWN) / 2)
#define IS_MAIN(list) (((list) - FIRST_OWN) % 2)

#define DRAWN OWN_1             /* entry.uses is its place in drawn[] */
#define TOUCHED OWN_2           /* as an event has said */
#define MOST_DRAWN 256

struct group {
    double quota;               /* its part of p->limit; the quotas add up to it */
    uint64_t clock;             /* counts arrivals and evictions, so twice as fast as evictions alone */
    struct pool main;           /* the pages of list MAIN, again; second[page].next is a page's place in it */
    /* Pages that will be victims unless they turn out to be in use: drawn by `look`, so that it can ask about them. */
    uint32_t drawn[MOST_DRAWN], drawn_n, drawn_at;
    uint32_t spared;            /* drawn pages in use, since the last eviction */
    int is_full;                /* something was evicted, and half of the quota has been in use since */
};

struct own {
    struct group group[GROUPS];
    uint32_t strata;            /* of so many neighbours, one page is a leader of each kind */
    double score;               /* pages that came back to the CLOCK leaders lately, less those to the others */
    int clock_leads;            /* what the followers do */
};

static struct group *group(struct dmh_policy *p, int g) { return &((struct own *)p->own)->group[g]; }
static uint32_t count_of(struct dmh_policy *p, int g) { return p->list[PROBATION(g)].count + p->list[MAIN(g)].count; }

static int plays_clock(struct dmh_policy *p, int g)
{
    return g == CLOCK_LEADERS || (g == FOLLOWERS && ((struct own *)p->own)->clock_leads);
}

static void start(struct dmh_policy *p)
{
    struct own *o = p->own;
    o->strata = 8;
    while (o->strata < 64 && p->limit / o->strata >= 2 * p->tuning[LEADERS])
        o->strata *= 2;
    double leaders = (double)p->limit / o->strata;
    o->group[CLOCK_LEADERS].quota = o->group[COLDEST_LEADERS].quota = leaders;
    o->group[FOLLOWERS].quota = p->limit - 2 * leaders;
}

static void end(struct dmh_policy *p)
{
    for (int g = 0; g < GROUPS; g++)
        free(group(p, g)->main.at);
}

/* The leaders' places differ from one run of neighbours to the next: a fair sample of scans, strides and heaps alike. */
static int group_of(struct dmh_policy *p, uint32_t page)
{
    uint32_t strata = ((struct own *)p->own)->strata;
    uint64_t mixed = (page / strata + 1) * 0x9e3779b97f4a7c15ull;
    uint32_t place = (page + (uint32_t)(mixed >> 40)) % strata;
    return place < FOLLOWERS ? (int)place : FOLLOWERS;
}

/* ---- time and heat ---- */

/* A group's time, for a page's stamp: of its arrival while it is local, of its eviction afterwards.  0 stands for never. */
static uint32_t tick(struct group *g)
{
    uint32_t now = (uint32_t)++g->clock;
    return now ? now : (uint32_t)++g->clock;
}

static void warm(struct dmh_policy *p, struct group *g, struct entry *e, int again)
{
    float now = (float)((double)g->clock / (2 * p->tuning[FADES_OVER] * g->quota));
    e->heat = again ? fade_in(e->heat, now) : now;
}

/* ---- lists ---- */

static void add(struct dmh_policy *p, int g, int to_main, uint32_t page)
{
    struct pool *main = &group(p, g)->main;
    p->entry[page].stamp = tick(group(p, g));
    push_back(p, to_main ? MAIN(g) : PROBATION(g), page);
    if (to_main) {
        pool_grow(p, main);
        p->second[page].next = main->count;
        main->at[main->count++] = page;
    }
    queue_mark(p, page);
}

static void unlist(struct dmh_policy *p, uint32_t page)
{
    struct entry *e = &p->entry[page];
    int g = GROUP_OF(e->list);
    struct group *o = group(p, g);
    e->flags &= (uint8_t)~(DRAWN | TOUCHED);
    if (IS_MAIN(e->list)) {
        struct pool *main = &o->main;
        uint32_t last = main->at[--main->count];
        main->at[p->second[page].next] = last;
        p->second[last].next = p->second[page].next;
    }
    take_out(p, page);
    o->is_full &= 2 * count_of(p, g) >= o->quota;
}

/* A page that had been here before was missing: the leaders' score.  Pages read ahead are missing just as much. */
static void score(struct dmh_policy *p, uint32_t page)
{
    struct own *o = p->own;
    int g = group_of(p, page);
    if (g == FOLLOWERS || !p->entry[page].stamp)
        return;
    double most = p->tuning[HORIZON] * o->group[g].quota;
    o->score = fmin(fmax(o->score + (g == CLOCK_LEADERS ? 1 : -1), -most), most);
    if (fabs(o->score) >= p->tuning[MARGIN] * o->group[g].quota)
        o->clock_leads = o->score < 0;
}

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    int g = group_of(p, page);
    struct group *o = group(p, g);
    struct entry *e = &p->entry[page];
    if (kind == DMH_EV_KEPT) {
        add(p, g, 0, page);
        return;
    }
    if (kind == DMH_EV_FAULT)
        score(p, page);
    int ghost = e->stamp && (uint32_t)o->clock - e->stamp <= 2 * p->tuning[GHOST_WINDOW] * o->quota;
    int filling = !o->is_full && p->list[PROBATION(g)].count >= p->tuning[PROBATION_SHARE] * o->quota;
    warm(p, o, e, e->stamp != 0);
    add(p, g, ghost || filling || kind == DMH_EV_SOFT, page);
}

static void touch(struct dmh_policy *p, uint32_t page) { p->entry[page].flags |= TOUCHED; }

static int earlier(struct dmh_policy *p, uint32_t a, uint32_t b)
{
    return !b || (a && (int32_t)(p->entry[a - 1].stamp - p->entry[b - 1].stamp) < 0);
}

/* The page of a group that arrived first. */
static uint32_t oldest(struct dmh_policy *p, int g)
{
    uint32_t a = p->list[PROBATION(g)].front, b = p->list[MAIN(g)].front;
    return (earlier(p, a, b) ? a : b) - 1;
}

static int from_probation(struct dmh_policy *p, int g)
{
    return p->list[PROBATION(g)].count > p->tuning[PROBATION_SHARE] * group(p, g)->quota || !p->list[MAIN(g)].count;
}

/* The group that is furthest above its quota. */
static int fullest(struct dmh_policy *p)
{
    int best = FOLLOWERS;
    for (int g = 0; g < FOLLOWERS; g++)
        if (count_of(p, g) * group(p, best)->quota > count_of(p, best) * group(p, g)->quota)
            best = g;
    return best;
}

/* ---- what the idle source is asked ---- */

static uint64_t look_clock(struct dmh_policy *p, int g, uint64_t *out, uint64_t most)
{
    uint64_t n = 0;
    uint32_t a = p->list[PROBATION(g)].front, b = p->list[MAIN(g)].front;
    while ((a || b) && n < most) {
        uint32_t *at = earlier(p, a, b) ? &a : &b;
        if (!(p->entry[*at - 1].flags & MARKED))
            break;
        out[n++] = *at - 1;
        *at = p->entry[*at - 1].next;
    }
    return n;
}

static int is_drawn(struct dmh_policy *p, struct group *o, uint32_t i)
{
    struct entry *e = &p->entry[o->drawn[i]];
    return e->flags & DRAWN && e->uses == i;
}

static uint64_t look_drawn(struct dmh_policy *p, int g, uint64_t *out, uint64_t most)
{
    struct group *o = group(p, g);
    uint64_t n = 0;
    while (o->drawn_at < o->drawn_n && !is_drawn(p, o, o->drawn_at))
        o->drawn_at++;
    if (o->drawn_at == o->drawn_n)
        o->drawn_at = o->drawn_n = 0;
    for (uint64_t tries = 2 * most; tries && o->drawn_n < MOST_DRAWN && o->drawn_n - o->drawn_at < most; tries--) {
        uint32_t page = coldest_of(p, &o->main, (int)p->tuning[SAMPLE]);
        if (p->entry[page].flags & DRAWN)
            continue;
        p->entry[page].flags |= DRAWN;
        p->entry[page].uses = (uint16_t)o->drawn_n;
        o->drawn[o->drawn_n++] = page;
    }
    for (uint32_t i = o->drawn_at; i < o->drawn_n && n < most; i++)
        if (is_drawn(p, o, i) && p->entry[o->drawn[i]].flags & MARKED)
            out[n++] = o->drawn[i];
    return n;
}

static uint64_t look(struct dmh_policy *p, uint64_t *out, uint64_t most)
{
    uint64_t n = 0;
    int first = fullest(p); /* `choose` begins there */
    for (int i = 0; p->accessed && i < GROUPS && n < most; i++) {
        int g = (first + i) % GROUPS;
        uint64_t share = 1 + (uint64_t)((double)most * group(p, g)->quota / p->limit);
        share = share < most - n ? share : most - n;
        if (plays_clock(p, g))
            n += look_clock(p, g, out + n, share);
        else if (!from_probation(p, g))
            n += look_drawn(p, g, out + n, share);
    }
    return n;
}

/* ---- victims ---- */

static void evict(struct dmh_policy *p, struct choice *c, int g, uint32_t page)
{
    struct entry *e = &p->entry[page];
    unlist(p, page);
    e->flags &= (uint8_t)~ABOUT_MARKS;
    e->stamp = tick(group(p, g));
    group(p, g)->spared = 0;
    group(p, g)->is_full = 1;
    choose_page(c, page);
}

/* What is known of a page's use; NOT_YET_ASKED where it should be. */
static enum seen use_of(struct dmh_policy *p, const struct entry *e) { return e->flags & TOUCHED ? IN_USE : seen(p, e); }

/* The page that arrived first: evicted, or given a second chance.  0: to be looked at first. */
static int take_oldest(struct dmh_policy *p, struct choice *c, int g)
{
    uint32_t page = oldest(p, g);
    enum seen use = use_of(p, &p->entry[page]);
    if (use == NOT_YET_ASKED)
        return 0;
    if (use != IN_USE) {
        evict(p, c, g, page);
    } else {
        unlist(p, page);
        warm(p, group(p, g), &p->entry[page], 1);
        add(p, g, 1, page);
    }
    return 1;
}

/* A page of main by its heat: evicted, or spared.  0: others are to be looked at first. */
static int take_drawn(struct dmh_policy *p, struct choice *c, int g)
{
    struct group *o = group(p, g);
    while (o->drawn_at < o->drawn_n && !is_drawn(p, o, o->drawn_at))
        o->drawn_at++;
    int none = o->drawn_at == o->drawn_n;
    if (none && o->spared && o->spared < p->tuning[PATIENCE] && p->accessed)
        return 0;
    uint32_t page = none ? coldest_of(p, &o->main, (int)p->tuning[SAMPLE]) : o->drawn[o->drawn_at];
    struct entry *e = &p->entry[page];
    enum seen use = use_of(p, e);
    if (use == NOT_YET_ASKED && !none)
        return 0;
    if (use != IN_USE) {
        evict(p, c, g, page);
    } else {
        e->flags &= (uint8_t)~(DRAWN | TOUCHED);
        o->spared++;
        warm(p, o, e, 1);
        queue_mark(p, page);
    }
    return 1;
}

static void choose(struct dmh_policy *p, struct choice *c)
{
    int went_on = 1;
    while (went_on && c->evict_n < c->evict_most && p->known > p->list[AHEAD].count) {
        int g = fullest(p);
        if (plays_clock(p, g))
            went_on = take_oldest(p, c, g);
        else if (from_probation(p, g))
            evict(p, c, g, p->list[PROBATION(g)].front - 1); /* uses right after the first say nothing */
        else
            went_on = take_drawn(p, c, g);
    }
}

static const char *validate(struct dmh_policy *p)
{
    uint32_t n = p->list[AHEAD].count;
    for (int g = 0; g < GROUPS; g++) {
        const char *wrong = count_list(p, PROBATION(g));
        wrong = wrong ? wrong : count_list(p, MAIN(g));
        if (wrong)
            return wrong;
        struct pool *main = &group(p, g)->main;
        for (uint32_t i = 0; i < main->count; i++)
            if (p->entry[main->at[i]].list != MAIN(g) || p->second[main->at[i]].next != i)
                return "a pool's places are wrong";
        if (main->count != p->list[MAIN(g)].count)
            return "a pool's count is wrong";
        n += count_of(p, g);
    }
    return n == p->known ? NULL : "a page is in no group";
}

const struct operations policy_duel = {
    .name = "duel", .own_bytes = sizeof(struct own), .second_links = 1, .start = start, .end = end, .arrive = arrive,
    .ahead = score, .touch = touch, .unlist = unlist, .look = look, .choose = choose, .validate = validate,
};
