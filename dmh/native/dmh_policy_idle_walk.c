/* The reference's cyclic walk: dmh/evict/policies/idle_walk.py has the algorithm. */
#include "policy.h"

#define CIRCLE FIRST_OWN        /* its front is under the hand; going on moves the front to the back */

struct own {
    struct list marked;         /* second links: the MARKED pages, those marked longest ago first */
};

static struct list *marked(struct dmh_policy *p) { return &((struct own *)p->own)->marked; }

static void set_mark(struct dmh_policy *p, uint32_t page)
{
    p->entry[page].flags |= MARKED | OWN_1;
    second_push_back(p, marked(p), page);
}

/* OWN_1: the page is among the marked. */
static void clear_mark(struct dmh_policy *p, uint32_t page)
{
    if (p->entry[page].flags & OWN_1)
        second_take_out(p, marked(p), page);
    p->entry[page].flags &= (uint8_t)~(ABOUT_MARKS | OWN_1);
}

static void unlist(struct dmh_policy *p, uint32_t page)
{
    clear_mark(p, page);
    take_out(p, page);
}

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    (void)kind;
    push_back(p, CIRCLE, page);
}

static void choose_oldest_marked(struct dmh_policy *p, struct choice *c)
{
    while (marked(p)->count && c->evict_n < c->evict_most) {
        uint32_t page = marked(p)->front - 1;
        unlist(p, page);
        choose_page(c, page);
    }
}

static uint64_t look(struct dmh_policy *p, uint64_t *out, uint64_t most) { return look_at_front(p, CIRCLE, out, most); }

static void choose(struct dmh_policy *p, struct choice *c)
{
    for (uint64_t steps = 2ull * p->list[CIRCLE].count; steps && p->list[CIRCLE].count; steps--) {
        uint32_t page = p->list[CIRCLE].front - 1;
        struct entry *e = &p->entry[page];
        if (e->flags & MARKED) {
            if (c->evict_n == c->evict_most || c->mark_n)
                break; /* marks of this round must be made before they can be looked at */
            enum seen use = seen(p, e);
            if (use == NOT_YET_ASKED)
                return;
            unlist(p, page);
            if (use == IDLE)
                choose_page(c, page);
            else
                push_back(p, CIRCLE, page); /* used since: to be marked again when the hand comes round */
            continue;
        }
        if (c->evict_n || c->mark_n == c->mark_most)
            break;
        take_out(p, page);
        push_back(p, CIRCLE, page);
        set_mark(p, page);
        c->mark[c->mark_n++] = page;
    }
    if (!c->evict_n && !c->mark_n)
        choose_oldest_marked(p, c); /* no more can be marked: the pages marked longest ago have had their chance */
}

static const char *validate(struct dmh_policy *p)
{
    uint32_t n = 0;
    for (uint32_t at = marked(p)->front; at; at = p->second[at - 1].next)
        if (!(p->entry[at - 1].flags & MARKED) || n++ > p->pages)
            return "a page counts as marked and is not";
    if (n != marked(p)->count)
        return "the count of marked pages is wrong";
    for (uint32_t at = p->list[CIRCLE].front; at; at = p->entry[at - 1].next)
        n -= p->entry[at - 1].flags & MARKED;
    if (n)
        return "a marked page is not among the marked";
    return p->list[CIRCLE].count == p->known ? count_list(p, CIRCLE) : "a page is not in the circle";
}

const struct operations policy_idle_walk = {
    .name = "idle-walk", .own_bytes = sizeof(struct own), .second_links = 1, .plain_ahead = 1,
    .arrive = arrive, .touch = clear_mark, .unlist = unlist, .unmark = clear_mark,
    .look = look, .choose = choose, .validate = validate,
};
