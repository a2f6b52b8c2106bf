/* The evictor's part: capture pages atomically, settle what became of them, acknowledge, discard. */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>

#define GROUP_RUNS 32

/* A pipe of up to `wanted` bytes, as large as this user may have; returns its size. */
int dmh_pipe(int *fds, uint64_t wanted)
{
    if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0)
        return -errno;
    for (uint64_t size = wanted; size >= DMH_KERNEL_PAGE; size /= 2)
        if (fcntl(fds[1], F_SETPIPE_SZ, (int)size) >= 0)
            break;
    return dmh_pipe_bytes(fds[1]);
}

int dmh_pipe_bytes(int fd)
{
    int size = fcntl(fd, F_GETPIPE_SZ);
    return size < 0 ? -errno : size;
}

/*
 * A group of pages on its way out is a sequence of bytes: its pages' one after the other, wherever they lie in the region.  It moves in pieces as large as
 * the pipe; most groups are one piece.
 */

/* How many bytes of the group at `at` (up to `end`) are neighbours in the region; *offset: where they begin. */
static uint64_t neighbours(const struct dmh_ctx *c, const struct dmh_journal *j, uint64_t at, uint64_t end, uint64_t *offset)
{
    const uint64_t shift = c->s->page_shift, size = c->s->page_size;
    uint64_t i = at >> shift, k = 1;
    *offset = j->page[i] * size + (at & (size - 1));
    while (i + k < j->count && (i + k) * size < end && j->page[i + k] == j->page[i] + k)
        k++;
    return ((i + k) * size < end ? (i + k) * size : end) - at;
}

/* References to the group's bytes from `at` on, as far as the pipe has room; returns how many. */
static uint64_t splice_in(struct dmh_ctx *c, const struct dmh_journal *j, uint64_t at, uint64_t end, int pipe_in)
{
    const uint64_t began = at;
    while (at < end) {
        uint64_t offset, part = neighbours(c, j, at, end, &offset);
        off_t from = (off_t)offset;
        ssize_t k = splice(c->region_fd, &from, pipe_in, NULL, part, SPLICE_F_NONBLOCK);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            break;
        at += (uint64_t)k;
    }
    return at - began;
}

/* The next `bytes` that are in the pipe, to the slots of the pages that they are of; `at`: how far into the group they begin. */
void read_out(struct dmh_ctx *c, int pipe_out, const struct dmh_journal *j, uint64_t at, uint64_t bytes)
{
    const uint64_t size = c->s->page_size;
    while (bytes) {
        struct iovec v[64];
        int n = 0;
        uint64_t asked = 0;
        while (asked < bytes && n < 64) {
            uint64_t page = (at + asked) / size, within = (at + asked) % size;
            uint64_t part = size - within < bytes - asked ? size - within : bytes - asked;
            uint8_t *to = c->slots_base + j->slot[page] * size + within;
            if (n && (uint8_t *)v[n - 1].iov_base + v[n - 1].iov_len == to)
                v[n - 1].iov_len += part; /* neighbouring slots */
            else
                v[n++] = (struct iovec){ to, part };
            asked += part;
        }
        ssize_t k = readv(pipe_out, v, n);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            dmh_die("the capture pipe ended %llu bytes early: %s", (unsigned long long)bytes, k ? strerror(errno) : "empty");
        at += (uint64_t)k, bytes -= (uint64_t)k;
    }
}

/* What a dead worker left in the pipe and nobody needs. */
void drain(int pipe_out)
{
    char bytes[DMH_KERNEL_PAGE];
    while (read(pipe_out, bytes, sizeof bytes) > 0)
        ;
}

/* The pipe holds all of at .. end: take it out of the region. */
static void punch_out(struct dmh_ctx *c, const struct dmh_journal *j, uint64_t at, uint64_t end)
{
    for (uint64_t part, offset; at < end; at += part) {
        part = neighbours(c, j, at, end, &offset);
        if (punch(c, offset, part) < 0)
            dmh_die("punching a hole at offset %llu failed: %s", (unsigned long long)offset, strerror(errno));
        if (!nothing_present(c, offset, part))
            dmh_die("offset %llu still has data after the punch (huge pages in shared memory?); stopping before a byte is "
                    "lost", (unsigned long long)offset);
        if (at + part < end)
            AT(c, DMH_AT_PUNCHED_PARTLY);
    }
}

