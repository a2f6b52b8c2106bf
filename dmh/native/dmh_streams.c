/*
 * Read-ahead: which pages a thread will want next, told from the faults it has had.  Pure: no system call, no shared state; the
 * table's words are only looked at.  In C because every fault passes here.  dmh/prefetch/streams.py states the rules.
 */
#include "internal.h"

#define STREAMS 8               /* kept for one thread; the one unused for longest goes */
#define RECENT 16               /* faults that met no stream, kept to find new ones */
#define FIRST_WINDOW 4          /* pages: a wrong guess costs little, and doubling makes a right one large soon */
#define TWO_WINDOWS 8           /* pages of the limit; below, one window is better than two that are mostly markers */
#define FARTHEST 64             /* pages; further apart, a window would bring in mostly what lies between */
#define DOUBT_MOST 3
#define SETS 256                /* of threads */
#define WAYS 4
#define PROVEN 2                /* a stream met so often is one; once may be chance */
#define THROUGH_LOCAL 1024      /* pages that a scan is followed through without a fault */
#define MEETINGS 16             /* markers met last, of all threads: the streams that they belong to are at work */
#define UNPROVEN_FAULTS 64      /* of its thread, after which a stream that is not proven is none */

struct stream {
    int64_t last;               /* the fault that extended it last */
    int64_t stride;
    int64_t marker;             /* the page left out, whose fault asks for the next window; last < marker <= next in its direction */
    int64_t next;               /* the first page that was not asked for */
    uint32_t window;            /* pages from one marker to the next */
    uint32_t before, behind;    /* pages asked for up to the marker, and behind it: neither used nor wasted yet */
    uint64_t used;              /* pages asked for and passed */
    uint32_t met;               /* times a fault has met its marker */
    uint32_t dense;             /* markers in a row at which everything that a longer step passes over was local */
    uint64_t at;                /* the thread's count of faults then */
    uint32_t id;                /* no two streams have the same */
    uint32_t resolver;          /* who was given its last window; 0: nobody yet */
    uint64_t ticket;            /* done when completed[resolver] has come to it */
};

struct thread {
    uint32_t id, doubt, widest; /* id 0: nobody.  doubt <= DOUBT_MOST; 1 <= widest <= limit of the window */
    uint32_t nstreams, nrecent;
    uint64_t faults, used_at;
    struct stream stream[STREAMS]; /* the one met last stands first */
    int64_t recent[RECENT];        /* a ring */
};

struct dmh_streams {
    uint32_t limit, widest;
    uint32_t ahead;             /* pages that all streams together may have ahead */
    uint32_t ids, met[MEETINGS], nmet; /* a ring of streams' ids */
    uint64_t clock, used, wasted;
    struct stream *last;        /* whose windows were returned last; valid until the next call */
    struct thread threads[SETS * WAYS];
};

/* limit: pages, the furthest that a stream reads ahead; 0: not at all.  ahead: pages, for all streams together. */
struct dmh_streams *dmh_streams_new(uint32_t limit, uint32_t ahead)
{
    struct dmh_streams *s = calloc(1, sizeof *s);
    if (s) {
        s->limit = limit < DMH_MAX_RUN ? limit : DMH_MAX_RUN;
        s->widest = s->limit < TWO_WINDOWS ? s->limit : s->limit / 2;
        s->ahead = ahead;
    }
    return s;
}

void dmh_streams_free(struct dmh_streams *s) { free(s); }
uint64_t dmh_streams_used(const struct dmh_streams *s) { return s->used; }
uint64_t dmh_streams_wasted(const struct dmh_streams *s) { return s->wasted; }

static struct thread *thread_of(struct dmh_streams *s, uint32_t id)
{
    struct thread *set = &s->threads[(id * 2654435761u >> 24) % SETS * WAYS], *oldest = set;
    for (int i = 0; i < WAYS; i++) {
        if (set[i].id == id && set[i].used_at) {
            set[i].used_at = ++s->clock;
            return &set[i];
        }
        if (set[i].used_at < oldest->used_at)
            oldest = &set[i];
    }
    memset(oldest, 0, sizeof *oldest);
    oldest->id = id;
    oldest->widest = s->widest;
    oldest->used_at = ++s->clock;
    return oldest;
}

