/* userfaultfd: opening, the set-up of a mapping, the table of views, filling and waking. */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/* Debian 12's headers are older than the kernels it runs on. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

int uffd_open_as(int kind)
{
    int fd;
    if (kind == DMH_UFFD_DEVICE) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -errno;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        int e = errno;
        close(device);
        errno = e;
    } else {
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | (kind == DMH_UFFD_USER_ONLY ? UFFD_USER_MODE_ONLY : 0));
    }
    return fd < 0 ? -errno : fd;
}

static int open_one(int *how)
{
    int fd = -1;
    for (*how = DMH_UFFD_DEVICE; *how <= DMH_UFFD_USER_ONLY; ++*how)
        if ((fd = uffd_open_as(*how)) >= 0)
            break;
    return fd;
}

static int open_with(int *how, uint64_t *features, uint64_t more)
{
    /* The first UFFDIO_API of a descriptor fixes its features, so asking what there is costs a descriptor. */
    int fd = open_one(how);
    if (fd < 0)
        return fd;
    struct uffdio_api api = { .api = UFFD_API };
    int r = ioctl(fd, UFFDIO_API, &api);
    int e = errno;
    close(fd);
    if (r < 0)
        return -e;
    *features = api.features;
    uint64_t wanted = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID | more;
    if ((api.features & wanted) != wanted)
        return -EOPNOTSUPP;
    fd = open_one(how);
    if (fd < 0)
        return fd;
    wanted |= api.features & (UFFD_FEATURE_POISON | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
    api = (struct uffdio_api){ .api = UFFD_API, .features = wanted };
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

/* A userfaultfd of this process that can watch shared memory; *features: what the kernel offers. */
int dmh_uffd_open(int *how, uint64_t *features) { return open_with(how, features, 0); }

/* One that announces forks, each with a userfaultfd of the child's.  -EPERM without CAP_SYS_PTRACE. */
int dmh_uffd_open_following(int *how, uint64_t *features) { return open_with(how, features, UFFD_FEATURE_EVENT_FORK); }

/*
 * Watch for missing pages.  Write protection is registered beside it and never used: it keeps the kernel from mapping 16 neighbours when one unmapped
 * page is read (fault-around), so that a page in the page table is one that was used (dmh_idle.c).  Kernels that cannot do it do without.
 */
int dmh_uffd_register(int uffd, void *base, uint64_t bytes)
{
    struct uffdio_register r = { .range = { (uint64_t)(uintptr_t)base, bytes },
                                 .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP };
    if (ioctl(uffd, UFFDIO_REGISTER, &r) == 0)
        return 0;
    r.mode = UFFDIO_REGISTER_MODE_MISSING;
    return ioctl(uffd, UFFDIO_REGISTER, &r) < 0 ? -errno : 0;
}

/* Wake whoever waits in the range; -EINVAL where no mapping of that userfaultfd's process can have it. */
int dmh_uffd_wake(int uffd, uint64_t base, uint64_t bytes)
{
    struct uffdio_range r = { base, bytes };
    return ioctl(uffd, UFFDIO_WAKE, &r) < 0 ? -errno : 0;
}

/* Does registering keep the kernel from mapping neighbours?  By the features that dmh_uffd_open reports. */
int dmh_uffd_exact(uint64_t features)
{
    const uint64_t needed = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    return (features & needed) == needed;
}

/*
 * Map the region so that it is safe before it is touched: no huge pages (punching one destroys data), and not inherited by
 * children, whose unregistered copy would make zeros for everybody; dmh_follow_forks changes that once it is registered.  NULL with errno set on
 * failure.
 */
void *dmh_map_region(int memfd, uint64_t bytes, uint64_t align, int writable)
{
    /* In front of it one page that nobody can touch, behind it the birth page (dmh_fork.c). */
    uint64_t whole = bytes + align + 2 * DMH_KERNEL_PAGE;
    uint8_t *space = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return NULL;
    uint8_t *base = (uint8_t *)(((uintptr_t)space + DMH_KERNEL_PAGE + align - 1) & ~(uintptr_t)(align - 1));
    uint8_t *first = base - DMH_KERNEL_PAGE, *end = base + bytes + DMH_KERNEL_PAGE;
    if (first > space)
        munmap(space, (size_t)(first - space));
    if (end < space + whole)
        munmap(end, (size_t)(space + whole - end));
    void *p = mmap(base, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED | MAP_NORESERVE, memfd, 0);
    if (p == MAP_FAILED || madvise(p, bytes, MADV_NOHUGEPAGE) < 0 || madvise(p, bytes, MADV_DONTFORK) < 0) {
        int e = errno;
        /* A kernel built without transparent huge pages says EINVAL: then there is nothing to switch off. */
        if (p != MAP_FAILED && e == EINVAL && madvise(p, bytes, MADV_DONTFORK) == 0)
            return p;
        munmap(first, (size_t)(end - first));
        errno = e;
        return NULL;
    }
    return p;
}

int dmh_unmap(void *base, uint64_t bytes)
{
    return munmap((uint8_t *)base - DMH_KERNEL_PAGE, bytes + 2 * DMH_KERNEL_PAGE) < 0 ? -errno : 0;
}

int dmh_seal_mapping(void *base, uint64_t bytes) { return syscall(SYS_mseal, base, bytes, 0ul) < 0 ? -errno : 0; }

/* Replace the mapping by one that cannot be touched: a stale array gets SIGSEGV, never zeros. */
int dmh_guard_mapping(void *base, uint64_t bytes)
{
    void *p = mmap(base, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? -errno : 0;
}

int dmh_region_create(const char *name, uint64_t bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        int e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

/* ---- the table of views ---- */

struct dmh_ctx *dmh_ctx_new(struct dmh_shared *s, int region_fd, void *slots_base, uint32_t worker)
{
    struct dmh_ctx *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    /* A view must be able to join or leave under a load of readers. */
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&c->lock, &attr);
    c->s = s;
    c->words = dmh_words(s);
    c->sums = dmh_sums(s);
    c->copies = dmh_copies(s);
    c->pins = dmh_pins(s);
    c->advice = dmh_advice(s);
    c->calm = dmh_calm(s);
    c->counters = dmh_counters_of(s, worker);
    c->region_fd = region_fd;
    c->slots_base = slots_base;
    c->worker = worker;
    s->pids[worker] = (uint32_t)getpid();
    c->epoll_fd = c->event_fd = c->store_fd = c->stat_fd = -1;
    c->gap_ns = 1000000;
    return c;
}

/*
 * Monitor: the programs' views are read by dmh_receive, which reads ahead by `streams`; with `follow`, the fault path moves to where the faults come from,
 * and with `keep` the other of two processors may be kept from being idle for its sake.
 */
int dmh_ctx_watch(struct dmh_ctx *c, int follow, int keep, struct dmh_streams *streams)
{
    c->follow = follow;
    c->may_keep = keep;
    c->followed_cpu = -1;
    c->seen = calloc(c->s->pages, sizeof *c->seen);
    c->streams = streams;
    c->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!c->seen || c->epoll_fd < 0 || c->event_fd < 0)
        return -errno;
    struct epoll_event e = { .events = EPOLLIN, .data.u32 = 0 };
    int r = epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, c->event_fd, &e) < 0 ? -errno : 0;
    for (uint32_t i = 0; i < c->nviews && !r; i++) /* of programs that were there before this monitor */
        if (!c->views[i].own) {
            e.data.u32 = c->views[i].id;
            r = epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, c->views[i].uffd, &e) < 0 ? -errno : 0;
        }
    return r;
}

