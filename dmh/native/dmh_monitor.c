/* The monitor's loop: read messages, look each page up in the table, and hand on only what needs a resolver. */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <sys/epoll.h>

#define MESSAGES 64

static int wait_for_messages(struct dmh_ctx *c, struct epoll_event *ready, int timeout_ms, int spin_us)
{
    int n = epoll_wait(c->epoll_fd, ready, MESSAGES, 0);
    if (n || !timeout_ms)
        return n;
    if (spin_us > 0)
        for (uint64_t end = now_ns() + (uint64_t)spin_us * 1000; now_ns() < end;)
            if ((n = epoll_wait(c->epoll_fd, ready, MESSAGES, 0)) != 0)
                return n;
    return epoll_wait(c->epoll_fd, ready, MESSAGES, timeout_ms);
}

/* 1: the fault goes on to a resolver. */
static int look_up(struct dmh_ctx *c, struct view *v, uint64_t address, uint64_t page)
{
    struct dmh_shared *s = c->s;
    for (;;) {
        uint64_t w = LOAD(&c->words[page]);
        switch (word_state(w)) {
        case DMH_FETCHING:
        case DMH_EVICTING:
            /* Who ends this state wakes the page after publishing, so this message is not needed. */
            count(c, DMH_C_DROPPED, 1);
            return 0;
        case DMH_RESIDENT: {
            uint64_t offset = (address - v->base) & ~(uint64_t)(DMH_KERNEL_PAGE - 1);
            if (page_is_present(c, offset, DMH_KERNEL_PAGE)) {
                wake_view(v, offset, DMH_KERNEL_PAGE);
                count(c, DMH_C_WOKEN, 1);
                return 0;
            }
            if (LOAD(&c->words[page]) != w)
                continue; /* it was being evicted while we looked */
            return 1;     /* resident by the table, absent in the file: a resolver deals with the damage */
        }
        default:
            if (c->seen[page] == word_generation(w) + 1) {
                count(c, DMH_C_DUPLICATES, 1);
                return 0;
            }
            c->seen[page] = word_generation(w) + 1;
            (void)s;
            return 1;
        }
    }
}

/*
 * Wait for page faults and return those that need a resolver, several messages for one page as one.
 * 0 after timeout_ms, after dmh_interrupt, or when everything that came was answered here.
 */
int dmh_receive(struct dmh_ctx *c, struct dmh_fault *out, int max, int timeout_ms, int spin_us)
{
    struct epoll_event ready[MESSAGES];
    struct uffd_msg messages[MESSAGES];
    int n = 0, events = wait_for_messages(c, ready, timeout_ms, spin_us);
    if (events <= 0)
        return events < 0 && errno != EINTR ? -errno : 0;
    uint64_t at = now_ns();
    pthread_rwlock_rdlock(&c->lock);
    for (int i = 0; i < events; i++) {
        if (ready[i].data.u32 == 0) {
            uint64_t ignored;
            if (read(c->event_fd, &ignored, 8) < 0)
                continue;
            continue;
        }
        struct view *v = find_view(c, ready[i].data.u32);
        if (!v || n >= max)
            continue;
        int room = max - n < MESSAGES ? max - n : MESSAGES;
        ssize_t got = read(v->uffd, messages, (size_t)room * sizeof *messages);
        if (got < 0)
            continue; /* EAGAIN after POLLIN is normal: the thread was woken meanwhile */
        int k = (int)(got / (ssize_t)sizeof *messages);
        count(c, DMH_C_MESSAGES, (uint64_t)k);
        for (int j = 0; j < k; j++) {
            if (messages[j].event != UFFD_EVENT_PAGEFAULT)
                continue;
            uint64_t address = messages[j].arg.pagefault.address;
            uint64_t page = (address - v->base) >> c->s->page_shift;
            if (address < v->base || page >= c->s->pages) {
                count(c, DMH_C_REFUSED, 1);
                continue;
            }
            if (look_up(c, v, address, page))
                out[n++] = (struct dmh_fault){ page, v->id, messages[j].arg.pagefault.feat.ptid, at };
        }
    }
    pthread_rwlock_unlock(&c->lock);
    return n;
}

/* A resolver died: what was sent to it will have to be sent again. */
void dmh_forget_dispatched(struct dmh_ctx *c) { memset(c->seen, 0, c->s->pages * sizeof *c->seen); }