/*
 * The only copy moves from the region to the victim buffer.  The pipe holds references, not copies, until the punch has unmapped the pages everywhere;
 * after the punch nothing can write to them, and what the pipe then gives is their last content.  The journal says how far the group has come: its first
 * `read` bytes are in their slots, those up to `end` are in the pipe, whole or from some byte on, and in the region no more or still.
 */
void move_out(struct dmh_ctx *c, int pipe_out, int pipe_in, struct dmh_journal *j, uint64_t bytes)
{
    for (uint64_t at = j->read; at < bytes;) {
        uint64_t k = splice_in(c, j, at, bytes, pipe_in);
        if (!k || k % DMH_KERNEL_PAGE)
            dmh_die("splice moved %llu of %llu bytes of page %llu and its group: %s", (unsigned long long)k,
                    (unsigned long long)(bytes - at), (unsigned long long)j->page[at >> c->s->page_shift], strerror(errno));
        STORE(&j->end, at + k);
        AT(c, DMH_AT_SPLICED);
        punch_out(c, j, at, at + k);
        AT(c, DMH_AT_PUNCHED);
        if (__builtin_expect(c->s->park == DMH_AT_READ_PARTLY + 1, 0) && k > DMH_KERNEL_PAGE) {
            /* As if the kernel had given one page and been interrupted. */
            read_out(c, pipe_out, j, at, DMH_KERNEL_PAGE);
            AT(c, DMH_AT_READ_PARTLY);
            at += DMH_KERNEL_PAGE, k -= DMH_KERNEL_PAGE;
        }
        read_out(c, pipe_out, j, at, k);
        at += k;
        STORE(&j->read, at);
    }
}

/* A page that is EVICTING is not in memory: something outside dmh punched it (madvise(MADV_REMOVE)). */
static void lose(struct dmh_ctx *c, uint64_t page, uint64_t word, uint32_t slot)
{
    STORE(&slot_flags(c->s)[slot], SLOT_ASIDE);
    poison(c, page, word, 0);
    dmh_release(c->s, 1);
    count(c, DMH_C_POISONED, 1);
}

/*
 * Capture one group into victim slots: RESIDENT -> EVICTING -> STAGED, and wake it once it is published.  pages: ascending; slots[i] is for pages[i], and stays
 * the caller's where outcome[i] is not DIRTY.
 */
