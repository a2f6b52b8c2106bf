/* The evictor's part: capture pages atomically, settle what became of them, acknowledge, discard. */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>

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

/* Move `bytes` at `offset` of the region into the pipe by reference; less than asked only when the pipe is full. */
static uint64_t splice_in(int region_fd, uint64_t offset, uint64_t bytes, int pipe_in)
{
    uint64_t moved = 0;
    while (moved < bytes) {
        off_t at = (off_t)(offset + moved);
        ssize_t k = splice(region_fd, &at, pipe_in, NULL, bytes - moved, SPLICE_F_NONBLOCK);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            break;
        moved += (uint64_t)k;
    }
    return moved;
}

/* Read the next `bytes` of a run out of the pipe to where they belong in the run's slots; `at` is how far into the run they begin. */
void read_out(struct dmh_ctx *c, int pipe_out, uint64_t at, uint64_t bytes, const uint32_t *slots)
{
    const uint64_t size = c->s->page_size;
    while (bytes) {
        struct iovec v[64];
        int n = 0;
        uint64_t asked = 0;
        while (asked < bytes && n < 64) {
            uint64_t page = (at + asked) / size, within = (at + asked) % size;
            uint64_t part = size - within < bytes - asked ? size - within : bytes - asked;
            uint8_t *to = c->slots_base + slots[page] * size + within;
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

/*
 * The only copy moves from the region to the victim buffer.  The pipe holds a reference, not a copy, until the punch has
 * unmapped the page everywhere; after the punch nothing can write to it, and what the pipe then gives is its last content.
 * The first `moved` bytes of the run are in their slots already; the journal says how far the rest has come.
 */
void move_out(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t offset, uint64_t moved, uint64_t bytes, const uint32_t *slots,
              struct dmh_journal *journal)
{
    while (moved < bytes) {
        uint64_t k = splice_in(c->region_fd, offset + moved, bytes - moved, pipe_in);
        if (!k || k % DMH_KERNEL_PAGE)
            dmh_die("splice moved %llu bytes of the region at offset %llu: %s", (unsigned long long)k,
                    (unsigned long long)(offset + moved), strerror(errno));
        AT(c, DMH_AT_SPLICED);
        if (punch(c, offset + moved, k) < 0)
            dmh_die("punching a hole at offset %llu failed: %s", (unsigned long long)(offset + moved), strerror(errno));
        AT(c, DMH_AT_PUNCHED);
        if (!nothing_present(c, offset + moved, k))
            dmh_die("offset %llu still has data after the punch (huge pages in shared memory?); stopping before a byte is "
                    "lost", (unsigned long long)(offset + moved));
        if (__builtin_expect(c->s->park == DMH_AT_READ_PARTLY + 1, 0) && k > DMH_KERNEL_PAGE) {
            /* As if the kernel had given one page and been interrupted. */
            read_out(c, pipe_out, moved, DMH_KERNEL_PAGE, slots);
            AT(c, DMH_AT_READ_PARTLY);
            moved += DMH_KERNEL_PAGE, k -= DMH_KERNEL_PAGE;
        }
        read_out(c, pipe_out, moved, k, slots);
        moved += k;
        STORE(&journal->read, moved);
    }
}

/*
 * Capture pages into victim slots: RESIDENT -> EVICTING -> STAGED, waking each run once it is published.
 * pages: ascending for the sake of runs.  slots[i] is for pages[i]; the slot of a page that is not captured stays the caller's.
 * Returns how many were captured (outcome DIRTY).
 */
int dmh_capture(struct dmh_ctx *c, int pipe_out, int pipe_in, uint64_t pipe_bytes, const uint64_t *pages, uint64_t n,
                const uint32_t *slots, uint8_t *outcome)
{
    const uint64_t size = c->s->page_size;
    const uint64_t most = pipe_bytes > size ? pipe_bytes / size : 1;
    uint64_t word[DMH_MAX_RUN];
    struct dmh_journal *journal = dmh_journal_of(c->s);
    int captured = 0;
    memset(outcome, DMH_OUT_SKIPPED, n);
    for (uint64_t i = 0, k; i < n; i += k ? k : 1) {
        enter(c);
        for (k = 0; i + k < n && k < most && k < DMH_MAX_RUN && (!k || pages[i + k] == pages[i] + k); k++) {
            uint64_t page = pages[i + k];
            word[k] = LOAD(&c->words[page]);
            if (c->pins[page] || word_state(word[k]) != DMH_RESIDENT ||
                !move_word(c, page, &word[k], DMH_EVICTING, c->worker, (int32_t)slots[i + k]))
                break;
            STORE(&slot_flags(c->s)[slots[i + k]], SLOT_NAMED);
        }
        if (!k) {
            leave(c);
            continue;
        }
        AT(c, DMH_AT_EVICTING);
        if (!page_is_present(c, pages[i] * size, k * size)) {
            /* Something outside dmh punched it (madvise(MADV_REMOVE)): splicing a hole would store zeros as data. */
            for (uint64_t j = 0; j < k; j++) {
                STORE(&slot_flags(c->s)[slots[i + j]], SLOT_ASIDE);
                if (page_is_present(c, pages[i + j] * size, size)) {
                    uint64_t back = word[j];
                    move_word(c, pages[i + j], &back, DMH_RESIDENT, 0, -1);
                    dmh_wake_pages(c, pages[i + j], 1);
                    continue;
                }
                poison(c, pages[i + j], word[j], 0);
                dmh_release(c->s, 1);
                count(c, DMH_C_POISONED, 1);
                outcome[i + j] = DMH_OUT_LOST;
            }
            leave(c);
            continue;
        }
        memcpy(journal->slot, slots + i, k * sizeof *slots);
        journal->first = pages[i];
        journal->read = 0;
        STORE(&journal->count, k);
        AT(c, DMH_AT_JOURNALED);
        move_out(c, pipe_out, pipe_in, pages[i] * size, 0, k * size, slots + i, journal);
        AT(c, DMH_AT_READ);
        for (uint64_t j = 0; j < k; j++) {
            if (!move_word(c, pages[i + j], &word[j], DMH_STAGED, 0, (int32_t)slots[i + j]))
                dmh_die("page %llu: an eviction was changed by somebody else", (unsigned long long)pages[i + j]);
            outcome[i + j] = DMH_OUT_DIRTY;
            AT(c, DMH_AT_STAGED);
        }
        STORE(&journal->count, 0ull);
        dmh_release(c->s, k);
        leave(c);
        AT(c, DMH_AT_RELEASED);
        dmh_wake_pages(c, pages[i], k);
        captured += (int)k;
    }
    count(c, DMH_C_EVICTED, (uint64_t)captured);
    return captured;
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
        /* Taken back from here on, the slot's bytes stay: only this process gives slots out. */
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

/* The DMS has these pages now: STAGED -> STORED, slots freed.  Returns how many were not taken back meanwhile. */
int dmh_acknowledge(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, const uint32_t *slots, const uint64_t *sums, int keep)
{
    int stored = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = pages[i], w = LOAD(&c->words[page]);
        /* True of the DMS whether or not the page was taken back; and before STORED, so that a fetch finds its hash. */
        STORE(&c->sums[page], sums[i]);
        STORE(&c->copies[page], DMH_COPY_VALID);
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
        uint64_t k = splice_in(fd, 0, DMH_KERNEL_PAGE, p[1]);
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
