/*
 * Was a page used since it was marked?  Two ways to tell without touching its content or moving it; the third, the victim buffer, is
 * made of capture and fault.  Called by the evictor's idle sources (dmh/evict/idle/), a batch at a time.
 */
#include "internal.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

#define VECTORS 512             /* iovecs in one call; the kernel takes up to 1024 */
#define ENTRIES 512             /* pagemap entries in one read */
#define PM_PRESENT (1ull << 63)
#define PM_SWAPPED (1ull << 62)
#define PM_FRAME ((1ull << 55) - 1)

static uint64_t parts(const struct dmh_ctx *c) { return c->s->page_size / DMH_KERNEL_PAGE; }

/* Views carry what it takes to look into their processes, a pidfd and the pagemap: those that are there, and those to come. */
void dmh_ctx_look(struct dmh_ctx *c)
{
    pthread_rwlock_wrlock(&c->lock);
    c->look = 1;
    for (uint32_t i = 0; i < c->nviews; i++)
        open_for_looking(c, &c->views[i]);
    pthread_rwlock_unlock(&c->lock);
}

/* The processes whose views this context has, its own left out. */
int dmh_view_pids(struct dmh_ctx *c, int *out, int max)
{
    int n = 0;
    pthread_rwlock_rdlock(&c->lock);
    for (uint32_t i = 0; i < c->nviews && n < max; i++)
        if (!c->views[i].own)
            out[n++] = c->views[i].pid;
    pthread_rwlock_unlock(&c->lock);
    return n;
}

/* dmh_view_add's part: -1 in either field where this process lacks the right, and then nothing can be told of the view. */
void open_for_looking(struct dmh_ctx *c, struct view *v)
{
    char path[64];
    v->pidfd = v->pagemap_fd = -1;
    if (!c->look || v->own)
        return;
    snprintf(path, sizeof path, "/proc/%d/pagemap", v->pid);
    v->pidfd = (int)syscall(SYS_pidfd_open, v->pid, 0);
    v->pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
}

void close_after_looking(struct view *v)
{
    if (v->pidfd >= 0)
        close(v->pidfd);
    if (v->pagemap_fd >= 0)
        close(v->pagemap_fd);
}

/* 0, or -EPERM where a view cannot be looked into: what it uses would be taken for idle.  The caller holds the lock. */
static int all_visible(struct dmh_ctx *c)
{
    for (uint32_t i = 0; i < c->nviews; i++)
        if (!c->views[i].own && (c->views[i].pidfd < 0 || c->views[i].pagemap_fd < 0))
            return -EPERM;
    return 0;
}

/* The pagemap entries of `n` kernel pages at address; entries of a process that has ended are 0. */
static void read_entries(const struct view *v, uint64_t address, uint64_t *out, uint64_t n)
{
    ssize_t k = pread(v->pagemap_fd, out, n * 8, (off_t)(address / DMH_KERNEL_PAGE * 8));
    uint64_t got = k > 0 ? (uint64_t)k / 8 : 0;
    memset(out + got, 0, (n - got) * 8);
}

/* mapped[i] = 1 where any application has any part of pages[i] in its page table.  The caller holds the lock. */
static void look_mapped(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *mapped)
{
    const uint64_t each = parts(c), most = each < ENTRIES ? ENTRIES / each : 1;
    uint64_t entries[ENTRIES];
    memset(mapped, 0, n);
    for (uint32_t w = 0; w < c->nviews; w++) {
        const struct view *v = &c->views[w];
        if (v->own)
            continue;
        for (uint64_t i = 0, k; i < n; i += k) {
            k = run_of(pages, n, i, most);
            read_entries(v, v->base + pages[i] * c->s->page_size, entries, k * each);
            for (uint64_t j = 0; j < k * each; j++)
                mapped[i + j / each] |= (entries[j] & (PM_PRESENT | PM_SWAPPED)) != 0;
        }
    }
}

