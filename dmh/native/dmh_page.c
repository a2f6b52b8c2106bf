/* Page contents: XXH3-64, the zero test, and page-sized file input and output. */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/uio.h>

/*
 * XXH3-64 with the default secret and seed 0, for lengths that are multiples of 64 and above 240, which is what pages are.
 * Written from the algorithm's specification (doc/xxhash_spec.md of the xxHash project); the tests hold it against the
 * xxhash package, which stores may use from Python.
 */
static const uint8_t secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71,
    0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3,
    0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8,
    0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa,
    0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b,
    0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95,
    0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

#define P32_1 0x9E3779B1ull
#define P32_2 0x85EBCA77ull
#define P32_3 0xC2B2AE3Dull
#define P64_1 0x9E3779B185EBCA87ull
#define P64_2 0xC2B2AE3D27D4EB4Full
#define P64_3 0x165667B19E3779F9ull
#define P64_4 0x85EBCA77C2B2AE63ull
#define P64_5 0x27D4EB2F165667C5ull

static inline uint64_t read64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Eight 64-bit lanes; GCC turns these into vector code, twice as wide where the processor has AVX2. */
typedef uint64_t lanes __attribute__((vector_size(64)));

/* By pointer: passing wide vectors by value has another calling convention without AVX-512. */
static inline __attribute__((always_inline)) void accumulate(lanes *acc, const uint8_t *input, const uint8_t *key)
{
    lanes data, mixed;
    memcpy(&data, input, sizeof data);
    memcpy(&mixed, key, sizeof mixed);
    mixed ^= data;
    *acc += __builtin_shuffle(data, (lanes){ 1, 0, 3, 2, 5, 4, 7, 6 });
    *acc += (mixed & 0xFFFFFFFFull) * (mixed >> 32);
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 p = (unsigned __int128)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t dmh_hash(const uint8_t *p, uint64_t n)
{
    lanes last_key, acc = { P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1 };
    memcpy(&last_key, secret + 192 - 64, sizeof last_key);
    const uint64_t stripes = (n - 1) / 64, per_block = (192 - 64) / 8;
    for (uint64_t i = 0; i < stripes; i++) {
        accumulate(&acc, p + 64 * i, secret + 8 * (i % per_block));
        if (i % per_block == per_block - 1) {
            acc ^= acc >> 47;
            acc ^= last_key;
            acc *= P32_1;
        }
    }
    accumulate(&acc, p + n - 64, secret + 192 - 64 - 7);
    uint64_t h = n * P64_1;
    for (int i = 0; i < 4; i++)
        h += fold(acc[2 * i] ^ read64(secret + 11 + 16 * i), acc[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
    h ^= h >> 37;
    h *= 0x165667919E3779F9ull;
    return h ^ (h >> 32);
}

void dmh_hash_pages(const uint8_t *p, uint64_t n, uint64_t page_size, uint64_t *out)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = dmh_hash(p + i * page_size, page_size);
}

int dmh_is_zero(const uint8_t *p, uint64_t n)
{
    /* The first word decides for nearly every page that holds anything. */
    return read64(p) == 0 && memcmp(p, p + 8, n - 8) == 0;
}

/* One run of bytes to or from a file.  nowait: -EAGAIN rather than wait for a disk. */
static int move_bytes(int fd, uint8_t *at, uint64_t left, uint64_t offset, int writing, int nowait)
{
    while (left) {
        struct iovec v = { at, left };
        ssize_t k = writing ? pwrite(fd, at, left, (off_t)offset)
                  : nowait  ? preadv2(fd, &v, 1, (off_t)offset, RWF_NOWAIT)
                            : pread(fd, at, left, (off_t)offset);
        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0)
            return -errno;
        if (k == 0)
            return -ENODATA; /* the file ends before the page does */
        at += k, offset += (uint64_t)k, left -= (uint64_t)k;
    }
    return 0;
}

/*
 * Read pages[i] from its place in the file to row i of out, neighbours in one call.  found[i] becomes 0 where index[page] is 0 (the file has no
 * such page), 2 where the file ends before the page does (it was truncated), else 1.
 */
int dmh_fetch_pages(int fd, const uint64_t *index, const uint64_t *pages, uint64_t n, uint64_t page_size, uint8_t *out,
                    uint8_t *found, int nowait)
{
    for (uint64_t i = 0, run; i < n; i += run) {
        run = 1;
        found[i] = LOAD(&index[pages[i]]) != 0;
        if (!found[i])
            continue;
        for (; i + run < n && pages[i + run] == pages[i] + run && LOAD(&index[pages[i + run]]); run++)
            found[i + run] = 1;
        int r = move_bytes(fd, out + i * page_size, run * page_size, pages[i] * page_size, 0, nowait);
        for (uint64_t k = 0; r == -ENODATA && k < run; k++) {
            /* Only of those beyond the end: each page by itself. */
            int one = move_bytes(fd, out + (i + k) * page_size, page_size, pages[i + k] * page_size, 0, nowait);
            if (one == -ENODATA)
                found[i + k] = 2;
            else if (one)
                return one;
        }
        if (r && r != -ENODATA)
            return r;
    }
    return 0;
}

/* Write row i of data to the place of pages[i], neighbours in one call. */
int dmh_write_pages(int fd, const uint64_t *pages, uint64_t n, uint64_t page_size, const uint8_t *data)
{
    for (uint64_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && pages[i + run] == pages[i] + run; run++)
            ;
        int r = move_bytes(fd, (uint8_t *)(uintptr_t)data + i * page_size, run * page_size, pages[i] * page_size, 1, 0);
        if (r)
            return r;
    }
    return 0;
}

int dmh_punch_file(int fd, uint64_t offset, uint64_t bytes)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) < 0 ? -errno : 0;
}
