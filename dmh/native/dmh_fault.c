/* A resolver's part of a fault: claim pages, and install what was fetched for them. */
#include "internal.h"

#include <signal.h>

/*
 * Step 3: ring LPET if what is local has reached the high threshold.  `granted` pages of it are this fault's own, not yet here.  A page that comes
 * back from the victim buffer is local already, and does not ring.
 */
void ring_at_high(struct dmh_ctx *c, uint64_t page, uint64_t granted)
{
    uint64_t local = LOAD(&c->s->resident) + LOAD(&c->s->staged), none = 0;
    if (local <= c->s->high || word_state(LOAD(&c->words[page])) == DMH_STAGED)
        return;
    if (!CAS(&c->s->rung_at, &none, local - granted > c->s->high ? local - granted : c->s->high))
        return; /* rung already: LPET looks at what is local when it ends its run, which clears rung_at */
    STORE(&c->s->rung_ns, now_ns());
    count(c, DMH_C_RINGS, 1);
    dmh_ring_bell(c->s);
}

static void add(struct dmh_plan *p, uint64_t page, uint64_t word, uint8_t kind)
{
    p->page[p->n] = page;
    p->word[p->n] = word;
    p->kind[p->n++] = kind;
    if (kind == DMH_STORED || kind == DMH_POISONED)
        p->stored[p->stored_n++] = page;
}

/* Claim one page that has no memory: FETCHING.  0: somebody else has it, or it needs nothing. */
static int claim_one(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, int demand)
{
    uint64_t w = LOAD(&c->words[page]);
    for (;;) {
        uint32_t state = word_state(w);
        if (state != DMH_NEW && state != DMH_STORED && state != DMH_STAGED)
            return 0;
        if (state == DMH_STAGED && !demand)
            return 0; /* already local; it is taken back when it is touched */
        int32_t slot = word_slot(w);
        /* On failure w is the word found: the evictor may have moved the page from STAGED to STORED meanwhile. */
        if (move_word(c, page, &w, DMH_FETCHING, c->worker, slot)) {
            add(p, page, w, (uint8_t)state);
            return 1;
        }
    }
}

/* Claim a page in exactly this state, room included.  0: it changed, or there is no room. */
int claim_word(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, uint64_t word)
{
    uint32_t state = word_state(word);
    enter(c);
    if (!dmh_reserve(c->s, 1)) {
        leave(c);
        return 0;
    }
    AT(c, DMH_AT_RESERVED);
    ring_at_high(c, page, 1);
    if (!move_word(c, page, &word, DMH_FETCHING, c->worker, word_slot(word))) {
        dmh_release(c->s, 1);
        leave(c);
        return 0;
    }
    leave(c);
    AT(c, DMH_AT_CLAIMED);
    p->n = p->stored_n = p->lost_n = p->room_wanted = 0;
    p->demand = 1;
    add(p, page, word, (uint8_t)state);
    return 1;
}

/* No UFFDIO_POISON here: better the whole process than one wrong byte. */
static void end_faulting_process(struct dmh_ctx *c, const struct dmh_plan *p)
{
    pthread_rwlock_rdlock(&c->lock);
    struct view *v = find_view(c, p->view);
    if (v && !v->own)
        kill(v->pid ? v->pid : (int)p->thread, SIGBUS); /* 0: a forked child; its threads know it */
    pthread_rwlock_unlock(&c->lock);
}