/* Does the page lie where the stream has asked for pages, or next to that? */
static int covers(const struct stream *m, int64_t page)
{
    int64_t way = page - m->last;
    return way % m->stride == 0 && way / m->stride > 0 && way / m->stride <= (m->next - m->last) / m->stride + 1;
}

static int is_local(const struct dmh_outlook *o, int64_t page)
{
    if (!o->words || page < 0 || (uint64_t)page >= o->pages)
        return 0;
    uint32_t state = word_state(LOAD(&o->words[page]));
    return state == DMH_RESIDENT || state == DMH_FETCHING;
}

/* Ask for the window that begins at m->next, leaving out its first page: the marker.  A page that is local already would not fault, and is none. */
static int open_window(struct stream *m, const struct dmh_outlook *o, struct dmh_window *out)
{
    for (uint32_t i = 0; i < m->window && is_local(o, m->next); i++)
        m->next += m->stride;
    m->marker = m->next;
    *out = (struct dmh_window){ .first = m->next + m->stride, .stride = m->stride, .count = m->window - 1 };
    m->next += m->stride * (int64_t)m->window;
    m->behind += out->count;
    return out->count > 0;
}

/* Ask for what follows `page`, of which nothing was asked for or nothing came; where the stream is proven, for the window after that, too. */
static int begin(struct stream *m, int64_t page, const struct dmh_outlook *o, uint32_t limit, struct dmh_window *out)
{
    int n = 0;
    uint32_t count = limit < TWO_WINDOWS ? m->window : m->window - 1;
    m->next = page + m->stride;
    if (count) {
        out[n++] = (struct dmh_window){ .first = m->next, .stride = m->stride, .count = count };
        m->next += m->stride * (int64_t)count;
        m->before += count;
    }
    m->marker = m->next;
    return limit < TWO_WINDOWS || m->met < PROVEN ? n : n + open_window(m, o, out + n);
}

/*
 * How wide a window may be, so that the two that each stream at work has ahead stay local until the program comes there: what is read ahead leaves
 * first, and would be fetched again and again.
 */
static uint32_t share(const struct dmh_streams *s)
{
    uint32_t n = s->nmet < MEETINGS ? s->nmet : MEETINGS, streams = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t first = 0;
        while (s->met[first] != s->met[i])
            first++;
        streams += first == i;
    }
    uint32_t wide = s->ahead / (2 * (streams ? streams : 1));
    return wide > FIRST_WINDOW ? wide : FIRST_WINDOW;
}

static void widen(struct thread *t, struct stream *m, uint32_t widest, uint32_t most)
{
    /* A thread whose scans have been short is believed again when one goes on for a while. */
    if (m->window == t->widest && m->met % 4 == 0 && t->widest < widest)
        t->widest = t->widest * 2 < widest ? t->widest * 2 : widest;
    m->window = m->window * 2 < t->widest ? m->window * 2 : t->widest;
    m->window = m->window < most ? m->window : most;
}

static void passed(struct dmh_streams *s, struct stream *m, uint32_t n)
{
    m->used += n;
    s->used += n;
}

/*
 * The program is at `page`, which should have been there.  What was asked for up to it was used.  Where most of the rest is not there either, it did
 * not come, or leaves sooner than it is used, and less of it would have been better.
 */
static void missed(struct dmh_streams *s, struct stream *m, int64_t page, const struct dmh_outlook *o)
{
    uint32_t asked = m->before + m->behind, walked = (uint32_t)((page - m->last) / m->stride - 1), gone = 0;
    walked = walked < asked ? walked : asked;
    for (uint32_t i = 1; i <= asked - walked; i++)
        gone += !is_local(o, page + m->stride * (int64_t)i);
    passed(s, m, walked);
    if (gone > asked / 2) {
        s->wasted += gone;
        m->window = m->window / 2 > FIRST_WINDOW ? m->window / 2 : m->window < FIRST_WINDOW ? m->window : FIRST_WINDOW;
    }
    m->before = m->behind = 0;
    m->last = page;
}

