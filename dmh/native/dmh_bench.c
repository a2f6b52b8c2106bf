/* Measurements: what an application sees, and the floor that dmh is held against. */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>

/* Touch one byte at each offset and time it; nothing of Python is inside. */
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
 * The floor: the least that resolving a fault from another process can be.  Poll, read one message, UFFDIO_COPY one page.
 * Returns when stop_fd becomes readable: the number of faults handled.
 */
int dmh_floor_handler(int uffd, uint64_t page_size, int stop_fd, int spin)
{
    struct pollfd p[2] = { { .fd = uffd, .events = POLLIN }, { .fd = stop_fd, .events = POLLIN } };
    uint8_t *content;
    int handled = 0;
    if (posix_memalign((void **)&content, 4096, page_size))
        return -ENOMEM;
    memset(content, 0x5a, page_size);
    for (;;) {
        if (poll(p, 2, spin ? 0 : -1) < 0 && errno != EINTR)
            break;
        if (p[1].revents)
            break;
        struct uffd_msg m;
        if (!(p[0].revents & POLLIN) || read(uffd, &m, sizeof m) != sizeof m || m.event != UFFD_EVENT_PAGEFAULT)
            continue;
        uint64_t address = m.arg.pagefault.address & ~(page_size - 1);
        struct uffdio_copy k = { .dst = address, .src = (uint64_t)(uintptr_t)content, .len = page_size };
        if (ioctl(uffd, UFFDIO_COPY, &k) == 0)
            handled++;
    }
    free(content);
    return handled;
}

int dmh_pin_cpu(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof set, &set) < 0 ? -errno : 0;
}
