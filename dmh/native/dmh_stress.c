/*
 * The workload of `dmh stress`: words in pages next to a shadow in ordinary memory.  C, so that the threads of one process
 * fault at the same time, and thousands of times a second.
 */
#include "internal.h"

/* What a word must hold: something that no other word, no other page and no other version of it holds; 0 before its first write. */
static uint64_t value_of(const struct dmh_stress *s, uint64_t page, uint64_t word, uint32_t version)
{
    if (!version)
        return 0;
    uint64_t x = s->seed + page * 0x9e3779b97f4a7c15ull + word * 0xd1342543de82ef95ull + version * 0x2545f4914f6cdd1dull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t next_random(struct dmh_stress *s)
{
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    s->random ^= s->random << 17;
    return s->random;
}

static uint64_t words_a_page(const struct dmh_stress *s) { return s->page_size / 8; }
static uint64_t row(const struct dmh_stress *s) { return (words_a_page(s) + s->lanes - 1) / s->lanes; }
/* How many words of each page this lane has. */
static uint64_t mine(const struct dmh_stress *s) { return (words_a_page(s) - s->lane + s->lanes - 1) / s->lanes; }

static uint64_t *word_at(const struct dmh_stress *s, uint64_t page, uint64_t n)
{
    return (uint64_t *)(void *)(s->base + page * s->page_size) + s->lane + n * s->lanes;
}
static uint16_t *version_at(const struct dmh_stress *s, uint64_t page, uint64_t n) { return s->versions + page * row(s) + n; }

/* Compare what was read of a word with the shadow; the first that differs is kept, with how it read a second time. */
static int is_right(struct dmh_stress *s, uint64_t page, uint64_t n, uint64_t got)
{
    uint64_t word = s->lane + n * s->lanes;
    uint32_t version = *version_at(s, page, n);
    uint64_t expected = value_of(s, s->first + page, word, version);
    if (__builtin_expect(got == expected, 1))
        return 1;
    s->wrong_page = s->first + page;
    s->wrong_word = word;
    s->wrong_version = version;
    s->expected = expected;
    s->got = got;
    s->again = LOAD(word_at(s, page, n));
    s->older = 0;
    for (uint32_t back = 1; back <= version && !s->older; back++)
        if (value_of(s, s->first + page, word, version - back) == got)
            s->older = back;
    STORE(&s->wrong, 1u);
    return 0;
}

static uint64_t advance(const struct dmh_stress *s, uint64_t page, uint64_t n)
{
    uint16_t *version = version_at(s, page, n);
    *version = (uint16_t)(*version == UINT16_MAX ? 1 : *version + 1);
    return value_of(s, s->first + page, s->lane + n * s->lanes, *version);
}

/* The kernel moves a word: system calls fault, too.  0, or -errno. */
static int through_the_kernel(struct dmh_stress *s, uint64_t page, uint64_t n, int write_it)
{
    uint64_t moved;
    if (!write_it) {
        if (pwrite(s->scratch_fd, word_at(s, page, n), 8, 0) != 8 || pread(s->scratch_fd, &moved, 8, 0) != 8)
            return -(errno ? errno : EIO);
        return is_right(s, page, n, moved) ? 0 : -EILSEQ;
    }
    moved = advance(s, page, n);
    if (pwrite(s->scratch_fd, &moved, 8, 8) != 8 || pread(s->scratch_fd, word_at(s, page, n), 8, 8) != 8)
        return -(errno ? errno : EIO);
    return 0;
}

/*
 * So many random operations: reads that are compared, writes, now and then a whole page's words, now and then through a system
 * call.  0; 1 where a word was wrong; -errno where a system call failed.
 */
int dmh_stress_run(struct dmh_stress *s, uint64_t operations)
{
    const uint64_t words = mine(s);
    uint64_t began = now_ns();
    for (uint64_t i = 0; i < operations; i++) {
        uint64_t r = next_random(s), kind = r >> 56;
        /* Half of it goes to an eighth of the pages: some stay local, most do not. */
        uint64_t page = (r & 0xffffffff) % (r >> 32 & 1 || s->pages < 8 ? s->pages : s->pages / 8);
        uint64_t n = (r >> 33 & 0x7fffff) % words;
        int failed = 0;
        STORE(&s->page, s->first + page);
        if (kind < 16 && s->scratch_fd >= 0) {
            failed = through_the_kernel(s, page, n, kind & 1);
            if (failed == -EILSEQ)
                return 1;
            if (failed)
                return failed;
        } else if (kind < 24) {
            for (n = 0; n < words; n++)
                STORE(word_at(s, page, n), advance(s, page, n));
        } else if (kind < 32) {
            for (n = 0; n < words; n++)
                if (!is_right(s, page, n, LOAD(word_at(s, page, n))))
                    return 1;
        } else {
            if (!is_right(s, page, n, LOAD(word_at(s, page, n))))
                return 1;
            if (kind < 112)
                STORE(word_at(s, page, n), advance(s, page, n));
        }
        STORE(&s->done, s->done + 1);
        uint64_t now = now_ns();
        if (now - began > s->longest_ns)
            s->longest_ns = now - began;
        began = now;
    }
    return 0;
}

/* Compare every word of pages from .. from + n - 1 of this lane, in order.  0, or 1 where one was wrong. */
int dmh_stress_verify(struct dmh_stress *s, uint64_t from, uint64_t n)
{
    for (uint64_t page = from; page < from + n; page++) {
        STORE(&s->page, s->first + page);
        for (uint64_t i = 0; i < mine(s); i++)
            if (!is_right(s, page, i, LOAD(word_at(s, page, i))))
                return 1;
        STORE(&s->done, s->done + 1);
    }
    return 0;
}
