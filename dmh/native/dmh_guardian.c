/*
 * The guardian: an application's thread that watches over the connection to the service, because every other thread may be frozen in a page
 * fault, likely with the interpreter lock.  So this is C, and allocates nothing once it runs.
 *
 * When the connection ends it asks whether anything of the service is left (the lock on `alive`).  Workers that live go on
 * resolving faults, so the program goes on too, while this thread tries to reach a launcher that takes over, and makes itself
 * known to it.  Nobody left: the process ends after a grace, in which a program that is just closing the region, or ending, wins.
 */
#include "internal.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#define LOOK_MS 50
#define ANSWER_MS 2000

struct guardian {
    pthread_t thread;
    int socket_fd;              /* its own descriptor of the connection */
    int alive_fd, stop_pipe[2];
    int grace_ms, launcher_grace_ms;
    struct sockaddr_un address;
    uint32_t state, rejoined;   /* DMH_SERVED ...; how many launchers have taken over */
    char name[72], resume[192];
    pthread_mutex_t lock;       /* over socket_fd and resume, against the threads that ask */
};

static struct guardian *guardians[DMH_MAX_VIEWS];
static pthread_mutex_t guardians_lock = PTHREAD_MUTEX_INITIALIZER;

/* 1: told to stop, within timeout_ms. */
static int stopped(struct guardian *g, int timeout_ms)
{
    struct pollfd stop = { .fd = g->stop_pipe[0], .events = POLLIN };
    return poll(&stop, 1, timeout_ms) > 0;
}

/* 0: the connection has ended.  1: told to stop. */
static int watch_connection(struct guardian *g)
{
    struct pollfd p[2] = { { .fd = g->socket_fd, .events = POLLRDHUP }, { .fd = g->stop_pipe[0], .events = POLLIN } };
    for (;;) {
        if (poll(p, 2, -1) < 0 && errno == EINTR)
            continue;
        if (p[1].revents)
            return 1;
        if (p[0].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))
            return 0;
    }
}

static int nobody_left(struct guardian *g)
{
    if (flock(g->alive_fd, LOCK_EX | LOCK_NB) < 0)
        return 0;
    flock(g->alive_fd, LOCK_UN);
    return 1;
}

/* Speak to the launcher that listens now.  1: it knows this program again.  0: none listens.  -1: it refuses. */
static int rejoin(struct guardian *g)
{
    char answer[512];
    struct timeval limit = { ANSWER_MS / 1000, (ANSWER_MS % 1000) * 1000 };
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), result = 0;
    if (fd < 0)
        return 0;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    pthread_mutex_lock(&g->lock);
    if (g->resume[0] && connect(fd, (struct sockaddr *)&g->address, sizeof g->address) == 0 &&
        send(fd, g->resume, strlen(g->resume), MSG_NOSIGNAL) > 0) {
        ssize_t n = recv(fd, answer, sizeof answer - 1, 0);
        answer[n > 0 ? n : 0] = 0;
        result = n <= 0 ? 0 : strstr(answer, "\"error\"") ? -1 : 1;
    }
    if (result > 0) {
        limit = (struct timeval){ 0, 0 };
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        close(g->socket_fd);
        g->socket_fd = fd;
        g->rejoined++;
    } else {
        close(fd);
    }
    pthread_mutex_unlock(&g->lock);
    return result;
}

