/* A page at random: dmh/evict/policies/random.py. */
#include "policy.h"

#define ANY FIRST_OWN

static struct pool *pool(struct dmh_policy *p) { return p->own; }

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    (void)kind;
    pool_add(p, pool(p), ANY, page);
}

static void touch(struct dmh_policy *p, uint32_t page) { (void)p, (void)page; }
static void unlist(struct dmh_policy *p, uint32_t page) { pool_take_out(p, pool(p), page); }
static void end(struct dmh_policy *p) { free(pool(p)->at); }

static void choose(struct dmh_policy *p, struct choice *c)
{
    while (pool(p)->count && c->evict_n < c->evict_most) {
        uint32_t page = pool(p)->at[draw(p, pool(p)->count)];
        unlist(p, page);
        choose_page(c, page);
    }
}

static const char *validate(struct dmh_policy *p)
{
    return pool(p)->count + p->list[AHEAD].count == p->known ? check_pool(p, pool(p), ANY) : "a page is not in the pool";
}

const struct operations policy_random = {
    .name = "random", .own_bytes = sizeof(struct pool), .end = end, .arrive = arrive, .touch = touch, .unlist = unlist,
    .choose = choose, .validate = validate,
};