static void capture_group(struct dmh_ctx *c, int pipe_out, int pipe_in, const uint64_t *pages, uint64_t n, const uint32_t *slots, uint8_t *outcome)
{
    const uint64_t size = c->s->page_size;
    struct dmh_journal *j = dmh_journal_of(c->s);
    uint64_t word[DMH_MAX_RUN], g = 0;
    uint32_t place[DMH_MAX_RUN];
    enter(c);
    for (uint64_t i = 0; i < n; i++) {
        word[g] = LOAD(&c->words[pages[i]]);
        outcome[i] = DMH_OUT_SKIPPED;
        if (c->pins[pages[i]] || word_state(word[g]) != DMH_RESIDENT ||
            !move_word(c, pages[i], &word[g], DMH_EVICTING, c->worker, (int32_t)slots[i]))
            continue;
        STORE(&slot_flags(c->s)[slots[i]], SLOT_NAMED);
        j->page[g] = pages[i], j->slot[g] = slots[i], place[g++] = (uint32_t)i;
    }
    AT(c, DMH_AT_EVICTING);
    uint64_t there = 0;
    for (uint64_t i = 0, k; i < g; i += k) {
        k = run_of(j->page, g, i, g);
        int all = page_is_present(c, j->page[i] * size, k * size);
        for (uint64_t at = i; at < i + k; at++) {
            if (!all && !page_is_present(c, j->page[at] * size, size)) {
                /* Splicing a hole would store zeros as data. */
                lose(c, j->page[at], word[at], j->slot[at]);
                outcome[place[at]] = DMH_OUT_LOST;
                continue;
            }
            j->page[there] = j->page[at], j->slot[there] = j->slot[at], word[there] = word[at], place[there++] = place[at];
        }
    }
    if (there) {
        j->read = j->end = 0;
        STORE(&j->count, there);
        AT(c, DMH_AT_JOURNALED);
        move_out(c, pipe_out, pipe_in, j, there * size);
        AT(c, DMH_AT_READ);
        for (uint64_t i = 0; i < there; i++) {
            if (!move_word(c, j->page[i], &word[i], DMH_STAGED, 0, (int32_t)j->slot[i]))
                dmh_die("page %llu: an eviction was changed by somebody else", (unsigned long long)j->page[i]);
            outcome[place[i]] = DMH_OUT_DIRTY;
            AT(c, DMH_AT_STAGED);
        }
        STORE(&j->count, 0ull);
        dmh_release(c->s, there);
    }
    leave(c);
    AT(c, DMH_AT_RELEASED);
    uint32_t waited_for = __atomic_exchange_n(&c->s->left_to_evictor, 0u, __ATOMIC_SEQ_CST);
    for (uint64_t i = 0, k; waited_for && i < there; i += k) {
        k = run_of(j->page, there, i, there);
        dmh_wake_pages(c, j->page[i], k);
    }
    count(c, DMH_C_EVICTED, there);
}

/*
 * How many of these pages make one group.  A pipeful: then it moves in one piece.  Scattered pages are few, because each takes as long as a run, and who
 * faults on any of them waits for all.
 */
static uint64_t group_of(const struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint64_t pipe_bytes)
{
    const uint64_t most = pipe_bytes > c->s->page_size ? pipe_bytes >> c->s->page_shift : 1;
    uint64_t k = 1;
    for (int runs = 1; k < n && k < most && k < DMH_MAX_RUN; k++)
        if (pages[k] != pages[k - 1] + 1 && ++runs > GROUP_RUNS)
            break;
    return k;
}

/* Capture pages (ascending) into slots; slots[i] stays the caller's where outcome[i] is not DIRTY. */
void dmh_capture(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t pipe_bytes, const uint64_t *pages, uint64_t n, const uint32_t *slots,
                 uint8_t *outcome)
{
    for (uint64_t i = 0, k; i < n; i += k) {
        k = group_of(c, pages + i, n - i, pipe_bytes);
        capture_group(c, pipe_out, pipe_in, pages + i, k, slots + i, outcome + i);
    }
}

/*
 * Decide what staged pages need: all zeros -> NEW, what the DMS has already -> STORED, both without a write and with their slots
 * freed; the rest is DIRTY, with its hash in sums[], and from now on the DMS may have either version (copy UNKNOWN).
 * keep: leave every page STAGED (a flush, which brings them back).
 */
