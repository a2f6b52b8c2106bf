/*
 * Where the fault path runs: beside the thread that faults, where wake-ups across processors are dear.
 *
 * While one thread alone faults, the monitor works on the processor that the thread has just left; it sleeps there until we are done.  When several
 * threads fault, we run anywhere.  The scheduler may take the thread elsewhere at any moment.  That shows in the time until its next fault, which then
 * has two dear wake-ups in it; a few such in a row, and we look where it is.
 *
 * Following is a trap where the scheduler moves the thread each time it is woken: it is given an idle processor, because its own is ours at that moment,
 * we go there, and the one that we leave is the idle one next time.  Every fault then takes six times as long, for as long as the faults come.  Two
 * processors have a way out: the other one is kept from being idle (`keep_busy`).  With more of them there is always one to spare, and sometimes the
 * thread is moved all the same: then we stop following for a while, and spin instead (dmh_monitor.c), so that it finds its own processor idle, or
 * used by the keeper alone, and stays there.  Spinning is of no use where the faults are a resolver's.
 */
#include "internal.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/resource.h>

#define LOOK_NS 20000000ull
#define LATE_NS 12000ull        /* the next fault of a thread on our own processor comes sooner, unless the thread computes */
#define LATE_LOOK 8
#define CHASE_NS 5000000ull     /* LATE_LOOK faults take a tenth of that where each has two dear wake-ups in it */
#define CHASES 3
#define KEEP_NS 1000000000ull   /* then see whether the scheduler still does that */
#define STAY_NS 200000000ull
#define NO_FAULTS_NS 300000ull
#define SETTLE_NS 100000ull
#define NEEDED_NS 1000000ull
#define YIELD_NS 20000000ull
#define LEAST_NICE 19
#define APART_NS 1000000ull     /* moving costs some 10 us */

/* Bind a thread to this processor, or to all `but` this one, or, for cpu -1, to none. */
static void bind_to(pid_t thread, int cpu, int but)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (cpu < 0 || (i == cpu) != but)
            CPU_SET(i, &set);
    sched_setaffinity(thread, sizeof set, &set);
}

/* The processor that a thread runs, or ran last, on; -1 if it is gone. */
static int processor_of(struct dmh_ctx *c, int pid, uint32_t thread)
{
    char text[1024], *p;
    if (c->stat_thread != thread) {
        char path[64];
        if (c->stat_fd >= 0)
            close(c->stat_fd);
        snprintf(path, sizeof path, "/proc/%u/task/%u/stat", pid ? (unsigned)pid : thread, thread); /* 0: a forked child */
        c->stat_fd = open(path, O_RDONLY | O_CLOEXEC); /* kept open: that halves the cost of the next look */
        c->stat_thread = thread;
    }
    ssize_t n = pread(c->stat_fd, text, sizeof text - 1, 0);
    if (n <= 0) {
        c->stat_thread = 0;
        return -1;
    }
    text[n] = 0;
    p = strrchr(text, ')'); /* the name before it may hold anything */
    for (int field = 2; p && field < 39; field++)
        p = strchr(p + 1, ' ');
    return p ? atoi(p + 1) : -1;
}