/* A fault on a page that is not to be claimed: wake, or raise what must be raised.  The caller has entered. */
static void answer_unclaimed(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page)
{
    uint64_t w = LOAD(&c->words[page]);
    if (word_state(w) == DMH_POISONED) {
        /* A program that joined later does not have the mark yet.  Claimed meanwhile: it must not be healed while it is being marked. */
        if (move_word(c, page, &w, DMH_FETCHING, c->worker, -1) && poison(c, page, w, word_from_store(w)) < 0)
            end_faulting_process(c, p);
    } else if (word_state(w) == DMH_EVICTING) {
        if (!leave_to_evictor(c, page, w))
            dmh_wake_pages(c, page, 1);
    } else if (word_state(w) == DMH_RESIDENT) {
        if (!page_is_present(c, page << c->s->page_shift, c->s->page_size) && LOAD(&c->words[page]) == w) {
            /* Only madvise(MADV_REMOVE) or fallocate from outside dmh can do this: its content is gone. */
            int r = poison(c, page, w, 0);
            if (r != -ESTALE) {
                if (r < 0)
                    end_faulting_process(c, p);
                dmh_release(c->s, 1);
                count(c, DMH_C_POISONED, 1);
                p->lost[p->lost_n] = page;
                p->lost_why[p->lost_n++] = DMH_LOST_MISSING;
            }
        } else {
            dmh_wake_pages(c, page, 1);
        }
    }
}

static int claim(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, int demand, int64_t stride, uint32_t window)
{
    struct dmh_shared *s = c->s;
    p->n = p->stored_n = p->demand = p->lost_n = p->room_wanted = p->looked = p->expected_n = 0;
    if (page >= s->pages)
        return -EINVAL;
    if (window >= DMH_MAX_RUN)
        window = DMH_MAX_RUN - 1;
    uint64_t granted = demand ? dmh_reserve(s, window + 1) : reserve_but(s, window, kept_from_windows(s));
    AT(c, DMH_AT_RESERVED);
    ring_at_high(c, page, granted);
    if (!granted) {
        p->room_wanted = 1;
        return 0;
    }
    if (demand) {
        if (!claim_one(c, p, page, 1)) {
            dmh_release(s, granted);
            answer_unclaimed(c, p, page);
            return 0;
        }
        p->demand = 1;
    }
    int64_t next = (int64_t)page + (demand ? stride : 0);
    for (; p->looked < window && p->n < granted; p->looked++, next += stride) {
        if (next < 0 || (uint64_t)next >= s->pages) {
            p->looked = window;
            break;
        }
        if (!claim_one(c, p, (uint64_t)next, 0) && word_state(LOAD(&c->words[next])) == DMH_RESIDENT)
            p->expected[p->expected_n++] = (uint64_t)next;
    }
    if (p->n < granted)
        dmh_release(s, granted - p->n);
    return (int)p->n;
}

/*
 * Claim the demand page and up to `window` pages after it, `stride` apart (demand 0: only the window, `page` being its first).
 * Returns the number of pages claimed.  room_wanted is set when nothing was claimed because the memory limit is reached: wait, ask again.
 */
int dmh_claim(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, int demand, int64_t stride, uint32_t window)
{
    enter(c);
    int n = claim(c, p, page, demand, stride, window);
    leave(c);
    if (n > 0)
        AT(c, DMH_AT_CLAIMED);
    if (p->expected_n) /* or they would leave just before the scan comes to them */
        note_arrivals(c, p->expected, p->expected_n, DMH_EV_EXPECTED, DMH_EV_EXPECTED, p);
    return n;
}

static int claimed_slot(const struct dmh_plan *p, uint32_t i) { return word_slot(p->word[i]); }

/* How many claimed pages from i can go in one call: neighbours, of one kind, with neighbouring sources. */
static uint32_t run_from(const struct dmh_plan *p, uint32_t i, uint32_t chunk)
{
    uint32_t k = 1;
    while (i + k < p->n && k < chunk && p->page[i + k] == p->page[i] + k && p->kind[i + k] == p->kind[i] &&
           (p->kind[i] != DMH_STAGED || claimed_slot(p, i + k) == claimed_slot(p, i) + (int)k))
        k++;
    return k;
}

/* Give up the claim of page i: it is again what it was. */
static void give_back_one(struct dmh_ctx *c, struct dmh_plan *p, uint32_t i)
{
    uint64_t w = p->word[i];
    enter(c);
    if (!move_word(c, p->page[i], &w, p->kind[i], 0, claimed_slot(p, i)))
        dmh_die("page %llu: a claim was changed by somebody else", (unsigned long long)p->page[i]);
    dmh_release(c->s, 1);
    leave(c);
    dmh_wake_pages(c, p->page[i], 1);
}

