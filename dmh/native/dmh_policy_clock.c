/* CLOCK: dmh/evict/policies/clock.py has the algorithm. */
#include "policy.h"

#define CIRCLE FIRST_OWN        /* its front is under the hand */

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    (void)kind;
    p->entry[page].uses = 0;
    push_back(p, CIRCLE, page);
    queue_mark(p, page);
}

static void touch(struct dmh_policy *p, uint32_t page) { p->entry[page].uses = 1; }

static uint64_t look(struct dmh_policy *p, uint64_t *out, uint64_t most) { return look_at_front(p, CIRCLE, out, most); }

static void choose(struct dmh_policy *p, struct choice *c)
{
    while (p->list[CIRCLE].count && c->evict_n < c->evict_most) {
        uint32_t page = p->list[CIRCLE].front - 1;
        struct entry *e = &p->entry[page];
        enum seen use = seen(p, e);
        if (use == NOT_YET_ASKED)
            return;
        take_out(p, page);
        if (use == IN_USE || e->uses) {
            arrive(p, page, DMH_EV_FAULT); /* a second chance */
        } else {
            e->flags &= (uint8_t)~ABOUT_MARKS;
            choose_page(c, page);
        }
    }
}

static const char *validate(struct dmh_policy *p)
{
    return p->list[CIRCLE].count + p->list[AHEAD].count == p->known ? count_list(p, CIRCLE) : "a page is not in the circle";
}

const struct operations policy_clock = {
    .name = "clock", .arrive = arrive, .touch = touch, .unlist = take_out, .look = look, .choose = choose,
    .validate = validate,
};
