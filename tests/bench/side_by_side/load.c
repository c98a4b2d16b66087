/* Open-loop load: requests are due at fixed times, whatever became of those before, and a latency counts from the time at
 * which its request was due. So a server that stalls is charged for every request that it kept waiting (no coordinated
 * omission). Each reply's status, length and content are checked.
 *
 * load --port N --request FILE --rate PER_SECOND --seconds S --connections C --expect FILE [--length BYTES]
 *      [--first TEXT] [--patience SECONDS]
 *
 * FILE of --request holds the bytes of one whole request, that of --expect what its reply must contain. With --first a latency ends
 * when TEXT has come (the first token), else with the reply. Prints one line of JSON; exit code 2: could not measure. */
#include "http1.h"

#include <getopt.h>

enum state { CONNECTING, IDLE, SENDING, WAITING };

struct connection {
    int fd;
    enum state state;
    int64_t due;      /* of the request that is on its way */
    int64_t first;    /* when the first token came; 0 until then */
    size_t sent;
    struct reply reply;
    char *body;
    size_t held, room;
    struct connection *next; /* in the queue of idle ones */
};

static struct {
    int port, epoll;
    char *request, *expect, *token;
    size_t request_size, expect_size;
    int64_t length;
    struct connection *idle_head, *idle_tail;
    size_t due, next, total, done;
    int64_t start, interval;
    double *latencies;
    size_t answered, bad_status, bad_length, bad_body, broken, reconnected;
} load = {.length = -1};

static void idle(struct connection *c) {
    c->state = IDLE;
    c->next = NULL;
    if (load.idle_tail) load.idle_tail->next = c;
    else load.idle_head = c;
    load.idle_tail = c;
}

static void leave_idle(struct connection *gone) {
    struct connection **at = &load.idle_head, *before = NULL;
    while (*at && *at != gone) {
        before = *at;
        at = &(*at)->next;
    }
    if (!*at) return;
    *at = gone->next;
    if (load.idle_tail == gone) load.idle_tail = before;
}

static void connect_again(struct connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->state = CONNECTING;
    c->fd = dial(load.port);
    if (c->fd < 0) fail("connect");
    watch(load.epoll, EPOLL_CTL_ADD, c->fd, EPOLLIN | EPOLLOUT, c);
}

static void finish(struct connection *c, int64_t at) {
    load.latencies[load.done++] = (double)(at - c->due) / 1e6;
}

static void take_body(void *who, const char *data, size_t size) {
    struct connection *c = who;
    if (c->held + size > c->room) {
        c->room = (c->held + size) * 2;
        c->body = realloc(c->body, c->room);
    }
    memcpy(c->body + c->held, data, size);
    c->held += size;
    if (load.token && !c->first && memmem(c->body, c->held, load.token, strlen(load.token))) c->first = now_ns();
}

static void answered(struct connection *c) {
    int64_t at = load.token && c->first ? c->first : now_ns();
    load.answered++;
    if (c->reply.status != 200) load.bad_status++;
    else if (load.length >= 0 && c->reply.body != load.length) load.bad_length++;
    else if (!memmem(c->body, c->held, load.expect, load.expect_size) || (load.token && !c->first)) load.bad_body++;
    finish(c, at);
    if (c->reply.closes) {
        load.reconnected++;
        connect_again(c);
    } else {
        idle(c);
    }
}

static void broken(struct connection *c) {
    if (c->state == SENDING || c->state == WAITING) {
        if (c->reply.part == UNTIL_CLOSE) { /* the end of the connection is the reply's end */
            c->reply.closes = 1;
            answered(c);
            return;
        }
        load.broken++;
        finish(c, now_ns());
    } else if (c->state == IDLE) {
        leave_idle(c);
        load.reconnected++;
    } else {
        fail("nothing listens on the port, or it does not take the connection");
    }
    connect_again(c);
}

static void send_more(struct connection *c) {
    while (c->sent < load.request_size) {
        ssize_t n = send(c->fd, load.request + c->sent, load.request_size - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                watch(load.epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c);
                return;
            }
            broken(c);
            return;
        }
        c->sent += (size_t)n;
    }
    c->state = WAITING;
}

/* Give the requests that are due to idle connections, the one that rested longest first. */
static void send_due(void) {
    while (load.next < load.due && load.idle_head) {
        struct connection *c = load.idle_head;
        load.idle_head = c->next;
        if (!load.idle_head) load.idle_tail = NULL;
        c->due = load.start + (int64_t)load.next++ * load.interval;
        c->state = SENDING;
        c->sent = c->held = 0;
        c->first = 0;
        reply_start(&c->reply);
        send_more(c);
    }
}

