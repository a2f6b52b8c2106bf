/* Measurements: what an application does to memory and what it sees.  Nothing of Python is inside the loops. */
#include "internal.h"


/* Touch one byte at each offset and time it. */
void dmh_time_touch(uint8_t *base, const uint64_t *offsets, uint64_t n, int write, uint64_t *out_ns)
{
    volatile uint8_t *p = base;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t t = now_ns();
        if (write)
            p[offsets[i]] = (uint8_t)i;
        else
            (void)p[offsets[i]];
        out_ns[i] = now_ns() - t;
    }
}

uint64_t dmh_sum_words(const uint8_t *base, uint64_t bytes)
{
    const uint64_t *w = (const uint64_t *)(const void *)base;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < bytes / 8; i++)
        sum += w[i];
    return sum;
}

/*
 * Add one to every word; returns the sum of what they held before.  A page's first word by an atomic addition: that faults as a
 * write, where a load would fault as a read first and cost a pager that tracks writes a second fault.
 */
uint64_t dmh_increment_words(uint8_t *base, uint64_t bytes)
{
    const uint64_t words = DMH_KERNEL_PAGE / 8;
    uint64_t *w = (uint64_t *)(void *)base, sum = 0;
    for (uint64_t end = bytes / 8, page = 0; page < end; page += words) {
        sum += __atomic_fetch_add(&w[page], 1, __ATOMIC_RELAXED);
        for (uint64_t i = page + 1; i < page + words && i < end; i++)
            sum += w[i]++;
    }
    return sum;
}

/* a = b + d * c; returns the sum of what was written. */
uint64_t dmh_triad_words(uint8_t *a, const uint8_t *b, const uint8_t *c, uint64_t d, uint64_t bytes)
{
    uint64_t *wa = (uint64_t *)(void *)a, sum = 0;
    const uint64_t *wb = (const uint64_t *)(const void *)b, *wc = (const uint64_t *)(const void *)c;
    for (uint64_t i = 0; i < bytes / 8; i++)
        sum += wa[i] = wb[i] + d * wc[i];
    return sum;
}

/* Read the words with these numbers, one after the other; with write, every second access also adds one to its word. */
uint64_t dmh_access_words(uint8_t *base, const uint64_t *numbers, uint64_t n, int write)
{
    volatile uint64_t *w = (volatile uint64_t *)(void *)base;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t old = w[numbers[i]];
        sum += old;
        if (write && (i & 1))
            w[numbers[i]] = old + 1;
    }
    return sum;
}

struct toucher {
    uint8_t *base;
    const uint64_t *numbers;
    uint64_t n, sum;
    pthread_barrier_t *start;
};

static void *touch_words(void *argument)
{
    struct toucher *t = argument;
    pthread_barrier_wait(t->start);
    t->sum = dmh_access_words(t->base, t->numbers, t->n, 0);
    return NULL;
}

/* The same reads by several threads at once, each its own run of the numbers; returns ns from the start to the last end. */
int64_t dmh_access_by_threads(uint8_t *base, const uint64_t *numbers, uint64_t n, uint32_t threads, uint64_t *sum)
{
    struct toucher *t = calloc(threads, sizeof *t);
    pthread_t *id = calloc(threads, sizeof *id);
    pthread_barrier_t start;
    int failed = !t || !id || pthread_barrier_init(&start, NULL, threads + 1);
    for (uint32_t i = 0; i < threads && !failed; i++) {
        uint64_t first = n * i / threads, end = n * (i + 1) / threads;
        t[i] = (struct toucher){ .base = base, .numbers = numbers + first, .n = end - first, .start = &start };
        /* Those that exist wait at a barrier that can never fill: there is no way back from half of them. */
        if (pthread_create(&id[i], NULL, touch_words, &t[i]))
            dmh_die("thread %u of %u cannot be started: the limit on processes (ulimit -u) is reached", i + 1, threads);
    }
    if (failed) {
        free(t);
        free(id);
        return -ENOMEM;
    }
    pthread_barrier_wait(&start);
    uint64_t began = now_ns();
    *sum = 0;
    for (uint32_t i = 0; i < threads; i++) {
        pthread_join(id[i], NULL);
        *sum += t[i].sum;
    }
    uint64_t ended = now_ns();
    pthread_barrier_destroy(&start);
    free(t);
    free(id);
    return (int64_t)(ended - began);
}