void dmh_interrupt(struct dmh_ctx *c)
{
    uint64_t one = 1;
    if (write(c->event_fd, &one, 8) < 0) {
        /* The counter is full: the wake-up is already pending. */
    }
}

int dmh_view_add(struct dmh_ctx *c, uint32_t id, int uffd, uint64_t base, int pid, int own)
{
    int r = 0;
    pthread_rwlock_wrlock(&c->lock);
    if (find_view(c, id)) {
        /* A launcher that took over tells everybody of every view; what is known stays as it is. */
        pthread_rwlock_unlock(&c->lock);
        close(uffd);
        return 0;
    }
    if (c->nviews == DMH_MAX_VIEWS)
        r = -ENOSPC;
    if (!r && c->epoll_fd >= 0 && !own) {
        struct epoll_event e = { .events = EPOLLIN, .data.u32 = id };
        r = epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, uffd, &e) < 0 ? -errno : 0;
    }
    if (!r && own)
        c->own_base = (uint8_t *)(uintptr_t)base;
    if (!r) {
        struct view *v = &c->views[c->nviews++];
        *v = (struct view){ .id = id, .uffd = uffd, .pid = pid, .own = own, .base = base };
        open_for_looking(c, v);
    }
    pthread_rwlock_unlock(&c->lock);
    return r;
}