static void __attribute__((noreturn)) end_process(const struct guardian *g, const char *what)
{
    char text[512];
    int n = snprintf(text, sizeof text,
                     "dmh: the service '%s' %s: ending process %d (its threads would wait forever; zeros are never handed out)\n",
                     g->name, what, (int)getpid());
    if (write(2, text, (size_t)n) < 0) {
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

/* After the connection's end.  0: a launcher has taken over.  1: told to stop.  Does not return where neither comes. */
static int outlive_launcher(struct guardian *g)
{
    const uint64_t began = now_ns();
    uint64_t alone_since = 0;
    int refused = 0;
    for (;;) {
        if (refused || nobody_left(g)) {
            STORE(&g->state, DMH_DESERTED);
            if (!alone_since)
                alone_since = now_ns();
            if (now_ns() - alone_since >= (uint64_t)g->grace_ms * 1000000)
                end_process(g, refused ? "does not know this program any more, and will not resolve its page faults"
                                       : "is gone, and with it the pages of this program that it held");
        } else {
            alone_since = 0;
            STORE(&g->state, DMH_WAITING);
            int r = rejoin(g);
            if (r > 0) {
                STORE(&g->state, DMH_SERVED);
                return 0;
            }
            refused = r < 0;
            if (now_ns() - began >= (uint64_t)g->launcher_grace_ms * 1000000)
                end_process(g, "has lost its launcher, and no other has taken over (dmh serve --adopt NAME) in time");
        }
        if (stopped(g, LOOK_MS))
            return 1;
    }
}

static void *watch(void *arg)
{
    struct guardian *g = arg;
    while (!watch_connection(g) && !outlive_launcher(g))
        ;
    return NULL;
}

static void discard(struct guardian *g)
{
    close(g->socket_fd);
    close(g->alive_fd);
    close(g->stop_pipe[0]);
    close(g->stop_pipe[1]);
    free(g);
}

/*
 * Watch over a connection to the service whose sockets are in `directory`.  Returns a handle.  grace_ms: how long nothing of the service may be left;
 * launcher_grace_ms: how long its workers may be without a launcher.
 */
int dmh_guardian_start(int socket_fd, const char *directory, const char *name, int grace_ms, int launcher_grace_ms)
{
    struct guardian *g = calloc(1, sizeof *g);
    char alive[sizeof g->address.sun_path];
    if (!g)
        return -ENOMEM;
    g->address.sun_family = AF_UNIX;
    g->grace_ms = grace_ms;
    g->launcher_grace_ms = launcher_grace_ms;
    pthread_mutex_init(&g->lock, NULL);
    snprintf(g->name, sizeof g->name, "%s", name);
    snprintf(g->address.sun_path, sizeof g->address.sun_path, "%s/control.sock", directory);
    snprintf(alive, sizeof alive, "%s/alive", directory);
    g->stop_pipe[0] = g->stop_pipe[1] = -1;
    /* This very file: a service that is started later under the same name makes another. */
    g->alive_fd = open(alive, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    g->socket_fd = fcntl(socket_fd, F_DUPFD_CLOEXEC, 0);
    int r = g->alive_fd < 0 || g->socket_fd < 0 || pipe2(g->stop_pipe, O_CLOEXEC) < 0 ? -errno : 0;
    pthread_mutex_lock(&guardians_lock);
    int h = 0;
    while (h < DMH_MAX_VIEWS && guardians[h])
        h++;
    if (!r && h == DMH_MAX_VIEWS)
        r = -ENOSPC;
    if (!r)
        r = start_thread(&g->thread, watch, g);
    if (!r)
        guardians[h] = g;
    pthread_mutex_unlock(&guardians_lock);
    if (r)
        discard(g);
    return r ? r : h;
}

/* What is sent to a launcher that has taken over.  Until it is given, none is spoken to. */
int dmh_guardian_resume(int h, const char *message)
{
    int n = 0;
    pthread_mutex_lock(&guardians_lock);
    struct guardian *g = guardians[h];
    if (g) {
        pthread_mutex_lock(&g->lock);
        n = snprintf(g->resume, sizeof g->resume, "%s", message);
        pthread_mutex_unlock(&g->lock);
    }
    pthread_mutex_unlock(&guardians_lock);
    return (size_t)n < sizeof g->resume ? 0 : -E2BIG;
}

int dmh_guardian_state(int h)
{
    pthread_mutex_lock(&guardians_lock);
    int state = guardians[h] ? (int)LOAD(&guardians[h]->state) : DMH_DESERTED;
    pthread_mutex_unlock(&guardians_lock);
    return state;
}

/* A new descriptor of the connection where more than *seen launchers have taken over, *seen then being their number; -EAGAIN where not. */
int dmh_guardian_rejoined(int h, uint32_t *seen)
{
    int fd = -EAGAIN;
    pthread_mutex_lock(&guardians_lock);
    struct guardian *g = guardians[h];
    if (g && LOAD(&g->rejoined) != *seen) {
        pthread_mutex_lock(&g->lock);
        fd = fcntl(g->socket_fd, F_DUPFD_CLOEXEC, 0);
        *seen = g->rejoined;
        pthread_mutex_unlock(&g->lock);
    }
    pthread_mutex_unlock(&guardians_lock);
    return fd < 0 && fd != -EAGAIN ? -errno : fd;
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
    discard(g);
}

/* In a forked child: the guardians are its parent's, and have no threads here. */
void dmh_guardians_forget(void)
{
    pthread_mutex_init(&guardians_lock, NULL); /* another thread of the parent's may have held it */
    for (int h = 0; h < DMH_MAX_VIEWS; h++)
        if (guardians[h]) {
            discard(guardians[h]);
            guardians[h] = NULL;
        }
}
