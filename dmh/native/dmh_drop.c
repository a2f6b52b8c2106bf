/*
 * Pages that leave the region unseen, because nobody can have written to them: no copy, no hash, no write.
 *
 * A quiet period is one in which no program has a mapping that it can write through; the launcher begins and ends them (dmh/service/writers.py).
 * Who installs a page that the DMS has, verified, or a new one, notes the period that lasted before the page could be mapped anywhere
 * (dmh_install).  While that very period lasts the page is what the DMS has, or zeros, wherever it has been meanwhile: there is nobody who could
 * change it.  Numbers of periods are not used again, so nothing need be taken back when a program comes that can write.
 *
 * It comes in this order: the launcher ends the period; the evictor is told of the view and takes it in (dmh_view_add), for which it has to wait
 * for the lock that is held here from before the period is looked at until the pages are gone; then the program is told to go on.  If the
 * evictor dies in between, the program may go on before its successor has looked at these pages: so what is still in the region then stays there.
 */
#include "internal.h"

/* What a page that can be dropped becomes; -1: it cannot be. */
static int leaves_as(struct dmh_ctx *c, uint64_t page, uint64_t word, uint32_t quiet)
{
    if (!quiet || LOAD(&c->calm[page]) != quiet || word_state(word) != DMH_RESIDENT || c->pins[page])
        return -1;
    uint8_t copy = c->copies[page];
    return copy == DMH_COPY_VALID ? DMH_STORED : copy == DMH_COPY_UNKNOWN ? -1 : DMH_NEW;
}

/* RESIDENT -> EVICTING, by a word that tells it from a page that is being given up. */
static int begin(struct dmh_ctx *c, uint64_t page, uint64_t *word)
{
    uint64_t n = next_word(page, *word, DMH_EVICTING, c->worker, -1) | 1ull << DMH_FROM_STORE_SHIFT;
    if (!CAS(&c->words[page], word, n))
        return 0;
    *word = n;
    return 1;
}

/* Drop the neighbours at the beginning of pages[]; returns how many.  The caller has entered and holds the lock. */
static uint64_t drop_run(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *outcome)
{
    const uint64_t size = c->s->page_size;
    const uint32_t quiet = LOAD(&c->s->quiet);
    uint64_t word[DMH_MAX_RUN], k = 0;
    int as[DMH_MAX_RUN];
    for (; k < n && k < DMH_MAX_RUN && pages[k] == pages[0] + k; k++) {
        word[k] = LOAD(&c->words[pages[k]]);
        as[k] = leaves_as(c, pages[k], word[k], quiet);
        if (as[k] < 0 || !begin(c, pages[k], &word[k]))
            break;
    }
    if (!k)
        return 0;
    AT(c, DMH_AT_DROPPING);
    if (punch(c, pages[0] * size, k * size) < 0)
        dmh_die("punching a hole at page %llu failed: %s", (unsigned long long)pages[0], strerror(errno));
    AT(c, DMH_AT_LET_GO);
    if (!nothing_present(c, pages[0] * size, k * size))
        dmh_die("page %llu still has data after the punch (huge pages in shared memory?); stopping before zeros are read for it",
                (unsigned long long)pages[0]);
    for (uint64_t j = 0; j < k; j++) {
        if (!move_word(c, pages[j], &word[j], (uint32_t)as[j], 0, -1))
            dmh_die("page %llu: an eviction was changed by somebody else", (unsigned long long)pages[j]);
        outcome[j] = as[j] == DMH_STORED ? DMH_OUT_CLEAN : DMH_OUT_ZERO;
    }
    dmh_release(c->s, k);
    return k;
}

/*
 * Drop those of these resident pages that nobody can have written to: RESIDENT -> EVICTING -> STORED, or NEW.  pages: ascending.  Their outcome is
 * CLEAN or ZERO, that of the others SKIPPED.  Returns how many were dropped.
 */
int dmh_drop_clean(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *outcome)
{
    uint64_t dropped = 0;
    memset(outcome, DMH_OUT_SKIPPED, n);
    for (uint64_t i = 0, k; i < n; i += k ? k : 1) {
        pthread_rwlock_rdlock(&c->lock);
        enter(c);
        k = drop_run(c, pages + i, n - i, outcome + i);
        leave(c);
        if (k)
            wake_others(c, NULL, pages[i], k);
        pthread_rwlock_unlock(&c->lock);
        dropped += k;
    }
    count(c, DMH_C_EVICTED, dropped);
    count(c, DMH_C_DROPPED_CLEAN, dropped);
    return (int)dropped;
}