/* Give up all claims but the first `keep` (0, or 1: the demand page). */
void dmh_give_back(struct dmh_ctx *c, struct dmh_plan *p, uint32_t keep)
{
    for (uint32_t i = keep; i < p->n; i++)
        give_back_one(c, p, i);
    p->n = keep < p->n ? keep : p->n;
    p->stored_n = p->n && p->kind[0] == DMH_STORED;
}

static void lose(struct dmh_ctx *c, struct dmh_plan *p, uint32_t i, uint8_t why)
{
    if (p->lost_n < 8) {
        p->lost[p->lost_n] = p->page[i];
        p->lost_why[p->lost_n++] = why;
    }
    enter(c);
    int r = poison(c, p->page[i], p->word[i], why == DMH_LOST_AWAY);
    dmh_release(c->s, 1);
    leave(c);
    count(c, why == DMH_LOST_AWAY ? DMH_C_WITHHELD : DMH_C_POISONED, 1);
    if (r < 0)
        end_faulting_process(c, p);
}

/* Say on standard error which pages an installation has lost, where Python is not there to do it. */
void report_lost(const struct dmh_plan *p)
{
    for (uint32_t i = 0; i < p->lost_n; i++)
        fprintf(stderr, "dmh[%d]: page %llu is lost: %s; access to it raises SIGBUS\n", (int)getpid(), (unsigned long long)p->lost[i],
                p->lost_why[i] == DMH_LOST_MISSING ? "the store does not have it any more" : "its bytes are not the ones that were stored");
}

/*
 * RESIDENT, for a run whose content is in place; whoever waited on another view is woken after that.  quiet: the quiet period that lasted before it was
 * in place.  What comes from a slot keeps what was noted of it: where nobody can write, moving changes nothing.
 */
static void publish(struct dmh_ctx *c, struct dmh_plan *p, uint32_t i, uint32_t k, struct view *through, uint32_t quiet)
{
    AT(c, DMH_AT_COPIED);
    enter(c);
    for (uint32_t j = i; j < i + k; j++) {
        uint64_t w = p->word[j];
        int32_t slot = word_slot(w);
        if (p->kind[j] != DMH_STAGED)
            STORE(&c->calm[p->page[j]], quiet);
        if (!move_word(c, p->page[j], &w, DMH_RESIDENT, 0, -1))
            dmh_die("page %llu: a claim was changed by somebody else", (unsigned long long)p->page[j]);
        AT(c, DMH_AT_PUBLISHED);
        if (slot >= 0)
            dmh_free_slot(c, (uint32_t)slot);
    }
    leave(c);
    wake_others(c, through, p->page[i], k);
    int demand = p->demand && i == 0;
    uint32_t first = p->kind[i] == DMH_STAGED ? DMH_EV_SOFT : p->kind[i] == DMH_NEW ? DMH_EV_NEW : DMH_EV_FAULT;
    note_arrivals(c, p->page + i, k, demand ? first : DMH_EV_PREFETCH, DMH_EV_PREFETCH, p);
    if (demand) {
        count(c, DMH_C_FAULTS, 1);
        count(c, p->kind[i] == DMH_NEW ? DMH_C_ZERO : p->kind[i] == DMH_STAGED ? DMH_C_SOFT : DMH_C_HARD, 1);
        note_latency(c, p->ns);
    }
    uint32_t ahead = k - (demand ? 1 : 0);
    if (p->kind[i] == DMH_POISONED) {
        count(c, DMH_C_HEALED, k);
    } else if (ahead) {
        count(c, DMH_C_PREFETCHED, ahead);
        if (p->kind[i] == DMH_NEW)
            count(c, DMH_C_PREFETCHED_NEW, ahead);
    }
}

#define SCATTERED_WAKES 16

static void wake_span(struct dmh_ctx *c, struct view *v, uint64_t one, uint64_t other)
{
    uint64_t first = one < other ? one : other, last = one < other ? other : one;
    wake_view(v, first << c->s->page_shift, (last - first + 1) << c->s->page_shift);
}

