/*
 * The floor that dmh is held against: the least that resolving faults in another process can be.
 *
 * The handler gives every page the same content.  The pager pages to a file under a limit, first in, first out, in one
 * thread: what a pager cannot do without, and nothing else (no table, no read-ahead, no checksum, no second process).
 */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Poll, read one message, UFFDIO_COPY one page.  Returns when stop_fd becomes readable: the number of faults handled. */
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
        else if (errno == EEXIST) { /* another thread's message brought it; EEXIST does not wake */
            struct uffdio_range r = { address, page_size };
            ioctl(uffd, UFFDIO_WAKE, &r);
        }
    }
    free(content);
    return handled;
}

/* A userfaultfd for the pager, which learns of first writes by write protection; base is registered with it. */
int dmh_pager_watch(void *base, uint64_t bytes)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -errno;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
        if (fd < 0)
            return -errno;
    }
    struct uffdio_api api = { .api = UFFD_API,
                              .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM |
                                          UFFD_FEATURE_WP_HUGETLBFS_SHMEM };
    struct uffdio_register r = { .range = { (uint64_t)(uintptr_t)base, bytes },
                                 .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP };
    if (ioctl(fd, UFFDIO_API, &api) < 0 || ioctl(fd, UFFDIO_REGISTER, &r) < 0) {
        int e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

#define EVICT_AT_ONCE 32u

enum { ABSENT, CLEAN, DIRTY };

struct pager {
    int uffd, memory, file;
    uint64_t base, page_size, limit;
    uint8_t *state;             /* per page */
    uint64_t *queue;            /* a ring of `limit`: resident pages in the order of their arrival */
    uint64_t first, resident;   /* the ring's oldest entry; its length, <= limit */
    uint8_t *buffer;            /* EVICT_AT_ONCE pages */
};

static int protect(struct pager *p, uint64_t page, uint64_t n, int on)
{
    struct uffdio_writeprotect w = { .range = { p->base + page * p->page_size, n * p->page_size },
                                     .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };
    return ioctl(p->uffd, UFFDIO_WRITEPROTECT, &w) < 0 ? -errno : 0;
}

static int whole(ssize_t moved, uint64_t bytes) { return moved < 0 ? -errno : (uint64_t)moved == bytes ? 0 : -EIO; }

/* The oldest pages out, neighbours together.  A write between protection and punch faults, and comes back as a missing page. */
static int evict(struct pager *p, uint64_t n)
{
    while (n) {
        uint64_t page = p->queue[p->first % p->limit], run = 1;
        uint8_t state = p->state[page];
        while (run < n && run < EVICT_AT_ONCE && p->queue[(p->first + run) % p->limit] == page + run &&
               p->state[page + run] == state)
            run++;
        uint64_t bytes = run * p->page_size;
        off_t at = (off_t)(page * p->page_size);
        int r = 0;
        if (state == DIRTY && ((r = protect(p, page, run, 1)) < 0 ||
                               (r = whole(pread(p->memory, p->buffer, bytes, at), bytes)) < 0 ||
                               (r = whole(pwrite(p->file, p->buffer, bytes, at), bytes)) < 0))
            return r;
        if (fallocate(p->memory, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)bytes) < 0)
            return -errno;
        memset(p->state + page, ABSENT, run);
        p->first += run, p->resident -= run, n -= run;
    }
    return 0;
}

static int fetch(struct pager *p, uint64_t page, int for_writing)
{
    int r;
    uint64_t share = p->limit / 16 + 1;
    if (p->resident == p->limit && (r = evict(p, share < EVICT_AT_ONCE ? share : EVICT_AT_ONCE)) < 0)
        return r;
    off_t at = (off_t)(page * p->page_size);
    if ((r = whole(pread(p->file, p->buffer, p->page_size, at), p->page_size)) < 0)
        return r;
    p->queue[(p->first + p->resident++) % p->limit] = page;
    p->state[page] = for_writing ? DIRTY : CLEAN;
    struct uffdio_copy k = { .dst = p->base + page * p->page_size, .src = (uint64_t)(uintptr_t)p->buffer,
                             .len = p->page_size, .mode = for_writing ? 0 : UFFDIO_COPY_MODE_WP };
    return ioctl(p->uffd, UFFDIO_COPY, &k) < 0 ? -errno : 0;
}

static int answer(struct pager *p, const struct uffd_msg *m)
{
    uint64_t page = (m->arg.pagefault.address - p->base) / p->page_size;
    int first_write = (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) != 0;
    if (p->state[page] == ABSENT && !first_write)
        return fetch(p, page, (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0);
    if (p->state[page] != ABSENT && first_write) {
        p->state[page] = DIRTY;
        return protect(p, page, 1, 0); /* wakes */
    }
    /* Another thread's message has brought it meanwhile, or it has been evicted: the kernel raises again what still matters. */
    struct uffdio_range r = { p->base + page * p->page_size, p->page_size };
    return ioctl(p->uffd, UFFDIO_WAKE, &r) < 0 ? -errno : 0;
}

/*
 * Poll, read, pread, UFFDIO_COPY; beyond `limit` pages the oldest go out, dirty ones written back.  A byte on `control` evicts
 * everything and is answered by a byte; its end ends the pager.  The memory must be empty and the file as long as it.
 */
int dmh_floor_pager(int uffd, int memory, int file, uint64_t base, uint64_t pages, uint64_t page_size, uint64_t limit,
                    int control)
{
    struct pager p = { .uffd = uffd, .memory = memory, .file = file, .base = base, .page_size = page_size, .limit = limit,
                       .state = calloc(pages, 1), .queue = calloc(limit, sizeof *p.queue) };
    int r = -ENOMEM;
    if (p.state && p.queue && !posix_memalign((void **)&p.buffer, 4096, EVICT_AT_ONCE * page_size))
        r = 0;
    struct pollfd on[2] = { { .fd = uffd, .events = POLLIN }, { .fd = control, .events = POLLIN } };
    while (!r) {
        if (poll(on, 2, -1) < 0) {
            if (errno != EINTR)
                r = -errno;
            continue;
        }
        struct uffd_msg m;
        char byte;
        if (on[0].revents & POLLIN && read(uffd, &m, sizeof m) == sizeof m && m.event == UFFD_EVENT_PAGEFAULT)
            r = answer(&p, &m);
        else if (on[1].revents) {
            if (read(control, &byte, 1) != 1)
                break;
            r = evict(&p, p.resident);
            if (!r && write(control, &byte, 1) != 1)
                r = -errno;
        }
    }
    free(p.state);
    free(p.queue);
    free(p.buffer);
    return r;
}
