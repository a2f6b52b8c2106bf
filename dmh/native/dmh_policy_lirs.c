/* LIRS: dmh/evict/policies/lirs.py has the algorithm. */
#include "policy.h"

#define LIR FIRST_OWN           /* low inter-reference recency: in the stack only, so this list has a count and no links */
#define HIR (FIRST_OWN + 1)     /* the queue: resident, high recency; in the stack too where IN_STACK */
#define GHOST FIRST_GHOST       /* in the stack, not local; in the order in which they left */
#define IN_STACK OWN_1

struct own {
    struct list stack;          /* second links; front is the bottom, which is always a LIR page */
    uint32_t lir_size, ghost_size;
};

static struct own *own(struct dmh_policy *p) { return p->own; }

static void start(struct dmh_policy *p)
{
    uint32_t hir = (uint32_t)(p->limit * p->tuning[0]);
    own(p)->lir_size = p->limit > 1 ? p->limit - (hir ? hir : 1) : 1;
    own(p)->ghost_size = (uint32_t)(p->limit * p->tuning[1]);
}

static void unstack(struct dmh_policy *p, uint32_t page)
{
    if (p->entry[page].flags & IN_STACK)
        second_take_out(p, &own(p)->stack, page);
    p->entry[page].flags &= (uint8_t)~IN_STACK;
}

static void to_top(struct dmh_policy *p, uint32_t page)
{
    unstack(p, page);
    second_push_back(p, &own(p)->stack, page);
    p->entry[page].flags |= IN_STACK;
}

/* Whatever lies below the lowest LIR page has a recency that is of no use. */
static void prune(struct dmh_policy *p)
{
    for (uint32_t at; (at = own(p)->stack.front) && p->entry[at - 1].list != LIR;) {
        unstack(p, at - 1);
        if (p->entry[at - 1].list == GHOST)
            take_out(p, at - 1);
    }
}

static void become_lir(struct dmh_policy *p, uint32_t page)
{
    p->entry[page].list = LIR;
    p->list[LIR].count++;
    p->known++;
    to_top(p, page);
}

static void unlist(struct dmh_policy *p, uint32_t page)
{
    if (p->entry[page].list == LIR) {
        p->entry[page].list = OUT;
        p->list[LIR].count--;
        p->known--;
    } else {
        take_out(p, page);
    }
    unstack(p, page);
    prune(p);
}

/* The LIR page at the bottom of the stack is on its way out: to the queue's end. */
static void demote(struct dmh_policy *p)
{
    uint32_t page = own(p)->stack.front - 1;
    unlist(p, page);
    push_back(p, HIR, page);
    queue_mark(p, page);
}

static int too_many_lir(struct dmh_policy *p) { return p->list[LIR].count > own(p)->lir_size; }

static int lir_is_next(struct dmh_policy *p) { return too_many_lir(p) || !p->list[HIR].count; }

static void settle(struct dmh_policy *p)
{
    /* With marks, the one at the bottom must be asked about first: `choose` does that. */
    while (!p->accessed && too_many_lir(p))
        demote(p);
}

static void arrive(struct dmh_policy *p, uint32_t page, uint32_t kind)
{
    struct entry *e = &p->entry[page];
    int again = e->flags & IN_STACK && kind != DMH_EV_KEPT;
    if (e->list == GHOST)
        take_out(p, page);
    if (again || (kind != DMH_EV_KEPT && p->list[LIR].count < own(p)->lir_size)) {
        become_lir(p, page);
        prune(p); /* it may have been the bottom's neighbour */
    } else {
        push_back(p, HIR, page);
        if (kind != DMH_EV_KEPT)
            to_top(p, page);
        prune(p);
    }
    queue_mark(p, page);
    settle(p);
}

static void touch(struct dmh_policy *p, uint32_t page)
{
    struct entry *e = &p->entry[page];
    if (e->list == LIR) {
        to_top(p, page);
    } else {
        int again = e->flags & IN_STACK;
        take_out(p, page);
        if (again) {
            become_lir(p, page);
        } else {
            to_top(p, page);
            push_back(p, HIR, page);
        }
    }
    prune(p);
    settle(p);
}

static uint64_t look(struct dmh_policy *p, uint64_t *out, uint64_t most)
{
    if (!lir_is_next(p))
        return look_at_front(p, HIR, out, most);
    uint64_t n = 0, steps = 4 * most;
    for (uint32_t at = own(p)->stack.front; at && n < most && steps; at = p->second[at - 1].next, steps--)
        if (p->entry[at - 1].list == LIR && p->entry[at - 1].flags & MARKED)
            out[n++] = at - 1;
    return n;
}

static void evict_page(struct dmh_policy *p, struct choice *c, uint32_t page)
{
    struct entry *e = &p->entry[page];
    take_out(p, page);
    e->flags &= (uint8_t)~ABOUT_MARKS;
    if (e->flags & IN_STACK) {
        push_back(p, GHOST, page);
        if (p->list[GHOST].count > own(p)->ghost_size) {
            uint32_t oldest = p->list[GHOST].front - 1;
            take_out(p, oldest);
            unstack(p, oldest);
        }
    }
    choose_page(c, page);
}

static void choose(struct dmh_policy *p, struct choice *c)
{
    while (c->evict_n < c->evict_most && p->list[LIR].count + p->list[HIR].count) {
        int lir = lir_is_next(p);
        uint32_t page = lir ? own(p)->stack.front - 1 : p->list[HIR].front - 1;
        switch (seen(p, &p->entry[page])) {
        case NOT_YET_ASKED:
            return;
        case IN_USE:
            queue_mark(p, page);
            touch(p, page);
            break;
        default:
            if (lir)
                demote(p);
            else
                evict_page(p, c, page);
        }
    }
}

static const char *validate(struct dmh_policy *p)
{
    struct own *o = own(p);
    uint32_t lir = 0, n = 0;
    for (uint32_t at = o->stack.front; at; at = p->second[at - 1].next) {
        if (!(p->entry[at - 1].flags & IN_STACK) || p->entry[at - 1].list == OUT || n++ > p->pages)
            return "the stack holds a page that is in no list";
        lir += p->entry[at - 1].list == LIR;
    }
    if (n != o->stack.count || lir != p->list[LIR].count)
        return "a LIR page is not in the stack, or the stack's count is wrong";
    if (o->stack.front && p->entry[o->stack.front - 1].list != LIR)
        return "the stack's bottom is not a LIR page";
    if (p->list[GHOST].count > o->ghost_size + 1 + p->ahead_cap)
        return "too many ghosts";
    const char *wrong = count_list(p, HIR);
    wrong = wrong ? wrong : count_list(p, GHOST);
    return wrong ? wrong
         : p->list[LIR].count + p->list[HIR].count + p->list[AHEAD].count == p->known ? NULL
                                                                                         : "a page is in no list";
}

const struct operations policy_lirs = {
    .name = "lirs", .own_bytes = sizeof(struct own), .second_links = 1, .start = start, .arrive = arrive, .touch = touch,
    .unlist = unlist, .look = look, .choose = choose, .validate = validate,
};