/*
 * Check and install every claimed page: zeros for new ones, the slot's content for staged ones, the buffer's rows for fetched
 * ones (found[] says which rows are filled).  At most `chunk` pages in one call, so that the faulting thread starts early.
 * Missing or altered pages are poisoned and listed in lost[]; of those that the DMS did not answer for, only the one that somebody waits for.
 */
int dmh_install(struct dmh_ctx *c, struct dmh_plan *p, const uint8_t *buffer, uint32_t chunk)
{
    const uint64_t size = c->s->page_size;
    /* Before any page is there to be written to: a period that has begun since says nothing of what was done to it before. */
    const uint32_t quiet = LOAD(&c->s->quiet);
    uint32_t row = 0, held = 0, since = 0; /* pages installed since somebody was last woken; the first of them */
    for (uint32_t i = 0, k; i < p->n; i += k) {
        k = run_from(p, i, i == 0 && p->n > 8 ? 8 : chunk);
        const uint8_t *from = NULL;
        if (p->kind[i] == DMH_STAGED) {
            from = c->slots_base + (uint64_t)claimed_slot(p, i) * size;
        } else if (p->kind[i] == DMH_STORED || p->kind[i] == DMH_POISONED) {
            uint32_t good = 0;
            for (; good < k; good++)
                if (p->found[row + good] != 1 || dmh_hash(buffer + (row + good) * size, size) != LOAD(&c->sums[p->page[i + good]]))
                    break;
            if (!good && p->found[row] == DMH_LOST_AWAY && !(p->demand && i == 0)) {
                give_back_one(c, p, i); /* nobody is known to need it; who does faults for it */
                k = 1, row++;
                continue;
            }
            if (!good) {
                lose(c, p, i, p->found[row] == DMH_LOST_AWAY ? DMH_LOST_AWAY : p->found[row] ? DMH_LOST_ALTERED : DMH_LOST_MISSING);
                k = 1, row++;
                continue;
            }
            k = good;
            from = buffer + row * size;
            row += k;
            count(c, DMH_C_FETCHED_BYTES, k * size);
        }
        uint64_t offset = p->page[i] * size;
        pthread_rwlock_rdlock(&c->lock);
        struct view *v = find_view(c, p->view), *own = own_view(c);
        if (!v)
            v = own;
        if (__builtin_expect(c->s->park == DMH_AT_COPIED_PARTLY + 1, 0) && size > DMH_KERNEL_PAGE) {
            fill(c, v, offset, DMH_KERNEL_PAGE, from, 1);
            AT(c, DMH_AT_COPIED_PARTLY);
        }
        /*
         * Of a window of scattered pages each is a call of its own.  Whoever waits for one of them is woken when several are there: woken at once
         * he would catch up with us at the next, and the next.
         */
        c->holds_wakes = from && !p->demand && k == 1 && i + 1 < p->n && held < SCATTERED_WAKES;
        since = held ? since : i;
        enum verdict r = fill(c, v, offset, k * size, from, 0);
        if (r == V_GONE && v != own) {
            /* The process that faulted is gone, but others may wait for the same page. */
            v = own;
            r = fill(c, v, offset, k * size, from, 0);
        }
        for (uint32_t j = i; j < i + k && r == V_DONE; j++)
            if (word_marked(p->word[j]))
                unmark(c, p->page[j]);
        if (r == V_DONE)
            publish(c, p, i, k, v, quiet);
        if (held && !c->holds_wakes)
            wake_span(c, v, p->page[since], p->page[i]);
        held = c->holds_wakes ? held + 1 : 0;
        c->holds_wakes = 0;
        pthread_rwlock_unlock(&c->lock);
        if (r != V_DONE)
            dmh_die("no memory for %u pages at page %llu although the limit allows them: lower memory.limit", k,
                    (unsigned long long)p->page[i]);
    }
    if (held) {
        /* What came after them was given back or lost. */
        pthread_rwlock_rdlock(&c->lock);
        for (uint32_t i = 0; i < c->nviews; i++)
            wake_span(c, &c->views[i], p->page[since], p->page[p->n - 1]);
        pthread_rwlock_unlock(&c->lock);
    }
    return (int)p->lost_n;
}

