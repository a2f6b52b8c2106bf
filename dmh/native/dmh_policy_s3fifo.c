/* S3-FIFO: dmh/evict/policies/s3fifo.py has the algorithm. */
#include "policy.h"

#define SMALL FIRST_OWN
#define MAIN (FIRST_OWN + 1)
#define GHOST FIRST_GHOST
#define MOST_USES 3

struct own {
    uint32_t small_size, main_size, ghost_size;
    int has_evicted;            /* until then, what finds small full goes to main */
};

static void start(struct dmh_policy *p)
{
    struct own *o = p->own;
    o->small_size = (uint32_t)(p->limit * p->tuning[0]);
    o->main_size = p->limit - o->small_size;
    o->ghost_size = (uint32_t)(p->limit * p->tuning[1]);
}

static void trim_ghosts(struct dmh_policy *p)
{
    while (p->list[GHOST].count > ((struct own *)p->own)->ghost_size)
        take_out(p, p->list[GHOST].front - 1);
}

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    struct entry *e = &p->entry[page];
    int ghost = e->list == GHOST || e->flags & WAS_GHOST;
    if (e->list == GHOST)
        take_out(p, page);
    trim_ghosts(p);
    e->uses = 0;
    struct own *o = p->own;
    int filling = !o->has_evicted && p->list[SMALL].count >= o->small_size;
    push_back(p, (ghost && kind != DMH_EV_KEPT) || filling || kind == DMH_EV_SOFT ? MAIN : SMALL, page);
    queue_mark(p, page);
}

static void touch(struct dmh_policy *p, uint32_t page) { p->entry[page].uses += p->entry[page].uses < MOST_USES; }

static int from_main(struct dmh_policy *p)
{
    return p->list[MAIN].count > ((struct own *)p->own)->main_size || !p->list[SMALL].count;
}

static uint64_t look(struct dmh_policy *p, uint64_t *out, uint64_t most)
{
    return look_at_front(p, from_main(p) ? MAIN : SMALL, out, most);
}

/* Evict one page of a queue, giving the used ones before it another turn in main.  0: not now. */
static int evict_one(struct dmh_policy *p, struct choice *c, uint8_t which)
{
    uint32_t enough = which == MAIN ? 1 : (uint32_t)p->tuning[2];
    while (p->list[which].count) {
        uint32_t page = p->list[which].front - 1;
        struct entry *e = &p->entry[page];
        enum seen use = seen(p, e);
        if (use == NOT_YET_ASKED)
            return 0;
        take_out(p, page);
        if (use == IN_USE || e->uses >= enough) {
            e->uses = which == MAIN && e->uses ? (uint16_t)(e->uses - 1) : 0;
            push_back(p, MAIN, page);
            queue_mark(p, page);
            continue;
        }
        e->flags &= (uint8_t)~ABOUT_MARKS;
        if (which == SMALL) {
            trim_ghosts(p);
            push_back(p, GHOST, page);
        }
        ((struct own *)p->own)->has_evicted = 1;
        choose_page(c, page);
        return 1;
    }
    return p->list[MAIN].count; /* all of small was in use, and is in main now */
}

static void choose(struct dmh_policy *p, struct choice *c)
{
    while (c->evict_n < c->evict_most && evict_one(p, c, from_main(p) ? MAIN : SMALL))
        ;
}

static const char *validate(struct dmh_policy *p)
{
    const char *wrong;
    for (uint8_t which = SMALL; which <= MAIN; which++)
        if ((wrong = count_list(p, which)))
            return wrong;
    if (p->list[GHOST].count > ((struct own *)p->own)->ghost_size + 1 + p->ahead_cap)
        return "too many ghosts";
    return (wrong = count_list(p, GHOST)) ? wrong
         : p->list[SMALL].count + p->list[MAIN].count + p->list[AHEAD].count == p->known ? NULL
                                                                                           : "a page is in neither queue";
}

const struct operations policy_s3fifo = {
    .name = "s3fifo", .own_bytes = sizeof(struct own), .start = start, .arrive = arrive, .touch = touch,
    .unlist = take_out, .look = look, .choose = choose, .validate = validate,
};
