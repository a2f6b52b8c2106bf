/*
 * Following forks: a child shares the region, through a userfaultfd of its own.
 *
 * fork() in a followed program blocks until the monitor has read its event, which brings the child's userfaultfd.  The kernel does not say
 * which process the child is.  So behind each followed mapping there is a birth page, anonymous and never present: the child touches it before
 * anything else, and the message of that fault names it.  The launcher fills the page when it knows both, so a child that gets past it is known,
 * or its userfaultfd is gone; it then asks the launcher which.
 */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* The birth page behind a mapping of the region: made before the mapping is registered, together with it. */
int dmh_birth_page(void *base, uint64_t bytes)
{
    uint8_t *page = (uint8_t *)base + bytes;
    if (mmap(page, DMH_KERNEL_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        return -errno;
    return madvise(page, DMH_KERNEL_PAGE, MADV_DONTFORK) < 0 ? -errno : 0;
}

/* From now on children inherit the mapping.  Its userfaultfd announces them, and somebody reads what it says. */
int dmh_follow_forks(void *base, uint64_t bytes)
{
    return madvise(base, bytes + DMH_KERNEL_PAGE, MADV_DOFORK) < 0 ? -errno : 0;
}

/* In a child: wait until the launcher knows it.  The page is absent again afterwards, for its own children. */
int dmh_be_born(void *base, uint64_t bytes)
{
    uint8_t *page = (uint8_t *)base + bytes;
    (void)*(volatile uint8_t *)page;
    return madvise(page, DMH_KERNEL_PAGE, MADV_DONTNEED) < 0 ? -errno : 0;
}

/* The launcher's side of dmh_be_born: let the child go on; with `refuse` it gets SIGBUS. */
int dmh_birth_answer(int uffd, uint64_t base, uint64_t bytes, int refuse)
{
    struct uffdio_zeropage fill = { .range = { base + bytes, DMH_KERNEL_PAGE } };
    struct poison_request poison = { .range = { base + bytes, DMH_KERNEL_PAGE } };
    struct uffdio_range wake = { base + bytes, DMH_KERNEL_PAGE };
    int r = refuse ? ioctl(uffd, IOC_POISON, &poison) : ioctl(uffd, UFFDIO_ZEROPAGE, &fill);
    int e = r < 0 ? errno : 0;
    ioctl(uffd, UFFDIO_WAKE, &wake);
    return -e;
}

/*
 * Has the process behind a mapping ended, or become another program?  The kernel tells nobody: ask for a page to be filled where none can be, in
 * front of the mapping, and look at the reason why it is not.
 */
int dmh_view_is_gone(int uffd, uint64_t base)
{
    static const uint8_t nothing[DMH_KERNEL_PAGE] __attribute__((aligned(DMH_KERNEL_PAGE)));
    struct uffdio_copy k = { .dst = base - DMH_KERNEL_PAGE, .src = (uint64_t)(uintptr_t)nothing, .len = DMH_KERNEL_PAGE };
    return ioctl(uffd, UFFDIO_COPY, &k) < 0 && errno == ESRCH;
}

/* A child that a view is of has said which process it is. */
void dmh_view_process(struct dmh_ctx *c, uint32_t id, int pid)
{
    pthread_rwlock_wrlock(&c->lock);
    struct view *v = find_view(c, id);
    if (v && !v->pid) {
        v->pid = pid;
        open_for_looking(c, v);
    }
    pthread_rwlock_unlock(&c->lock);
}

/* ---- the monitor's: what it reads of births, until the launcher has been told.  Added under the lock for reading, taken under the one for writing */

void note_birth(struct dmh_ctx *c, struct dmh_birth birth)
{
    if (c->births_n == c->births_room) {
        uint32_t room = c->births_room ? 2 * c->births_room : 64;
        struct dmh_birth *more = realloc(c->births, room * sizeof *more);
        if (!more)
            dmh_die("no memory to follow a fork");
        c->births = more, c->births_room = room;
    }
    c->births[c->births_n++] = birth;
}

/* The next one in order; 0: there is none, and whoever forked before this call has been listed. */
int dmh_next_birth(struct dmh_ctx *c, struct dmh_birth *out)
{
    pthread_rwlock_wrlock(&c->lock);
    int there = c->births_n > 0;
    if (there) {
        *out = c->births[0];
        memmove(c->births, c->births + 1, --c->births_n * sizeof *c->births);
    }
    pthread_rwlock_unlock(&c->lock);
    return there;
}
