/*
 * Pages out of a Redis or Valkey server: MGET over a connection that somebody else has made, replies straight into the rows that they are for.
 *
 * Owns the few forms that pages come in: an array of values, each of any length or absent.  Whatever else a server says (errors above all) is not
 * interpreted here but left, from its first byte on, to the client library that made the connection; dmh/store/redis.py hands it over.
 */
#include "internal.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define BUFFER (128u << 10)     /* bytes: a few of the pieces in which a server writes, and still within the processor's cache */
#define LONGEST_LINE 32         /* bytes of "*<count>\r\n" or "$<length>\r\n", with room to spare */
#define LONGEST_KEY 64

struct dmh_redis *dmh_redis_new(const uint8_t *prefix, uint32_t prefix_bytes, uint64_t page_size, uint32_t keys, uint32_t ahead)
{
    struct dmh_redis *r = prefix_bytes <= LONGEST_KEY ? calloc(1, sizeof *r) : NULL;
    if (!r)
        return NULL;
    /* "$<length>\r\n<prefix><8 bytes>\r\n" */
    r->record = malloc(LONGEST_LINE + prefix_bytes + 10);
    r->command = malloc(LONGEST_LINE + (uint64_t)keys * (LONGEST_LINE + prefix_bytes + 10));
    r->buffer = malloc(BUFFER);
    if (!r->record || !r->command || !r->buffer) {
        dmh_redis_free(r);
        return NULL;
    }
    r->number_at = (uint32_t)sprintf((char *)r->record, "$%u\r\n", prefix_bytes + 8) + prefix_bytes;
    memcpy(r->record + r->number_at - prefix_bytes, prefix, prefix_bytes);
    memcpy(r->record + r->number_at + 8, "\r\n", 2);
    r->record_bytes = r->number_at + 10;
    r->page_size = page_size;
    r->keys = keys;
    r->ahead = ahead;
    r->fd = -1;
    return r;
}

void dmh_redis_free(struct dmh_redis *r)
{
    free(r->record);
    free(r->command);
    free(r->buffer);
    free(r);
}