/* Resolver: fetch over this connection what the page file does not have; what is not as it should be, Python asks again, and tells of it. */
void dmh_ctx_remote(struct dmh_ctx *c, struct dmh_redis *remote) { c->remote = remote; }

static int has_store(const struct dmh_ctx *c) { return c->inline_on && (c->store_fd >= 0 || (c->remote && c->remote->fd >= 0)); }

/* The pages that were claimed of the DMS, to the rows of `to`.  Not 0: Python is needed, for this and for what it means. */
static int fetch_natively(struct dmh_ctx *c, struct dmh_plan *p, uint8_t *to)
{
    uint64_t length[DMH_MAX_RUN];
    if (c->store_fd >= 0) {
        int e = dmh_fetch_pages(c->store_fd, c->store_index, p->stored, p->stored_n, c->s->page_size, to, p->found, 0);
        if (e < 0)
            return e;
    } else if (dmh_redis_get(c->remote, p->stored, p->stored_n, to, p->found, length)) {
        c->remote->fd = -1;
        c->remote->broken = 1;
        return -EIO;
    }
    count(c, DMH_C_FETCH_CALLS, 1);
    AT(c, DMH_AT_FETCHED);
    for (uint32_t i = 0; i < p->stored_n; i++)
        if (p->found[i] != 1)
            return -ENODATA;
    return 0;
}

/*
 * Resolver: the page of a fault, from a store that native code can ask.  1: done.  0: Python is needed: nothing is claimed.
 */
int bring_stored(struct dmh_ctx *c, const struct dmh_request *r)
{
    struct dmh_plan *p = c->plan;
    if (!has_store(c))
        return 0;
    p->view = r->view, p->thread = r->thread, p->ns = r->ns;
    if (dmh_claim(c, p, r->page, 1, r->stride, 0) < 0 || p->room_wanted)
        return 0;
    if (p->stored_n && fetch_natively(c, p, c->page_buffer)) {
        dmh_give_back(c, p, 0);
        return 0;
    }
    ADD(&c->s->completed[c->worker], 1); /* what is left does not block: the next request may come here */
    if (p->n)
        dmh_install(c, p, c->page_buffer, 1);
    report_lost(p);
    return 1;
}

/*
 * Resolver: bring a window in from a store that native code can ask.  1: done, as far as there was room.  0: the store failed, and *r says what is
 * left: Python tries again, and says so.
 */
int bring_ahead(struct dmh_ctx *c, struct dmh_request *r)
{
    struct dmh_plan *p = c->plan;
    const uint64_t size = c->s->page_size, bytes = r->window * size;
    int waits = 0;
    if (!has_store(c))
        return 0;
    if (c->window_bytes < bytes) {
        free(c->window_buffer);
        c->window_buffer = aligned_alloc(DMH_KERNEL_PAGE, bytes);
        c->window_bytes = c->window_buffer ? bytes : 0;
    }
    if (!c->window_buffer)
        return 0;
    leave_lpet_alone(c, now_ns());
    while (r->window && !LOAD(&c->s->stop)) {
        p->view = r->view, p->thread = r->thread, p->ns = r->ns;
        int claimed = dmh_claim(c, p, r->page, 0, r->stride, r->window);
        if (claimed < 0)
            break;
        if (p->room_wanted) {
            /* No thread has faulted for a program's wish: it takes what room there is, and pushes nothing out for more. */
            if (!r->thread || waits++ == DMH_AHEAD_WAITS)
                break;
            dmh_wait_room(c, 1, DMH_AHEAD_MS);
            continue;
        }
        if (p->stored_n && (!has_store(c) || fetch_natively(c, p, c->window_buffer))) {
            dmh_give_back(c, p, 0);
            return 0;
        }
        dmh_install(c, p, c->window_buffer, DMH_CHUNK > size ? (uint32_t)(DMH_CHUNK / size) : 1);
        report_lost(p);
        r->page += (uint64_t)(r->stride * (int64_t)p->looked);
        r->window -= p->looked;
    }
    ADD(&c->s->completed[c->worker], 1);
    return 1;
}