int dmh_settle(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, const uint32_t *slots, uint8_t *outcome, uint64_t *sums,
               int keep)
{
    const uint64_t size = c->s->page_size;
    int dirty = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint8_t *content = c->slots_base + slots[i] * size;
        uint64_t page = pages[i], w = LOAD(&c->words[page]);
        outcome[i] = DMH_OUT_SKIPPED;
        /* A flush wants the content that was captured, also where the page was taken back since. */
        if (!keep && (word_state(w) != DMH_STAGED || word_slot(w) != (int32_t)slots[i]))
            continue;
        /* Taken back from here on, the slot's bytes stay: only this thread gives slots out. */
        if (dmh_is_zero(content, size)) {
            if (keep) {
                outcome[i] = DMH_OUT_ZERO;
                continue;
            }
            uint8_t copy = c->copies[page];
            STORE(&c->copies[page], copy == DMH_COPY_NONE ? DMH_COPY_NONE : DMH_COPY_STALE);
            enter(c);
            if (move_word(c, page, &w, DMH_NEW, 0, -1)) {
                dmh_free_slot(c, slots[i]);
                outcome[i] = DMH_OUT_ZERO;
                count(c, DMH_C_ZEROED, 1);
            } else {
                STORE(&c->copies[page], copy);
            }
            leave(c);
            continue;
        }
        sums[i] = dmh_hash(content, size);
        if (c->copies[page] == DMH_COPY_VALID && c->sums[page] == sums[i]) {
            enter(c);
            if (keep) {
                outcome[i] = DMH_OUT_CLEAN;
            } else if (move_word(c, page, &w, DMH_STORED, 0, -1)) {
                dmh_free_slot(c, slots[i]);
                outcome[i] = DMH_OUT_CLEAN;
                count(c, DMH_C_CLEAN, 1);
            }
            leave(c);
            continue;
        }
        STORE(&c->copies[page], DMH_COPY_UNKNOWN);
        outcome[i] = DMH_OUT_DIRTY;
        dirty++;
    }
    AT(c, DMH_AT_SETTLED);
    return dirty;
}

/*
 * Resident pages (ascending) out, as far as it goes without the DMS: captured and settled, a group at a time, so that a clean page's slot is in the
 * processor's cache from the read to the hash and serves the next group.  What has to be written comes first in pages[], slots[] and sums[] afterwards;
 * returns how many that is.  l->left: so many at the end found no slot.  l->stayed: those that are still where they were; l->lost: those that were not in
 * memory any more.
 */
int dmh_leave(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t pipe_bytes, struct dmh_leaving *l)
{
    uint64_t dirty = 0, i = 0, k = 0;
    l->stayed_n = l->lost_n = 0;
    for (uint64_t m = 0; m < l->n; m++) {
        __builtin_prefetch(&c->words[l->page[m]]);
        __builtin_prefetch(&c->pins[l->page[m]]);
        __builtin_prefetch(&c->copies[l->page[m]]);
        __builtin_prefetch(&c->sums[l->page[m]]);
    }
    STORE(&c->s->evicting_on, (uint32_t)sched_getcpu() + 1);
    for (; i < l->n; i += k) {
        uint32_t slots[DMH_MAX_RUN];
        uint64_t sums[DMH_MAX_RUN], *pages = l->page + i;
        uint8_t outcome[DMH_MAX_RUN];
        k = group_of(c, pages, l->n - i, pipe_bytes);
        /* The lowest free ones, which were used last; unless most are taken, and looking for those would take long. */
        uint64_t from = 2 * LOAD(&c->s->staged) < c->s->slots ? 0 : l->rotor;
        k = (uint64_t)dmh_take_slots(c, slots, k, from);
        if (!k)
            break;
        l->rotor = (slots[k - 1] + 1) % c->s->slots;
        capture_group(c, pipe_out, pipe_in, pages, k, slots, outcome);
        dmh_return_slots(c, slots, outcome, k);
        uint64_t g = 0;
        for (uint64_t m = 0; m < k; m++) {
            if (outcome[m] == DMH_OUT_DIRTY)
                l->page[dirty + g] = pages[m], slots[g++] = slots[m]; /* dirty <= i: nothing is overwritten that is still needed */
            else if (outcome[m] == DMH_OUT_LOST)
                l->lost[l->lost_n++] = pages[m];
            else
                l->stayed[l->stayed_n++] = pages[m];
        }
        dmh_settle(c, l->page + dirty, g, slots, outcome, sums, 0);
        for (uint64_t m = 0, at = dirty; m < g; m++)
            if (outcome[m] == DMH_OUT_DIRTY)
                l->page[dirty] = l->page[at + m], l->slot[dirty] = slots[m], l->sum[dirty++] = sums[m];
    }
    l->left = l->n - i;
    /* A page that was taken back gave up its slot, and another page may be in it by now. */
    uint64_t still = 0;
    for (uint64_t m = 0; m < dirty; m++) {
        uint64_t w = LOAD(&c->words[l->page[m]]);
        if (word_state(w) == DMH_STAGED && word_slot(w) == (int32_t)l->slot[m])
            l->page[still] = l->page[m], l->slot[still] = l->slot[m], l->sum[still++] = l->sum[m];
    }
    count(c, DMH_C_TAKEN_BACK, dirty - still);
    return (int)still; /* from here on slots that are given up keep their bytes: nobody is given any until these are written */
}