/* How many threads of the whole machine want to run now; 0 where that is not to be had. */
static int runnable(int loadavg_fd)
{
    char text[128];
    int running = 0;
    ssize_t n = pread(loadavg_fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    return sscanf(text, "%*s %*s %*s %d/", &running) == 1 ? running : 0;
}

/* More than the faulting thread, the monitor, this thread, and who of the workers is on his feet: somebody waits, perhaps for want of a processor. */
static int somebody_waits(struct dmh_ctx *c, int loadavg_fd)
{
    int ours = 3 + (LOAD(&c->s->rung_at) != 0);
    for (uint32_t w = 1; w + 1 < c->s->workers; w++)
        ours += LOAD(&dmh_lane_of(c->s, w)->awake) != 0;
    return runnable(loadavg_fd) > ours;
}

/*
 * Keep the processor that the fault path is not on from being idle, at the lowest priority, so that whoever wants it has it at once; while faults come,
 * and until somebody else on this machine waits to run.
 */
static void *keep_busy(void *context)
{
    struct dmh_ctx *c = context;
    int loadavg_fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    uint64_t look = 0, now;
    int waits = 0;
    setpriority(PRIO_PROCESS, (id_t)gettid(), LEAST_NICE);
    STORE(&c->keeper, gettid());
    for (;;) {
        now = now_ns();
        if (now >= LOAD(&c->keep_until_ns) || now > LOAD(&c->last_ns) + NO_FAULTS_NS) {
            STORE(&c->keeper_cpu, -1);
            STORE(&c->keeping, 0u);
            futex(&c->keeping, FUTEX_WAIT, 0, NULL);
            continue;
        }
        STORE(&c->keeper_cpu, sched_getcpu());
        sched_yield(); /* the lowest priority alone does not let a woken thread in before the next tick */
        if (now >= look) {
            look = now + NEEDED_NS;
            waits = somebody_waits(c, loadavg_fd) ? waits + 1 : 0;
            if (waits == 2) { /* not by chance */
                STORE(&c->keep_not_before_ns, now + YIELD_NS);
                STORE(&c->keep_until_ns, 0ull);
            }
        }
    }
    return NULL;
}

/*
 * To the processor of the thread that faults, which waits meanwhile.  The keeper goes to the one that we leave, and is there before the thread is woken: it
 * must not find that one idle, nor come back to the keeper's.
 */
static void go_to(struct dmh_ctx *c, int cpu, uint64_t now)
{
    STORE(&c->followed_cpu, cpu);
    count(c, DMH_C_MOVES, 1);
    int keeper = LOAD(&c->keeper), keeping = cpu >= 0 && keeper && LOAD(&c->keeping);
    if (keeping)
        bind_to(keeper, cpu, 1);
    /* The monitor and the resolver that takes single faults; the other resolvers and the evictor work beside the program. */
    bind_to(0, cpu, 0);
    if (c->s->pids[1])
        bind_to((pid_t)c->s->pids[1], cpu, 0);
    for (int at = -1; keeping && (at < 0 || at == cpu) && now_ns() < now + SETTLE_NS;)
        at = LOAD(&c->keeper_cpu);
}

static void keep_other_busy(struct dmh_ctx *c, uint64_t now)
{
    if (now < LOAD(&c->keep_not_before_ns))
        return;
    pthread_t thread;
    if (!c->keeper_started) /* of use from the next time on */
        c->keeper_started = start_thread(&thread, keep_busy, c) == 0 && pthread_detach(thread) == 0;
    STORE(&c->keep_until_ns, now + KEEP_NS);
    STORE(&c->keeping, 1u);
    futex(&c->keeping, FUTEX_WAKE, 1, NULL);
    count(c, DMH_C_KEPT, 1);
}

/* A fault of this thread has been read.  Called with the time at which the messages were, which c->last_ns is still before. */
void dmh_follow(struct dmh_ctx *c, struct view *v, uint32_t thread, uint64_t now)
{
    if (now < c->not_following_until_ns)
        return;
    if (thread != c->followed_thread)
        c->other_threads++;
    c->late = now - c->last_ns > LATE_NS ? c->late + 1 : 0;
    int chased = c->late >= LATE_LOOK;
    if (now < c->look_at_ns && !chased)
        return;
    int cpu = c->other_threads > 2 ? -1 : processor_of(c, v->pid, thread);
    c->look_at_ns = now + LOOK_NS;
    c->late = 0;
    c->followed_thread = thread;
    c->other_threads = 0;
    if (cpu == c->followed_cpu)
        return;
    c->chases = chased && now - c->moved_ns < CHASE_NS ? c->chases + 1 : 0;
    c->moved_ns = now;
    if (cpu >= 0 && c->chases >= CHASES) {
        c->chases = 0;
        if (c->may_keep && !(LOAD(&c->keeping) && c->inline_on)) {
            keep_other_busy(c, now);
        } else {
            if (LOAD(&c->keeping))
                bind_to(LOAD(&c->keeper), cpu, 0);
            c->not_following_until_ns = now + STAY_NS;
            cpu = -1;
        }
    }
    go_to(c, cpu, now);
}

/*
 * What reads ahead and what evicts take the most time of all, and the scheduler, once it has them on one processor, may leave them there
 * while another is idle: who wakes a resolver is mostly a server, which has its own in use at that moment.  So a resolver that finds LPET at work on its
 * processor goes to another one, if it may, and from there wherever the scheduler wants.
 */
void leave_lpet_alone(struct dmh_ctx *c, uint64_t now)
{
    int cpu = sched_getcpu();
    cpu_set_t mine, other;
    if (cpu < 0 || LOAD(&c->s->evicting_on) != (uint32_t)cpu + 1 || now < c->apart_ns || sched_getaffinity(0, sizeof mine, &mine) < 0)
        return;
    c->apart_ns = now + APART_NS;
    other = mine;
    CPU_CLR(cpu, &other);
    if (CPU_COUNT(&other) && sched_setaffinity(0, sizeof other, &other) == 0)
        sched_setaffinity(0, sizeof mine, &mine);
}