static void readable(struct connection *c) {
    static char data[65536];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0 || c->state == IDLE) {
        broken(c);
        return;
    }
    size_t used = reply_feed(&c->reply, data, (size_t)n, take_body, c);
    if (c->reply.part == DONE && used == (size_t)n) answered(c);
    else if (c->reply.part == BROKEN || c->reply.part == DONE) broken(c);
}

static void ready(struct connection *c, uint32_t events) {
    if (c->state == CONNECTING && events & EPOLLOUT && !(events & (EPOLLERR | EPOLLHUP))) {
        watch(load.epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
        idle(c);
    } else if (c->state == SENDING && events & EPOLLOUT) {
        watch(load.epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
        send_more(c);
    } else {
        readable(c);
    }
}

static void turn(int timeout_ms) {
    struct epoll_event events[256];
    int count = epoll_wait(load.epoll, events, 256, timeout_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait");
    for (int i = 0; i < count; i++)
        if (events[i].data.ptr) ready(events[i].data.ptr, events[i].events);
}

/* All connections are made before the first request is due. */
static void connect_all(struct connection *all, int count) {
    int64_t until = now_ns() + 10 * BILLION;
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        connect_again(&all[i]);
    }
    for (int i = 0; i < count; i++)
        while (all[i].state == CONNECTING) {
            if (now_ns() > until) fail("not all connections were made in 10 s");
            turn(100);
        }
}

static void run(double seconds, double rate, double patience) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(load.epoll, EPOLL_CTL_ADD, timer, EPOLLIN | EPOLLET, NULL);
    load.interval = (int64_t)(1e9 / rate);
    load.total = (size_t)(seconds * rate);
    load.latencies = calloc(load.total + 1, sizeof *load.latencies);
    load.start = now_ns() + 10000000;
    int64_t end = load.start + (int64_t)((seconds + patience) * 1e9);
    while (load.done < load.total && now_ns() < end) {
        int64_t now = now_ns();
        while (load.due < load.total && load.start + (int64_t)load.due * load.interval <= now) load.due++;
        send_due();
        if (load.due < load.total) set_timer(timer, load.start + (int64_t)load.due * load.interval);
        turn(100);
    }
}

static void report(struct connection *all, int count) {
    int64_t end = now_ns();
    size_t unanswered = load.total - load.done;
    for (int i = 0; i < count; i++) /* what nobody answered has waited until now, at least */
        if (all[i].state == SENDING || all[i].state == WAITING) finish(&all[i], end);
    for (; load.next < load.total; load.next++)
        load.latencies[load.done++] = (double)(end - load.start - (int64_t)load.next * load.interval) / 1e6;
    printf("{\"requests\": %zu, \"answered\": %zu, \"bad_status\": %zu, \"bad_length\": %zu, \"bad_body\": %zu, "
           "\"broken\": %zu, \"unanswered\": %zu, \"reconnected\": %zu, ",
           load.total, load.answered, load.bad_status, load.bad_length, load.bad_body, load.broken, unanswered,
           load.reconnected);
    print_percentiles("latency_ms", load.latencies, load.done);
    printf("}\n");
}

int main(int argc, char **argv) {
    double rate = 200, seconds = 5, patience = 5;
    int connections = 1, option;
    static const struct option options[] = {
        {"port", 1, 0, 'p'},   {"request", 1, 0, 'q'}, {"rate", 1, 0, 'r'},  {"seconds", 1, 0, 's'},  {"connections", 1, 0, 'c'},
        {"expect", 1, 0, 'e'}, {"length", 1, 0, 'l'},  {"first", 1, 0, 'f'}, {"patience", 1, 0, 't'}, {0}};
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) switch (option) {
            case 'p': load.port = atoi(optarg); break;
            case 'q': load.request = read_file(optarg, &load.request_size); break;
            case 'r': rate = atof(optarg); break;
            case 's': seconds = atof(optarg); break;
            case 'c': connections = atoi(optarg); break;
            case 'e': load.expect = read_file(optarg, &load.expect_size); break;
            case 'l': load.length = atoll(optarg); break;
            case 'f': load.token = optarg; break;
            case 't': patience = atof(optarg); break;
            default: return 2;
        }
    if (!load.port || !load.request || !load.expect || rate <= 0 || connections < 1) {
        fprintf(stderr, "load: --port, --request and --expect are needed; see the top of load.c\n");
        return 2;
    }
    load.epoll = epoll_create1(EPOLL_CLOEXEC);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    connect_all(all, connections);
    run(seconds, rate, patience);
    report(all, connections);
    return 0;
}
