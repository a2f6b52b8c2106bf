/*
 * What the eviction policies share: a page's entry, lists of pages, the table of operations.  Not seen by cffi.
 *
 * A policy decides and does nothing else: no system call, no clock, no shared memory.  dmh_policy.c owns the events'
 * meaning that all have in common and the list of pages read ahead; each dmh_policy_<name>.c is one algorithm, stated
 * in dmh/evict/policies/<name>.py.
 */
#ifndef DMH_POLICY_H
#define DMH_POLICY_H

#include "internal.h"

#define NONE 0u                 /* links hold a page number plus one, so that zeroed memory is an empty policy */

struct entry {
    uint32_t next, prev;        /* within the list that the page is in; next is its place where the list is a pool */
    uint32_t stamp;             /* the policy's own: when the page was evicted last, mostly; 0: never */
    float heat;                 /* the policy's own */
    uint16_t uses;              /* the policy's own */
    uint8_t list;               /* which list the page is in; it is local unless that is OUT or a ghost list */
    uint8_t flags;
};

/* Lists: 0 and 1 are everybody's, the others are each policy's own. */
#define OUT 0
#define AHEAD 1                 /* read ahead, and not known to have been used: leaves first */
#define FIRST_OWN 2
#define FIRST_GHOST 10          /* from here on: pages that have left, remembered in the order in which they did */
#define MAX_LISTS 12

#define MARKED 1u               /* a use since the mark can be asked for */
#define SEEN_USED 2u            /* the answer to `look`, until `choose` has acted on it */
#define SEEN_IDLE 4u
#define QUEUED 8u               /* waits to be marked */
#define OWN_1 16u               /* the policy's own */
#define OWN_2 32u
#define WAS_GHOST 64u           /* a ghost that was read ahead: still one if it leaves without having been used */
#define ABOUT_MARKS (MARKED | SEEN_USED | SEEN_IDLE)

/* front: leaves next; back: came last */
struct list {
    uint32_t front, back, count;
};

/* Second links, for pages that stand in two orders at once. */
struct links {
    uint32_t next, prev;
};

/* Pages in no order, any of which can be drawn: e->next is a page's place in at[]. */
struct pool {
    uint32_t *at, count, room;
};

struct choice {
    uint64_t *evict, *mark;
    uint64_t evict_most, mark_most;
    uint64_t evict_n, mark_n;
};

struct operations {
    const char *name;
    size_t own_bytes;           /* of p->own */
    int second_links;
    int plain_ahead;            /* a page read ahead is a page like any other */
    void (*start)(struct dmh_policy *p);
    void (*end)(struct dmh_policy *p);
    /*
     * A page in no list came in by a touch (soft: from the victim buffer), was read ahead and is used (used), or was chosen and
     * stayed (kept).
     */
    void (*arrive)(struct dmh_policy *p, uint32_t page, uint32_t kind);
    void (*ahead)(struct dmh_policy *p, uint32_t page); /* it comes in ahead of use: may be NULL */
    /* A listed page was touched, as an event says: taken back from the victim buffer, or told twice. */
    void (*touch)(struct dmh_policy *p, uint32_t page);
    void (*unlist)(struct dmh_policy *p, uint32_t page);
    void (*unmark)(struct dmh_policy *p, uint32_t page); /* NULL where the flags are all there is to a mark */
    uint64_t (*look)(struct dmh_policy *p, uint64_t *out, uint64_t most);
    void (*choose)(struct dmh_policy *p, struct choice *c);
    const char *(*validate)(struct dmh_policy *p);
};

struct dmh_policy {
    const struct operations *op;
    struct entry *entry;        /* [pages] */
    struct links *second;       /* [pages], or NULL */
    uint32_t pages;
    uint32_t limit;             /* local pages to reckon with: the policy's M */
    uint32_t ahead_cap;
    uint32_t spared;            /* pages seen in use since the last eviction */
    uint32_t known;             /* sum of all lists' counts */
    int accessed;               /* uses are told by marks that cost next to nothing */
    uint64_t random;
    double tuning[8];
    struct list list[MAX_LISTS];
    uint32_t *queue;            /* ring of pages to be marked; QUEUED pages stand in it once */
    uint32_t queue_size, queue_head, queue_tail;
    uint64_t bytes;
    void *own;
};