int dmh_view_remove(struct dmh_ctx *c, uint32_t id)
{
    int r = -ENOENT;
    pthread_rwlock_wrlock(&c->lock);
    for (uint32_t i = 0; i < c->nviews; i++)
        if (c->views[i].id == id) {
            if (c->epoll_fd >= 0)
                epoll_ctl(c->epoll_fd, EPOLL_CTL_DEL, c->views[i].uffd, NULL);
            close(c->views[i].uffd);
            close_after_looking(&c->views[i]);
            c->views[i] = c->views[--c->nviews];
            r = 0;
            break;
        }
    pthread_rwlock_unlock(&c->lock);
    return r;
}

struct view *find_view(struct dmh_ctx *c, uint32_t id)
{
    for (uint32_t i = 0; i < c->nviews; i++)
        if (c->views[i].id == id)
            return &c->views[i];
    return NULL;
}

struct view *own_view(struct dmh_ctx *c)
{
    for (uint32_t i = 0; i < c->nviews; i++)
        if (c->views[i].own)
            return &c->views[i];
    return NULL;
}

/* ---- filling and waking ---- */

enum verdict uffd_verdict(int error)
{
    switch (error) {
    case 0: return V_DONE;
    case EAGAIN: return V_RETRY;            /* the address space is changing, or the call was partial */
    case EEXIST: return V_EXISTS;
    case ENOENT: case ESRCH: return V_GONE; /* no such mapping any more; no such process any more */
    case ENOMEM: return V_NOMEM;
    default: return V_BAD;
    }
}

/*
 * Put content (NULL: zeros) at offset of a view, for pages whose claim the caller holds.  A page that is there already was made
 * by somebody who touched the region through a mapping of his own (then it is zeros, and goes), or, with `resume`, is what a
 * worker had installed before it died (then the application may have written to it, and it stays).
 */