/* process_madvise takes what it can of a vector; a range that it refuses (being unmapped) is passed over. */
static void page_out(int pidfd, struct iovec *v, size_t n)
{
    while (n) {
        ssize_t k = syscall(SYS_process_madvise, pidfd, v, n, MADV_PAGEOUT, 0u);
        if (k < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (k < 0 && errno == ESRCH)
            return;
        size_t done = k > 0 ? (size_t)k : 0, before = n;
        while (n && done >= v->iov_len)
            done -= v->iov_len, v++, n--;
        if (n && n == before)
            v++, n--;
    }
}

/*
 * Take pages out of every application's page table, all in one go; they stay in the region's memory, because there is no swap for them to go to
 * (which the caller has made sure of).  A later touch maps the page again, without a userfaultfd message.  The kernel passes over pages that two
 * processes have mapped.  The caller holds the lock.  pages: ascending for the sake of runs.
 */
static void unmap_everywhere(struct dmh_ctx *c, const uint64_t *pages, uint64_t n)
{
    struct iovec vectors[VECTORS];
    for (uint32_t w = 0; w < c->nviews; w++) {
        const struct view *v = &c->views[w];
        if (v->own)
            continue;
        size_t used = 0;
        for (uint64_t i = 0, k; i < n; i += k) {
            k = run_of(pages, n, i, n);
            vectors[used++] = (struct iovec){ (void *)(uintptr_t)(v->base + pages[i] * c->s->page_size), k * c->s->page_size };
            if (used == VECTORS || i + k == n) {
                page_out(v->pidfd, vectors, used);
                used = 0;
            }
        }
    }
}

/*
 * Source `unmap`: marked[i] = 0: the page is mapped all the same, because two processes have it mapped or because it was touched at once.
 * Returns how many are marked, or -EPERM.
 */
int dmh_mark_unmap(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *marked)
{
    int count = 0;
    pthread_rwlock_rdlock(&c->lock);
    int r = all_visible(c);
    if (!r) {
        unmap_everywhere(c, pages, n);
        look_mapped(c, pages, n, marked);
    }
    pthread_rwlock_unlock(&c->lock);
    for (uint64_t i = 0; !r && i < n; i++) {
        marked[i] = !marked[i];
        count += marked[i];
    }
    return r ? r : count;
}

/* used[i] = 1 where pages[i], which was marked, is in a page table again.  Returns how many, or -EPERM. */
int dmh_look_unmap(struct dmh_ctx *c, const uint64_t *pages, uint64_t n, uint8_t *used)
{
    int count = 0;
    pthread_rwlock_rdlock(&c->lock);
    int r = all_visible(c);
    if (!r)
        look_mapped(c, pages, n, used);
    pthread_rwlock_unlock(&c->lock);
    for (uint64_t i = 0; !r && i < n; i++)
        count += used[i];
    return r ? r : count;
}

/* The frames of one page, from whichever application has it mapped.  Returns how many are known.  The caller holds the lock. */
static uint64_t frames_of(struct dmh_ctx *c, uint64_t page, uint64_t *frames)
{
    const uint64_t each = parts(c);
    uint64_t entries[ENTRIES], known = 0;
    for (uint64_t j = 0; j < each; j++)
        frames[j] = 0;
    for (uint32_t w = 0; w < c->nviews && known < each; w++) {
        const struct view *v = &c->views[w];
        if (v->own)
            continue;
        read_entries(v, v->base + page * c->s->page_size, entries, each);
        for (uint64_t j = 0; j < each; j++)
            if (!frames[j] && entries[j] & PM_PRESENT && entries[j] & PM_FRAME)
                frames[j] = entries[j] & PM_FRAME, known++;
    }
    return known;
}

/*
 * Source `page_idle`: set the kernel's idle flag on every frame of a page.  The bitmap takes aligned words of 64 frames; bits written as 0
 * leave their frames alone.  marked[i] = 0: the page is in nobody's page table.
 */
int dmh_mark_page_idle(struct dmh_ctx *c, int bitmap_fd, const uint64_t *pages, uint64_t n, uint8_t *marked)
{
    const uint64_t each = parts(c);
    uint64_t frames[ENTRIES];
    int count = 0, r = 0;
    pthread_rwlock_rdlock(&c->lock);
    for (uint64_t i = 0; !r && i < n; i++) {
        marked[i] = frames_of(c, pages[i], frames) > 0;
        count += marked[i];
        for (uint64_t j = 0, k; !r && marked[i] && j < each; j = k) {
            uint64_t word = 0, at = frames[j] / 64;
            for (k = j; k < each && frames[k] / 64 == at; k++)
                word |= frames[k] ? 1ull << frames[k] % 64 : 0;
            if (word && pwrite(bitmap_fd, &word, 8, (off_t)(at * 8)) != 8)
                r = errno ? -errno : -EIO;
        }
    }
    pthread_rwlock_unlock(&c->lock);
    return r ? r : count;
}

/* used[i] = 1 where the kernel has seen an access to any part of pages[i] since it was marked. */
int dmh_look_page_idle(struct dmh_ctx *c, int bitmap_fd, const uint64_t *pages, uint64_t n, uint8_t *used)
{
    const uint64_t each = parts(c);
    uint64_t frames[ENTRIES];
    int count = 0, r = 0;
    pthread_rwlock_rdlock(&c->lock);
    for (uint64_t i = 0; !r && i < n; i++) {
        used[i] = 0;
        frames_of(c, pages[i], frames);
        for (uint64_t j = 0; !r && !used[i] && j < each; j++) {
            uint64_t word;
            if (!frames[j])
                continue; /* in nobody's page table: nobody has used this part */
            if (pread(bitmap_fd, &word, 8, (off_t)(frames[j] / 64 * 8)) != 8)
                r = errno ? -errno : -EIO;
            else
                used[i] = !(word >> frames[j] % 64 & 1);
        }
        count += used[i];
    }
    pthread_rwlock_unlock(&c->lock);
    return r ? r : count;
}

/* Does pagemap tell this user frame numbers?  0, or -EPERM where they read as 0, or -errno. */
int dmh_probe_frames(void)
{
    uint64_t entry = 0;
    volatile int on_stack = 1;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t k = pread(fd, &entry, 8, (off_t)((uintptr_t)&on_stack / DMH_KERNEL_PAGE * 8));
    int r = k != 8 ? -EIO : entry & PM_FRAME ? 0 : -EPERM;
    close(fd);
    return r;
}

static int mapped_in(int pagemap_fd, const uint8_t *m)
{
    uint64_t entry = 0;
    return pread(pagemap_fd, &entry, 8, (off_t)((uintptr_t)m / DMH_KERNEL_PAGE * 8)) == 8 && entry & PM_PRESENT;
}

/*
 * Does unmapping another process's page work here, does pagemap show it, and do the bytes stay?  Tried on a child, because what is allowed on oneself
 * may not be allowed on others.  0, or -errno; -ENOTSUP: the page stayed mapped; -EILSEQ: its bytes were gone.
 */
int dmh_probe_unmap(void)
{
    /* The newest pages may still wait on the child's processor to be listed, and are passed over; the first of many is not among them. */
    const size_t bytes = 256 * DMH_KERNEL_PAGE;
    int told[2], pidfd = -1, pagemap_fd = -1, r = 0;
    int fd = memfd_create("dmh-probe", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    uint8_t *m = MAP_FAILED, byte = 0;
    if (ftruncate(fd, (off_t)bytes) < 0 || pipe2(told, O_CLOEXEC) < 0 ||
        (m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED) {
        r = -errno;
        close(fd);
        return r;
    }
    madvise(m, bytes, MADV_NOHUGEPAGE);
    pid_t pid = fork();
    if (pid == 0) {
        /* Only system calls here: another thread of the parent may hold any lock. */
        memset(m, 0x5a, bytes);
        if (write(told[1], "x", 1) == 1)
            pause();
        _exit(0);
    }
    r = pid < 0 ? -errno : read(told[0], &byte, 1) == 1 ? 0 : -EIO;
    if (!r) {
        struct view v = { .pid = pid };
        struct dmh_ctx c = { .look = 1 };
        open_for_looking(&c, &v);
        pidfd = v.pidfd, pagemap_fd = v.pagemap_fd;
        struct iovec vector = { m, bytes };
        if (pidfd < 0 || pagemap_fd < 0)
            r = -EPERM;
        else if (syscall(SYS_process_madvise, pidfd, &vector, 1, MADV_PAGEOUT, 0u) < 0)
            r = -errno;
        else if (mapped_in(pagemap_fd, m))
            r = -ENOTSUP;
        else
            for (size_t i = 0; i < bytes && !r; i++)
                r = m[i] == 0x5a ? 0 : -EILSEQ;
        close_after_looking(&v);
    }
    if (pid > 0) {
        kill(pid, SIGKILL);
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    munmap(m, bytes);
    close(fd);
    close(told[0]), close(told[1]);
    return r;
}