static void end_stream(struct dmh_streams *s, struct thread *t, const struct stream *m)
{
    uint32_t unused = m->before + m->behind;
    s->wasted += unused;
    if (m->met < PROVEN)
        t->doubt += t->doubt < DOUBT_MOST;
    else if (unused > m->used && t->widest > FIRST_WINDOW)
        t->widest /= 2;
}

/* How many faults in a row, `stride` apart, have led to this page. */
static uint32_t votes(const struct thread *t, int64_t page, int64_t stride)
{
    uint32_t n = 0, have = t->nrecent < RECENT ? t->nrecent : RECENT, found = 1;
    while (found) {
        found = 0;
        page -= stride;
        for (uint32_t i = 0; i < have && !found; i++)
            found = t->recent[i] == page;
        n += found;
    }
    return n;
}

/* The stride of a scan that this fault shows, or 0: one vote for a neighbour, two for anything else, more after wrong guesses. */
static int64_t new_stride(const struct thread *t, int64_t page)
{
    uint32_t have = t->nrecent < RECENT ? t->nrecent : RECENT;
    for (int64_t stride = 1; stride >= -1; stride -= 2)
        if (votes(t, page, stride) >= 1 + t->doubt)
            return stride;
    for (uint32_t i = 1; i <= have; i++) {
        int64_t stride = page - t->recent[(t->nrecent - i) % RECENT];
        if (stride && stride <= FARTHEST && stride >= -FARTHEST && votes(t, page, stride) >= 2 + t->doubt)
            return stride;
    }
    return 0;
}

/* Make place i of the thread's streams the first. */
static struct stream *to_front(struct thread *t, uint32_t i)
{
    struct stream m = t->stream[i];
    memmove(t->stream + 1, t->stream, i * sizeof m);
    t->stream[0] = m;
    t->stream[0].at = t->faults;
    return t->stream;
}

/* Streams that were a guess, and wrong. */
static void forget_unproven(struct dmh_streams *s, struct thread *t)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < t->nstreams; i++)
        if (t->stream[i].met < PROVEN && t->faults - t->stream[i].at > UNPROVEN_FAULTS)
            end_stream(s, t, &t->stream[i]);
        else
            t->stream[kept++] = t->stream[i];
    t->nstreams = kept;
}

/*
 * Any longer step is borne out by a program that takes every page, and several such streams would share its scan.  What they step over is local then,
 * because the program has just been there; where it is local for other reasons a scan page by page fetches no more than they do.
 */
static int is_page_by_page(struct stream *m, int64_t page, const struct dmh_outlook *o)
{
    const int64_t one = m->stride > 0 ? 1 : -1;
    int64_t back = one;
    while (back != m->stride && is_local(o, page - back))
        back += one;
    m->dense = back == m->stride ? m->dense + 1 : 0;
    if (m->stride == one || m->dense < PROVEN)
        return 0;
    m->stride = one;
    return 1;
}

/* The marker of a stream was met: go on. */
static int go_on(struct dmh_streams *s, struct thread *t, struct stream *m, int64_t page, const struct dmh_outlook *o,
                 struct dmh_window *out)
{
    if (++m->met == PROVEN)
        t->doubt -= t->doubt > 0;
    s->met[s->nmet % MEETINGS] = m->id;
    s->nmet = s->nmet + 1 < 2 * MEETINGS ? s->nmet + 1 : MEETINGS;
    passed(s, m, m->before);
    m->before = m->behind;
    m->behind = 0;
    widen(t, m, s->widest, share(s));
    m->last = page;
    if (is_page_by_page(m, page, o)) {
        passed(s, m, m->before);
        m->before = 0;
        return begin(m, page, o, s->limit, out);
    }
    /* Nothing was asked for behind the marker yet, or the program goes on in the window that was. */
    return m->marker == m->next ? begin(m, page, o, s->limit, out) : open_window(m, o, out);
}

