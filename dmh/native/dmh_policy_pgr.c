/* PGR: dmh/evict/policies/pgr.py has the algorithm. */
#include <math.h>

#include "policy.h"

#define PROBATION FIRST_OWN
#define MAIN (FIRST_OWN + 1)
#define FROM_MAIN OWN_1         /* where the page was when it was evicted last */

enum { AT_START, GHOST_WINDOW, SAMPLE, FADES_OVER, LEAST, MOST }; /* p->tuning */

struct own {
    struct pool main;
    double target;              /* of probation, in pages */
    int is_full;                /* something was evicted, and half of memory has been in use since */
    uint64_t clock;             /* counts evictions; its low half is a page's stamp */
};

static struct own *own(struct dmh_policy *p) { return p->own; }

static void start(struct dmh_policy *p) { own(p)->target = p->tuning[AT_START] * p->limit; }
static void end(struct dmh_policy *p) { free(own(p)->main.at); }

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    struct own *o = own(p);
    struct entry *e = &p->entry[page];
    if (kind == DMH_EV_KEPT) {
        push_back(p, PROBATION, page);
        return;
    }
    int ghost = e->stamp && (uint32_t)o->clock - e->stamp <= p->tuning[GHOST_WINDOW] * p->limit;
    float now = (float)((double)o->clock / (p->tuning[FADES_OVER] * p->limit));
    e->heat = e->stamp ? fade_in(e->heat, now) : now;
    if (ghost) {
        o->target += e->flags & FROM_MAIN ? -1 : 1;
        o->target = fmin(fmax(o->target, p->tuning[LEAST] * p->limit), p->tuning[MOST] * p->limit);
    }
    int filling = !o->is_full && p->list[PROBATION].count >= o->target;
    if (ghost || filling || kind == DMH_EV_SOFT)
        pool_add(p, &o->main, MAIN, page);
    else
        push_back(p, PROBATION, page);
}

static void touch(struct dmh_policy *p, uint32_t page) { (void)p, (void)page; }

static void unlist(struct dmh_policy *p, uint32_t page)
{
    if (p->entry[page].list == MAIN)
        pool_take_out(p, &own(p)->main, page);
    else
        take_out(p, page);
    own(p)->is_full &= p->known >= p->limit / 2;
}

static void choose(struct dmh_policy *p, struct choice *c)
{
    struct own *o = own(p);
    while (c->evict_n < c->evict_most && p->list[PROBATION].count + o->main.count) {
        int probation = p->list[PROBATION].count > o->target || !o->main.count;
        uint32_t page = probation ? p->list[PROBATION].front - 1 : coldest_of(p, &o->main, (int)p->tuning[SAMPLE]);
        struct entry *e = &p->entry[page];
        unlist(p, page);
        e->flags = (uint8_t)(probation ? e->flags & ~FROM_MAIN : e->flags | FROM_MAIN);
        o->clock += (uint32_t)(o->clock + 1) ? 1 : 2; /* 0 stands for never */
        e->stamp = (uint32_t)o->clock;
        o->is_full = 1;
        choose_page(c, page);
    }
}

static const char *validate(struct dmh_policy *p)
{
    const char *wrong = count_list(p, PROBATION);
    wrong = wrong ? wrong : check_pool(p, &own(p)->main, MAIN);
    if (!wrong && p->list[PROBATION].count + own(p)->main.count + p->list[AHEAD].count != p->known)
        wrong = "a page is neither on probation nor in main";
    return wrong;
}

const struct operations policy_pgr = {
    .name = "pgr", .own_bytes = sizeof(struct own), .start = start, .end = end, .arrive = arrive, .touch = touch,
    .unlist = unlist, .choose = choose, .validate = validate,
};
