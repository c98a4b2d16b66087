/* What both programs need of HTTP/1.1: a reply read piece by piece, a connection, a clock, percentiles. */
#ifndef HTTP1_H
#define HTTP1_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define BILLION 1000000000LL

static void fail(const char *why) {
    fprintf(stderr, "%s%s%s\n", why, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(2);
}

/* Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share. */
static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * BILLION + t.tv_nsec;
}

static void set_timer(int fd, int64_t at_ns) {
    struct itimerspec when = {.it_value = {at_ns / BILLION, at_ns % BILLION}};
    timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* A socket that is connecting to a port of this machine, or -1. It is writable when it is connected. */
static int dial(int port) {
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) fail("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&where, sizeof where) < 0 && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

static void watch(int epoll, int op, int fd, uint32_t events, void *who) {
    struct epoll_event event = {.events = events, .data.ptr = who};
    if (epoll_ctl(epoll, op, fd, &event) < 0) fail("epoll_ctl");
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(*size + 1);
    if (fread(text, 1, *size, file) != *size) fail(path);
    text[*size] = 0;
    fclose(file);
    return text;
}

/* One reply, fed as it comes. `left` is what is missing of the body or the chunk; -1 until the head says it. */
enum part { HEAD, BODY, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, DONE, UNTIL_CLOSE, BROKEN };

struct reply {
    enum part part;
    int status, chunked, closes;
    int64_t left, body;
    char line[8192];
    size_t length;
};

static void reply_start(struct reply *r) {
    r->part = HEAD;
    r->status = r->chunked = r->closes = 0;
    r->left = -1;
    r->body = 0;
    r->length = 0;
}

static int header_is(const struct reply *r, const char *name, const char **value) {
    size_t length = strlen(name);
    if (strncasecmp(r->line, name, length) != 0 || r->line[length] != ':') return 0;
    *value = r->line + length + 1;
    *value += strspn(*value, " \t");
    return 1;
}

static void head_line(struct reply *r) {
    const char *value;
    if (r->length == 0) {
        if (r->status >= 100 && r->status < 200) reply_start(r); /* 100 Continue: the reply is still to come */
        else if (r->status == 0) r->part = BROKEN;
        else if (r->chunked) r->part = CHUNK_SIZE;
        else if (r->left < 0) r->part = UNTIL_CLOSE;
        else r->part = r->left ? BODY : DONE;
    } else if (r->status == 0) {
        if (sscanf(r->line, "HTTP/1.%*d %d", &r->status) != 1) r->part = BROKEN;
    } else if (header_is(r, "content-length", &value)) {
        r->left = atoll(value);
    } else if (header_is(r, "transfer-encoding", &value)) {
        r->chunked = strcasestr(value, "chunked") != NULL;
    } else if (header_is(r, "connection", &value)) {
        r->closes = strcasestr(value, "close") != NULL;
    }
}

static void full_line(struct reply *r) {
    r->line[r->length] = 0;
    if (r->length && r->line[r->length - 1] == '\r') r->line[--r->length] = 0;
    if (r->part == HEAD) {
        head_line(r);
    } else if (r->part == CHUNK_SIZE) {
        char *end;
        r->left = strtoll(r->line, &end, 16);
        r->part = end == r->line ? BROKEN : r->left ? CHUNK : TRAILER;
    } else if (r->part == CHUNK_END) {
        r->part = r->length ? BROKEN : CHUNK_SIZE;
    } else if (r->length == 0) { /* TRAILER */
        r->part = DONE;
    }
    r->length = 0;
}

/* Take bytes in until they are used up or the reply is DONE or BROKEN; returns how many were used. */
static size_t reply_feed(struct reply *r, const char *data, size_t size,
                         void (*body)(void *who, const char *data, size_t size), void *who) {
    size_t at = 0;
    while (at < size && r->part != DONE && r->part != BROKEN) {
        if (r->part == BODY || r->part == CHUNK || r->part == UNTIL_CLOSE) {
            size_t piece = size - at;
            if (r->part != UNTIL_CLOSE && (int64_t)piece > r->left) piece = (size_t)r->left;
            r->body += (int64_t)piece;
            body(who, data + at, piece);
            at += piece;
            if (r->part == UNTIL_CLOSE) continue;
            r->left -= (int64_t)piece;
            if (r->left == 0) r->part = r->part == BODY ? DONE : CHUNK_END;
        } else if (data[at] == '\n') {
            at++;
            full_line(r);
        } else if (r->length + 1 < sizeof r->line) {
            r->line[r->length++] = data[at++];
        } else {
            r->part = BROKEN;
        }
    }
    return at;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Writes `"name": {"n":, "p50":, "p99":, "max":}`; sorts the values. */
static void print_percentiles(const char *name, double *values, size_t count) {
    qsort(values, count, sizeof *values, by_size);
    if (count == 0) {
        printf("\"%s\": null", name);
        return;
    }
    printf("\"%s\": {\"n\": %zu, \"p50\": %.4f, \"p99\": %.4f, \"max\": %.4f}", name, count, values[count / 2],
           values[(size_t)((double)count * 0.99)], values[count - 1]);
}

#endif