enum verdict fill(struct dmh_ctx *c, struct view *v, uint64_t offset, uint64_t bytes, const uint8_t *from, int resume)
{
    struct view *const waits = v;
    uint64_t done = 0;
    int memory_retries = 0, existed = 0;
    while (done < bytes) {
        int64_t moved;
        int r;
        if (from) {
            struct uffdio_copy k = { .dst = v->base + offset + done, .src = (uint64_t)(uintptr_t)from + done, .len = bytes - done,
                                     .mode = c->holds_wakes ? UFFDIO_COPY_MODE_DONTWAKE : 0 };
            r = ioctl(v->uffd, UFFDIO_COPY, &k);
            moved = k.copy;
        } else {
            struct uffdio_zeropage k = { .range = { v->base + offset + done, bytes - done } };
            r = ioctl(v->uffd, UFFDIO_ZEROPAGE, &k);
            moved = k.zeropage;
        }
        int error = r < 0 ? errno : 0;
        if (error && moved > 0)
            done += (uint64_t)moved; /* a partial call; the field holds -errno where nothing moved */
        else if (!error)
            done = bytes;
        if (done >= bytes)
            break;
        switch (uffd_verdict(error)) {
        case V_RETRY:
            if (moved <= 0 && c->epoll_fd >= 0)
                v = own_view(c); /* a fork is under way until its event is read, which is this process's to do */
            else if (moved <= 0)
                sched_yield();
            continue;
        case V_EXISTS:
            if (resume) {
                existed = 1;
                done += DMH_KERNEL_PAGE;
            } else if (punch(c, offset + done, DMH_KERNEL_PAGE) < 0) {
                dmh_die("cannot remove a page that a foreign mapping made: %s", strerror(errno));
            } else {
                count(c, DMH_C_INTRUDED, 1);
            }
            continue;
        case V_NOMEM:
            if (memory_retries++ < 1000) {
                usleep(1000);
                continue;
            }
            return V_NOMEM;
        case V_GONE: return V_GONE;
        default:
            dmh_die("%s of %llu bytes at offset %llu failed: %s", from ? "UFFDIO_COPY" : "UFFDIO_ZEROPAGE",
                    (unsigned long long)bytes, (unsigned long long)offset, strerror(error));
        }
    }
    if (existed || v != waits)
        wake_view(waits, offset, bytes); /* EEXIST does not wake, nor does filling through another view */
    return V_DONE;
}

void wake_view(struct view *v, uint64_t offset, uint64_t bytes)
{
    struct uffdio_range r = { v->base + offset, bytes };
    /* It fails only where the process or the mapping is gone: then nobody waits there. */
    ioctl(v->uffd, UFFDIO_WAKE, &r);
}

void wake_others(struct dmh_ctx *c, struct view *except, uint64_t page, uint64_t n)
{
    for (uint32_t i = 0; i < c->nviews; i++)
        if (&c->views[i] != except && !c->views[i].own)
            wake_view(&c->views[i], page << c->s->page_shift, n << c->s->page_shift);
}

void dmh_wake_pages(struct dmh_ctx *c, uint64_t page, uint64_t n)
{
    pthread_rwlock_rdlock(&c->lock);
    wake_others(c, NULL, page, n);
    pthread_rwlock_unlock(&c->lock);
}

int punch(struct dmh_ctx *c, uint64_t offset, uint64_t bytes)
{
    return fallocate(c->region_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);
}

/*
 * How many of the pages at offset are in the region's memory.  mincore on this process's own view neither faults nor makes pages, and costs what
 * the range is long; lseek(SEEK_HOLE) would walk over everything that is resident after it.
 */
uint64_t pages_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes)
{
    uint64_t n = 0;
    uint8_t *base = c->own_base;
    while (bytes) {
        unsigned char in_core[512];
        uint64_t part = bytes < sizeof in_core * DMH_KERNEL_PAGE ? bytes : sizeof in_core * DMH_KERNEL_PAGE;
        if (mincore(base + offset, part, in_core) < 0)
            dmh_die("mincore of %llu bytes at offset %llu: %s", (unsigned long long)part, (unsigned long long)offset, strerror(errno));
        for (uint64_t i = 0; i < part / DMH_KERNEL_PAGE; i++)
            n += in_core[i] & 1;
        offset += part, bytes -= part;
    }
    return n;
}

/* A hole from offset on, as after a punch?  SEEK_DATA walks over holes only, and there few steps lead far. */
int nothing_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes)
{
    off_t data = lseek(c->region_fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        dmh_die("looking for data at offset %llu: %s", (unsigned long long)offset, strerror(errno));
    return data < 0 || (uint64_t)data >= offset + bytes;
}

int page_is_present(struct dmh_ctx *c, uint64_t offset, uint64_t bytes)
{
    if (bytes == DMH_KERNEL_PAGE) /* a third of what mincore costs */
        return lseek(c->region_fd, (off_t)offset, SEEK_DATA) == (off_t)offset;
    return pages_present(c, offset, bytes) == bytes / DMH_KERNEL_PAGE;
}
