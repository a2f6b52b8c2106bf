/* FIFO: dmh/evict/policies/fifo.py has the algorithm. */
#include "policy.h"

#define QUEUE FIRST_OWN

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    (void)kind;
    push_back(p, QUEUE, page);
}

static void touch(struct dmh_policy *p, uint32_t page)
{
    take_out(p, page);
    push_back(p, QUEUE, page);
}

static void choose(struct dmh_policy *p, struct choice *c)
{
    while (p->list[QUEUE].count && c->evict_n < c->evict_most) {
        choose_page(c, p->list[QUEUE].front - 1);
        take_out(p, p->list[QUEUE].front - 1);
    }
}

static const char *validate(struct dmh_policy *p)
{
    return p->list[QUEUE].count == p->known ? count_list(p, QUEUE) : "a page is not in the queue";
}

const struct operations policy_fifo = {
    .name = "fifo", .plain_ahead = 1, .arrive = arrive, .touch = touch, .unlist = take_out, .choose = choose,
    .validate = validate,
};