/* Stream i goes on at a page that is no marker of its. */
static int come_back(struct dmh_streams *s, struct thread *t, uint32_t i, int64_t page, const struct dmh_outlook *o, struct dmh_window *out)
{
    struct stream *m = to_front(t, i);
    missed(s, m, page, o);
    return begin(m, page, o, s->limit, out);
}

/* The windows just returned were given to a resolver, which is done with them when completed[resolver] is `ticket`. */
void dmh_streams_given(struct dmh_streams *s, uint32_t resolver, uint64_t ticket)
{
    s->last->resolver = resolver;
    s->last->ticket = ticket;
}

/* A scan faults nowhere while it walks through pages that are local: has this one come to `page` that way? */
static int has_come_to(const struct stream *m, const struct dmh_outlook *o, int64_t page)
{
    int64_t way = page - m->last;
    if (m->met < PROVEN || way % m->stride || way / m->stride <= 0 || way / m->stride > THROUGH_LOCAL)
        return 0;
    while ((page -= m->stride) != m->last)
        if (!is_local(o, page))
            return 0;
    return 1;
}

static int on_its_way(const struct stream *m, const struct dmh_outlook *o, int64_t page)
{
    return m->resolver && o->completed && LOAD(&o->completed[m->resolver]) < m->ticket && covers(m, page);
}

/*
 * A thread has faulted on a page: which windows to bring in now, at most two.  -N: none, because the page is in a window that resolver N has not
 * come to yet.
 */
int dmh_streams_observe(struct dmh_streams *s, uint32_t thread, uint64_t fault, const struct dmh_outlook *o, struct dmh_window *out)
{
    int64_t page = (int64_t)fault;
    const uint8_t advice = o->advice ? LOAD(&o->advice[fault]) : DMH_ADVICE_NORMAL;
    if (!s->limit || advice == DMH_ADVICE_RANDOM)
        return 0;
    struct thread *t = thread_of(s, thread);
    s->last = t->stream; /* where to_front() puts it */
    t->faults++;
    for (uint32_t i = 0; i < t->nstreams; i++)
        if (t->stream[i].marker == page)
            return go_on(s, t, to_front(t, i), page, o, out);
    for (uint32_t i = 0; i < t->nstreams; i++)
        if (on_its_way(&t->stream[i], o, page))
            return -(int)t->stream[i].resolver;
    for (uint32_t i = 0; o->words && i < t->nstreams; i++)
        if (has_come_to(&t->stream[i], o, page))
            return come_back(s, t, i, page, o, out);
    const int sequential = advice == DMH_ADVICE_SEQUENTIAL;
    int64_t stride = sequential ? 1 : new_stride(t, page);
    t->recent[t->nrecent++ % RECENT] = page;
    if (t->nrecent == 2 * RECENT)
        t->nrecent = RECENT;
    if (!stride)
        return 0;
    for (uint32_t i = 0; i < t->nstreams; i++)
        /* Its pages did not come (there was no room), or it has run past its marker, which another thread had brought in. */
        if (t->stream[i].stride == stride && covers(&t->stream[i], page))
            return come_back(s, t, i, page, o, out);
    forget_unproven(s, t);
    if (t->nstreams == STREAMS)
        end_stream(s, t, &t->stream[--t->nstreams]);
    memmove(t->stream + 1, t->stream, t->nstreams++ * sizeof *t->stream);
    t->stream[0] = (struct stream){ .id = ++s->ids, .last = page, .stride = stride, .at = t->faults,
                                     .window = FIRST_WINDOW < t->widest ? FIRST_WINDOW : t->widest };
    if (sequential) /* nothing has to be proven */
        t->stream[0].window = s->widest < share(s) ? s->widest : share(s), t->stream[0].met = PROVEN;
    return begin(&t->stream[0], page, o, s->limit, out);
}