/* The DMS has these pages now: STAGED -> STORED, slots freed.  Returns how many were not taken back meanwhile. */
int dmh_acknowledge(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, const uint32_t *slots, const uint64_t *sums, int keep)
{
    int stored = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = pages[i], w = LOAD(&c->words[page]);
        /*
         * True of the DMS whether or not the page was taken back; and before STORED, so that a fetch finds its hash.  But it may have left again since,
         * as zeros: then what the DMS has is to be forgotten.
         */
        if (LOAD(&c->copies[page]) == DMH_COPY_UNKNOWN) {
            STORE(&c->sums[page], sums[i]);
            STORE(&c->copies[page], DMH_COPY_VALID);
        }
        AT(c, DMH_AT_SUMMED);
        if (keep)
            continue;
        enter(c);
        if (word_state(w) == DMH_STAGED && word_slot(w) == (int32_t)slots[i] && move_word(c, page, &w, DMH_STORED, 0, -1)) {
            AT(c, DMH_AT_ACKNOWLEDGED);
            dmh_free_slot(c, slots[i]);
            stored++;
        } else {
            count(c, DMH_C_TAKEN_BACK, 1);
        }
        leave(c);
    }
    count(c, DMH_C_WRITTEN, n);
    count(c, DMH_C_WRITTEN_BYTES, n * c->s->page_size);
    return stored;
}

/* Bring staged pages back into the region where there is room, as after a flush.  Returns how many came back. */
int dmh_take_back(struct dmh_ctx *c, const uint64_t *pages, uint64_t n)
{
    const uint64_t size = c->s->page_size;
    int back = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t w = LOAD(&c->words[pages[i]]);
        int32_t slot = word_slot(w);
        enter(c);
        int claimed = word_state(w) == DMH_STAGED && dmh_reserve(c->s, 1);
        if (claimed && !move_word(c, pages[i], &w, DMH_FETCHING, c->worker, slot)) {
            dmh_release(c->s, 1);
            claimed = 0;
        }
        leave(c);
        if (!claimed)
            continue;
        pthread_rwlock_rdlock(&c->lock);
        struct view *v = own_view(c);
        for (uint32_t k = 0; k < c->nviews; k++)
            if (!c->views[k].own)
                v = &c->views[k]; /* map it where it is used */
        enum verdict r = fill(c, v, pages[i] * size, size, c->slots_base + (uint64_t)slot * size, 0);
        if (r == V_GONE)
            r = fill(c, own_view(c), pages[i] * size, size, c->slots_base + (uint64_t)slot * size, 0);
        enter(c);
        if (r == V_DONE) {
            move_word(c, pages[i], &w, DMH_RESIDENT, 0, -1);
            dmh_free_slot(c, (uint32_t)slot);
            back++;
        } else {
            move_word(c, pages[i], &w, DMH_STAGED, 0, slot);
            dmh_release(c->s, 1);
        }
        leave(c);
        wake_others(c, NULL, pages[i], 1);
        pthread_rwlock_unlock(&c->lock);
    }
    return back;
}

static void no_longer_wanted(struct dmh_ctx *c, uint64_t page)
{
    if (c->copies[page] != DMH_COPY_NONE)
        STORE(&c->copies[page], DMH_COPY_STALE);
}

/*
 * Give up the content of pages first .. first + n - 1: NEW.  Pages that a resolver is fetching, and poisoned ones that there is no room to heal, are
 * listed in busy[] (room for n): call again for them.  Returns how many.
 */