/* Until the socket can be read or written; the server may be silent for silence_ms, and the request takes no longer than until `end`. */
static int wait_for(struct dmh_redis *r, short what, uint64_t end)
{
    for (;;) {
        uint64_t now = now_ns();
        if (now >= end)
            return -ETIME;
        uint64_t left_ms = (end - now) / 1000000 + 1;
        int may_end = left_ms <= r->silence_ms;
        struct pollfd p = { .fd = r->fd, .events = what };
        int n = poll(&p, 1, (int)(may_end ? left_ms : r->silence_ms));
        if (n > 0)
            return 0;
        if (n == 0)
            return may_end ? -ETIME : -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

static int send_all(struct dmh_redis *r, const uint8_t *at, uint64_t left, uint64_t end)
{
    while (left) {
        ssize_t k = send(r->fd, at, left, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (k < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        int e = k < 0 && errno == EAGAIN ? wait_for(r, POLLOUT, end) : 0;
        if (e)
            return e;
        if (k > 0)
            at += k, left -= (uint64_t)k;
    }
    return 0;
}

static int send_mget(struct dmh_redis *r, const uint64_t *pages, uint64_t n, uint64_t end)
{
    uint8_t *at = r->command;
    at += sprintf((char *)at, "*%u\r\n$4\r\nMGET\r\n", (uint32_t)n + 1);
    for (uint64_t i = 0; i < n; i++, at += r->record_bytes) {
        uint64_t number = __builtin_bswap64(pages[i]);
        memcpy(at, r->record, r->record_bytes);
        memcpy(at + r->number_at, &number, 8);
    }
    return send_all(r, r->command, (uint64_t)(at - r->command), end);
}

/* Read what there is: up to `bytes` to `to`, what is beyond that to the buffer.  Returns how many bytes `to` got, or an error; never nothing at all. */
static int64_t receive(struct dmh_redis *r, uint8_t *to, uint64_t bytes, uint64_t end)
{
    if (r->at == r->have)
        r->at = r->have = 0;
    struct iovec v[2] = { { to, bytes }, { r->buffer + r->have, BUFFER - r->have } };
    struct msghdr m = { .msg_iov = bytes ? v : v + 1, .msg_iovlen = bytes ? 2 : 1 };
    for (;;) {
        /* The first reply of a request is hardly ever there already. */
        int e = r->flowing ? 0 : wait_for(r, POLLIN, end);
        ssize_t k = e ? 0 : recvmsg(r->fd, &m, MSG_DONTWAIT);
        if (e || !k)
            return e ? e : -ENOTCONN;
        r->flowing = k > 0;
        if (k > 0) {
            uint64_t direct = (uint64_t)k < bytes ? (uint64_t)k : bytes;
            r->have += (uint32_t)((uint64_t)k - direct);
            /* A server that answers in drips is never silent for long. */
            return now_ns() < end ? (int64_t)direct : -ETIME;
        }
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
    }
}

/* At least `bytes` (a line's length at most) into the buffer, together. */
static int need(struct dmh_redis *r, uint32_t bytes, uint64_t end)
{
    if (r->have - r->at < bytes && BUFFER - r->at < LONGEST_LINE) {
        memmove(r->buffer, r->buffer + r->at, r->have - r->at);
        r->have -= r->at, r->at = 0;
    }
    while (r->have - r->at < bytes) {
        int64_t k = receive(r, NULL, 0, end);
        if (k < 0)
            return (int)k;
    }
    return 0;
}

/* A line "<kind><number>\r\n", not yet passed.  Returns its length; 0: this is no such line. */
static int number_line(struct dmh_redis *r, uint8_t kind, int64_t *number, uint64_t end)
{
    int e, minus;
    uint32_t i;
    if ((e = need(r, 2, end)))
        return e;
    minus = r->buffer[r->at + 1] == '-';
    *number = 0;
    if (r->buffer[r->at] != kind)
        return 0;
    for (i = 1 + (uint32_t)minus; i < LONGEST_LINE - 2; i++) {
        if ((e = need(r, i + 2, end)))
            return e;
        uint8_t c = r->buffer[r->at + i];
        if (c == '\r')
            break;
        if (c < '0' || c > '9' || *number > INT64_MAX / 16)
            return 0;
        *number = *number * 10 + (c - '0');
    }
    if (i == 1 + (uint32_t)minus || r->buffer[r->at + i] != '\r' || r->buffer[r->at + i + 1] != '\n')
        return 0;
    *number = minus ? -*number : *number;
    return (int)i + 2;
}

/* The next `bytes` of the reply: to `to`, or nowhere. */
static int body(struct dmh_redis *r, uint8_t *to, uint64_t bytes, uint64_t end)
{
    while (bytes) {
        uint64_t k = r->have - r->at < bytes ? r->have - r->at : bytes;
        if (to)
            memcpy(to, r->buffer + r->at, k), to += k;
        r->at += (uint32_t)k, bytes -= k;
        if (!bytes)
            break;
        int64_t direct = receive(r, to, to ? bytes : 0, end);
        if (direct < 0)
            return (int)direct;
        if (to)
            to += direct, bytes -= (uint64_t)direct;
    }
    return 0;
}

/* One value: of pages[i] for row i. */
static int value(struct dmh_redis *r, uint8_t *row, uint8_t *found, uint64_t *length, uint64_t end)
{
    int64_t bytes;
    int line = number_line(r, '$', &bytes, end), e;
    if (line <= 0 || bytes < -1)
        return line < 0 ? line : -EBADMSG;
    r->at += (uint32_t)line;
    if (bytes < 0) {
        *found = 0; /* no such key, or one that is no string: MGET does not tell them apart */
        return 0;
    }
    *length = (uint64_t)bytes;
    *found = *length == r->page_size ? 1 : 2;
    if ((e = body(r, *found == 1 ? row : NULL, *length, end)) || (e = need(r, 2, end)))
        return e;
    e = memcmp(r->buffer + r->at, "\r\n", 2) ? -EBADMSG : 0;
    r->at += 2;
    return e;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* From now: 0.25 s or so and what the bytes take over a slow network, as for every other request (RedisLink). */
static uint64_t end_of(const struct dmh_redis *r, uint64_t bytes)
{
    uint64_t ms = least(r->connect_ms + bytes / r->slowest, r->most_ms);
    return now_ns() + (ms > r->silence_ms ? ms : r->silence_ms) * 1000000;
}

/*
 * pages[i] to row i of out; found[i] as a store's answer (1 there, 0 missing, 2 of another length, which is in length[i]).
 *
 * 0: done.  1: a reply is something else than an array of as many values, an error above all: what was received from its first byte on is in the
 * buffer.  Or -errno: -ETIMEDOUT the server was silent, -ETIME the request took too long, -ENOTCONN the server has closed the connection, -EBADMSG what
 * came was not the protocol.  After anything but 0 no other request may use the connection: replies may still come.
 */
int dmh_redis_get(struct dmh_redis *r, const uint64_t *pages, uint64_t n, uint8_t *out, uint8_t *found, uint64_t *length)
{
    const uint64_t end = end_of(r, n * r->page_size), commands = (n + r->keys - 1) / r->keys;
    uint64_t sent = 0;
    r->at = r->have = r->flowing = 0;
    for (uint64_t taken = 0; taken < commands; taken++) {
        int e = 0;
        int64_t count;
        for (; !e && sent < commands && sent - taken < r->ahead; sent++)
            e = send_mget(r, pages + sent * r->keys, least(r->keys, n - sent * r->keys), end);
        const uint64_t first = taken * r->keys, last = least(first + r->keys, n);
        int line = e ? e : number_line(r, '*', &count, end);
        if (line < 0)
            return line;
        if (!line || (uint64_t)count != last - first)
            return 1;
        r->at += (uint32_t)line;
        for (uint64_t i = first; i < last && !e; i++)
            e = value(r, out + i * r->page_size, &found[i], &length[i], end);
        if (e)
            return e;
    }
    return r->at == r->have ? 0 : -EBADMSG; /* more than was asked for */
}
