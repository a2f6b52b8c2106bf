/* The application's side that must not need the interpreter lock: touching pages, and the guardian. */
#include "internal.h"

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>

/* Read one byte every `step`: brings pages in.  Called with the interpreter lock released. */
int dmh_touch(void *base, uint64_t bytes, uint64_t step)
{
    volatile const uint8_t *p = base;
    unsigned sum = 0;
    for (uint64_t i = 0; i < bytes; i += step)
        sum += p[i];
    return (int)(sum & 0x7fffffff);
}

/*
 * The thread that ends the process when its service is gone for good.  Its other threads are then frozen in page faults,
 * likely holding the interpreter lock, so this is C and allocates nothing once it runs.
 */
struct guardian {
    pthread_t thread;
    int socket_fd, stop_pipe[2], grace_ms;
    char message[256];
};

static struct guardian *guardians[DMH_MAX_VIEWS];
static pthread_mutex_t guardians_lock = PTHREAD_MUTEX_INITIALIZER;

static void *watch(void *arg)
{
    struct guardian *g = arg;
    struct pollfd p[2] = { { .fd = g->socket_fd, .events = POLLRDHUP }, { .fd = g->stop_pipe[0], .events = POLLIN } };
    for (;;) {
        if (poll(p, 2, -1) < 0 && errno == EINTR)
            continue;
        if (p[1].revents)
            return NULL;
        if (p[0].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))
            break;
    }
    /* A program that is just closing the region, or ending, wins this race. */
    struct pollfd stop = { .fd = g->stop_pipe[0], .events = POLLIN };
    if (poll(&stop, 1, g->grace_ms) > 0)
        return NULL;
    if (write(2, g->message, strlen(g->message)) < 0) {
        /* Nowhere left to say it. */
    }
    signal(SIGBUS, SIG_DFL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    kill(getpid(), SIGBUS);
    usleep(200000);
    _exit(128 + SIGBUS);
}

int dmh_guardian_start(int socket_fd, int grace_ms, const char *message)
{
    struct guardian *g = calloc(1, sizeof *g);
    if (!g)
        return -ENOMEM;
    g->socket_fd = socket_fd;
    g->grace_ms = grace_ms;
    snprintf(g->message, sizeof g->message, "%s", message);
    pthread_mutex_lock(&guardians_lock);
    int h = 0;
    while (h < DMH_MAX_VIEWS && guardians[h])
        h++;
    int r = h == DMH_MAX_VIEWS ? -ENOSPC : pipe(g->stop_pipe) < 0 ? -errno : 0;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* the program's signals are for its own threads */
    if (!r)
        r = -pthread_create(&g->thread, NULL, watch, g);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!r)
        guardians[h] = g;
    pthread_mutex_unlock(&guardians_lock);
    if (r)
        free(g);
    return r ? r : h;
}

void dmh_guardian_stop(int h)
{
    pthread_mutex_lock(&guardians_lock);
    struct guardian *g = guardians[h];
    guardians[h] = NULL;
    pthread_mutex_unlock(&guardians_lock);
    if (!g)
        return;
    if (write(g->stop_pipe[1], "x", 1) == 1)
        pthread_join(g->thread, NULL);
    close(g->stop_pipe[0]);
    close(g->stop_pipe[1]);
    free(g);
}

int dmh_die_with_parent(void) { return prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 ? -errno : 0; }