int dmh_discard(struct dmh_ctx *c, uint64_t first, uint64_t n, uint64_t *busy)
{
    const uint64_t size = c->s->page_size;
    uint64_t nbusy = 0, gone = 0;
    for (uint64_t page = first; page < first + n;) {
        uint64_t w = LOAD(&c->words[page]);
        int32_t slot = word_slot(w);
        switch (word_state(w)) {
        case DMH_NEW:
            page++;
            break;
        case DMH_FETCHING:
            busy[nbusy++] = page++;
            break;
        case DMH_POISONED:
            if (discard_poisoned(c, page, w))
                gone++;
            else
                busy[nbusy++] = page;
            page++;
            break;
        case DMH_STORED:
        case DMH_STAGED:
            enter(c);
            if (move_word(c, page, &w, DMH_NEW, 0, -1)) {
                if (slot >= 0)
                    dmh_free_slot(c, (uint32_t)slot);
                no_longer_wanted(c, page);
                page++, gone++;
            }
            leave(c);
            break;
        case DMH_RESIDENT: {
            uint64_t word[DMH_MAX_RUN], k = 0;
            enter(c);
            for (; k < DMH_MAX_RUN && page + k < first + n; k++) {
                word[k] = LOAD(&c->words[page + k]);
                if (word_state(word[k]) != DMH_RESIDENT || !move_word(c, page + k, &word[k], DMH_EVICTING, c->worker, -1))
                    break;
            }
            if (!k) {
                leave(c);
                break; /* it changed while we looked: look again */
            }
            if (punch(c, page * size, k * size) < 0)
                dmh_die("punching a hole at page %llu failed: %s", (unsigned long long)page, strerror(errno));
            AT(c, DMH_AT_DISCARDING);
            for (uint64_t j = 0; j < k; j++) {
                move_word(c, page + j, &word[j], DMH_NEW, 0, -1);
                no_longer_wanted(c, page + j);
            }
            dmh_release(c->s, k);
            leave(c);
            dmh_wake_pages(c, page, k);
            page += k, gone += k;
            break;
        }
        default:
            dmh_die("page %llu is %s while it is discarded", (unsigned long long)page, dmh_state_name[word_state(w)]);
        }
    }
    count(c, DMH_C_DISCARDED, gone);
    return (int)nbusy;
}

/* Does this kernel capture as dmh needs it?  0, or -errno, or -EILSEQ where the bytes came out wrong. */
int dmh_probe_capture(uint64_t page_size)
{
    int fd = memfd_create("dmh-probe", MFD_CLOEXEC), p[2] = { -1, -1 }, r = 0;
    if (fd < 0)
        return -errno;
    uint64_t bytes = page_size * 2;
    uint8_t *m = MAP_FAILED, *copy = malloc(bytes);
    if (!copy || ftruncate(fd, (off_t)bytes) < 0 ||
        (m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED || dmh_pipe(p, DMH_KERNEL_PAGE * 16) < 0)
        r = -(errno ? errno : ENOMEM);
    if (!r) {
        madvise(m, bytes, MADV_NOHUGEPAGE);
        memset(m, 1, bytes);
        off_t from = 0;
        ssize_t k = splice(fd, &from, p[1], NULL, DMH_KERNEL_PAGE, SPLICE_F_NONBLOCK);
        memset(m, 2, DMH_KERNEL_PAGE); /* through the reference, the pipe must see this */
        if (k != DMH_KERNEL_PAGE || fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, DMH_KERNEL_PAGE) < 0)
            r = -(errno ? errno : EIO);
        else if (lseek(fd, 0, SEEK_DATA) != DMH_KERNEL_PAGE || read(p[0], copy, DMH_KERNEL_PAGE) != DMH_KERNEL_PAGE ||
                 copy[0] != 2 || copy[DMH_KERNEL_PAGE - 1] != 2)
            r = -EILSEQ;
    }
    if (m != MAP_FAILED)
        munmap(m, bytes);
    free(copy);
    close(fd);
    if (p[0] >= 0)
        close(p[0]), close(p[1]);
    return r;
}