extern const struct operations policy_fifo, policy_idle_walk, policy_random, policy_clock, policy_s3fifo, policy_lirs,
    policy_pgr, policy_duel;

static inline int is_local(const struct entry *e) { return e->list != OUT && e->list < FIRST_GHOST; }

/* xorshift64*: below n, which is not 0 */
static inline uint32_t draw(struct dmh_policy *p, uint32_t n)
{
    p->random ^= p->random >> 12;
    p->random ^= p->random << 25;
    p->random ^= p->random >> 27;
    return (uint32_t)(((p->random * 0x2545f4914f6cdd1dull >> 32) * n) >> 32);
}

static inline void push_back(struct dmh_policy *p, uint8_t which, uint32_t page)
{
    struct list *l = &p->list[which];
    struct entry *e = &p->entry[page];
    e->list = which;
    e->next = NONE;
    e->prev = l->back;
    if (l->back)
        p->entry[l->back - 1].next = page + 1;
    else
        l->front = page + 1;
    l->back = page + 1;
    l->count++;
    p->known += which < FIRST_GHOST;
}

static inline void take_out(struct dmh_policy *p, uint32_t page)
{
    struct entry *e = &p->entry[page];
    struct list *l = &p->list[e->list];
    if (e->prev)
        p->entry[e->prev - 1].next = e->next;
    else
        l->front = e->next;
    if (e->next)
        p->entry[e->next - 1].prev = e->prev;
    else
        l->back = e->prev;
    p->known -= e->list < FIRST_GHOST;
    e->next = e->prev = NONE;
    e->list = OUT;
    l->count--;
}

static inline void second_push_back(struct dmh_policy *p, struct list *l, uint32_t page)
{
    struct links *k = &p->second[page];
    k->next = NONE;
    k->prev = l->back;
    if (l->back)
        p->second[l->back - 1].next = page + 1;
    else
        l->front = page + 1;
    l->back = page + 1;
    l->count++;
}

static inline void second_take_out(struct dmh_policy *p, struct list *l, uint32_t page)
{
    struct links *k = &p->second[page];
    if (k->prev)
        p->second[k->prev - 1].next = k->next;
    else
        l->front = k->next;
    if (k->next)
        p->second[k->next - 1].prev = k->prev;
    else
        l->back = k->prev;
    k->next = k->prev = NONE;
    l->count--;
}

/* What the idle source says of a page at the front of a list; nothing is known of the use of an unmarked page. */
enum seen { UNKNOWN, NOT_YET_ASKED, IDLE, IN_USE };
#define MOST_SPARED 4096        /* where every page is always in use, one of them must go all the same */
static inline enum seen seen(struct dmh_policy *p, const struct entry *e)
{
    if (!(e->flags & MARKED))
        return UNKNOWN;
    if (e->flags & SEEN_USED)
        return p->spared++ < MOST_SPARED ? IN_USE : IDLE;
    return e->flags & SEEN_IDLE ? IDLE : NOT_YET_ASKED;
}

/* The marked pages at the front of a list, up to the first unmarked one. */
static inline uint64_t look_at_front(struct dmh_policy *p, uint8_t which, uint64_t *out, uint64_t most)
{
    uint64_t n = 0;
    for (uint32_t at = p->list[which].front; at && n < most && p->entry[at - 1].flags & MARKED; at = p->entry[at - 1].next)
        out[n++] = at - 1;
    return n;
}

uint32_t coldest_of(struct dmh_policy *p, const struct pool *in, int sample);
float fade_in(float heat, float now);
void pool_grow(struct dmh_policy *p, struct pool *in);
void pool_add(struct dmh_policy *p, struct pool *in, uint8_t which, uint32_t page);
void pool_take_out(struct dmh_policy *p, struct pool *in, uint32_t page);
const char *check_pool(struct dmh_policy *p, const struct pool *in, uint8_t which);

static inline void choose_page(struct choice *c, uint32_t page) { c->evict[c->evict_n++] = page; }

void queue_mark(struct dmh_policy *p, uint32_t page);
const char *count_list(struct dmh_policy *p, uint8_t which);

#endif
