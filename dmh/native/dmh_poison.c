/*
 * Pages that access to raises SIGBUS: giving a page its marks, and healing it.
 *
 * A mark stands in each program's page table (UFFDIO_POISON), so a page has as many as programs have it mapped, and they cannot be changed at one
 * stroke.  They are changed only under a claim whose word says that there may be marks; whoever comes after a worker that died in here marks the
 * page everywhere, or finishes healing it.
 */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#define FORK_TRIES 1000

/* The claim's word, which now says that mappings may carry marks. */
static int note_marks(struct dmh_ctx *c, uint64_t page, uint64_t *word)
{
    if (word_marked(*word))
        return 1;
    uint64_t n = *word + (1ull << DMH_GENERATION_SHIFT) + (1ull << DMH_MARKED_SHIFT);
    if (!CAS(&c->words[page], word, n))
        return 0;
    *word = n;
    return 1;
}

/*
 * Access to the page raises SIGBUS from now on, in every program.  The caller has entered and holds the claim `word`, or has found the page RESIDENT
 * without its memory.  away: the DMS has the content and only does not answer; the page is healed when it does.
 * -ESTALE: it was not RESIDENT any more.  Another error: a program could not be given its mark (a kernel without UFFDIO_POISON).
 */
int poison(struct dmh_ctx *c, uint64_t page, uint64_t word, int away)
{
    int r = 0;
    uint64_t offset = page << c->s->page_shift, bytes = c->s->page_size;
    if (word_state(word) == DMH_RESIDENT && !move_word(c, page, &word, DMH_EVICTING, c->worker, -1))
        return -ESTALE;
    if (!note_marks(c, page, &word))
        dmh_die("page %llu: a claim was changed by somebody else", (unsigned long long)page);
    punch(c, offset, bytes); /* what a page of several kernel pages may still have; a mark goes only where there is nothing */
    pthread_rwlock_rdlock(&c->lock);
    for (uint32_t i = 0; i < c->nviews; i++) {
        struct view *v = &c->views[i];
        for (uint64_t at = 0; at < bytes && !v->own; at += DMH_KERNEL_PAGE) {
            struct poison_request k = { .range = { v->base + offset + at, DMH_KERNEL_PAGE } };
            enum verdict verdict = ioctl(v->uffd, IOC_POISON, &k) < 0 ? uffd_verdict(errno) : V_DONE;
            if (verdict == V_BAD || verdict == V_NOMEM)
                r = -errno;
            /* V_RETRY: a fork is under way; whoever touches the page asks again, and is given the mark then. */
        }
        if (!v->own)
            AT(c, DMH_AT_MARKING);
    }
    uint64_t n = next_word(page, word, DMH_POISONED, 0, -1) | (uint64_t)away << DMH_FROM_STORE_SHIFT;
    if (!CAS(&c->words[page], &word, n))
        dmh_die("page %llu: a claim was changed by somebody else", (unsigned long long)page);
    if (away)
        STORE(&c->s->heal_due, 1u);
    wake_others(c, NULL, page, 1);
    pthread_rwlock_unlock(&c->lock);
    return r;
}

/*
 * The content of a claimed page that was poisoned is in the region's memory again: take the mark out of every mapping.  UFFDIO_CONTINUE maps what is
 * there in the mark's place, so that a program sees SIGBUS or the content and never anything else.  The caller holds the lock.
 */
void unmark(struct dmh_ctx *c, uint64_t page)
{
    uint64_t offset = page << c->s->page_shift;
    for (uint32_t i = 0; i < c->nviews; i++) {
        struct view *v = &c->views[i];
        for (uint64_t at = 0; at < c->s->page_size && !v->own; at += DMH_KERNEL_PAGE) {
            struct uffdio_continue k = { .range = { v->base + offset + at, DMH_KERNEL_PAGE } };
            /* A fork may be under way, and over when the monitor has read of it.  Where the mark stays SIGBUS goes on, which is safe. */
            for (int i = 0; i < FORK_TRIES && ioctl(v->uffd, UFFDIO_CONTINUE, &k) < 0 && uffd_verdict(errno) == V_RETRY; i++)
                usleep(100);
        }
        if (!v->own)
            AT(c, DMH_AT_HEALING);
    }
}

/* Pages that are POISONED only because the DMS did not answer; at most `max`, listed in out[]. */
uint64_t dmh_withheld(struct dmh_ctx *c, uint64_t *out, uint64_t max)
{
    uint64_t n = 0;
    for (uint64_t page = 0; page < c->s->pages && n < max; page++) {
        uint64_t w = LOAD(&c->words[page]);
        if (word_state(w) == DMH_POISONED && word_from_store(w))
            out[n++] = page;
    }
    return n;
}

/*
 * Evictor: the DMS has answered for a page that was withheld.  While it is POISONED nobody writes to it or to its copy in the DMS, so it is claimed
 * only now.  1: it can be used again.  0: not now, for want of room.  -EILSEQ: what the DMS says is not what was stored, and the page is lost.
 */
int dmh_heal(struct dmh_ctx *c, struct dmh_plan *p, uint64_t page, uint8_t found, const uint8_t *content)
{
    uint64_t w = LOAD(&c->words[page]);
    if (word_state(w) != DMH_POISONED || !word_from_store(w) || !claim_word(c, p, page, w))
        return 0;
    p->view = p->thread = 0;
    p->demand = 0;
    p->found[0] = found;
    return dmh_install(c, p, content, 1) ? -EILSEQ : 1;
}

/* Evictor, in a discard: a poisoned page becomes NEW.  0: not now, for want of room (a mark goes only where there is a page) or because it changed. */
int discard_poisoned(struct dmh_ctx *c, uint64_t page, uint64_t word)
{
    const uint64_t size = c->s->page_size;
    enter(c);
    if (!dmh_reserve(c->s, 1)) {
        leave(c);
        return 0;
    }
    int claimed = move_word(c, page, &word, DMH_FETCHING, c->worker, -1);
    if (claimed) {
        pthread_rwlock_rdlock(&c->lock);
        if (fill(c, own_view(c), page * size, size, NULL, 0) != V_DONE)
            dmh_die("no memory for page %llu although the limit allows it: lower memory.limit", (unsigned long long)page);
        unmark(c, page);
        pthread_rwlock_unlock(&c->lock);
        if (punch(c, page * size, size) < 0)
            dmh_die("punching a hole at page %llu failed: %s", (unsigned long long)page, strerror(errno));
        if (c->copies[page] != DMH_COPY_NONE)
            STORE(&c->copies[page], DMH_COPY_STALE);
        move_word(c, page, &word, DMH_NEW, 0, -1);
    }
    dmh_release(c->s, 1);
    leave(c);
    dmh_wake_pages(c, page, 1);
    return claimed;
}

/* After a death: a page in hand that may have marks.  The caller has frozen the table. */
void settle_marked(struct dmh_ctx *c, uint64_t page, uint64_t word)
{
    if (word_from_store(word) && page_is_present(c, page << c->s->page_shift, c->s->page_size)) {
        /* Healing had come so far that all of its content, verified, is there; the program may have written to it since. */
        pthread_rwlock_rdlock(&c->lock);
        unmark(c, page);
        pthread_rwlock_unlock(&c->lock);
        if (!move_word(c, page, &word, DMH_RESIDENT, 0, -1))
            dmh_die("page %llu changed while the table was being repaired", (unsigned long long)page);
    } else {
        /* No program has seen a byte of it since its first mark: mark it everywhere, and let it be healed if it can be. */
        poison(c, page, word, word_from_store(word));
    }
}
