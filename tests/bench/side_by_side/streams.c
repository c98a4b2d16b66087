/* Server-sent events with their time in them: an upstream that sends them, and clients that hold many streams at once.
 *
 * streams serve --port N [--gap-ms 50]
 *   Answers what asks for `"stream": true` with `max_tokens` (or `max_completion_tokens`) events, one each gap, the first at once, then `[DONE]`; anything else
 *   with a small JSON body. An event's content is @number:nanoseconds@, by the clock that all processes of a machine share.
 *
 * streams hold --port N --request FILE --streams N --events N [--ramp-ms 1000] [--patience SECONDS]
 *   Opens the streams evenly over the ramp, reads each to its end and prints a line of JSON: events that were lost (a number is
 *   missing), not come when the patience ended, merged (one event with two contents), repeated or out of order; the time to the first token, each event's way
 *   from upstream to client, and by how much the gap before it grew on that way. Before that line it says `open EVENTS` when
 *   each stream has had an event, and `closing EVENTS` when the first one ends: between the two nothing but events happens. */
#include "http1.h"

#include <getopt.h>

enum { LONGEST = 65536, EVENT = 512 };

/* --- serve --- */

struct stream {
    int fd;
    size_t held;
    char request[LONGEST * 2];
    int64_t start, events, sent; /* events: 0 while none is under way */
};

static struct {
    int epoll;
    int64_t gap;
    struct stream **heap; /* by the time at which the next event is due */
    size_t count, room;
} serving;

static int64_t due(const struct stream *s) { return s->start + s->sent * serving.gap; }

static void swap(size_t a, size_t b) {
    struct stream *kept = serving.heap[a];
    serving.heap[a] = serving.heap[b];
    serving.heap[b] = kept;
}

static void sift_down(size_t at) {
    for (;;) {
        size_t least = at, left = 2 * at + 1, right = left + 1;
        if (left < serving.count && due(serving.heap[left]) < due(serving.heap[least])) least = left;
        if (right < serving.count && due(serving.heap[right]) < due(serving.heap[least])) least = right;
        if (least == at) return;
        swap(at, least);
        at = least;
    }
}

static void push(struct stream *s) {
    if (serving.count == serving.room) {
        serving.room = serving.room ? serving.room * 2 : 256;
        serving.heap = realloc(serving.heap, serving.room * sizeof *serving.heap);
    }
    size_t at = serving.count++;
    serving.heap[at] = s;
    for (; at && due(serving.heap[at]) < due(serving.heap[(at - 1) / 2]); at = (at - 1) / 2) swap(at, (at - 1) / 2);
}

static void drop(struct stream *s) {
    for (size_t at = 0; at < serving.count; at++)
        if (serving.heap[at] == s) {
            serving.heap[at] = serving.heap[--serving.count];
            for (size_t up = serving.count / 2 + 1; up-- > 0;) sift_down(up);
            break;
        }
    close(s->fd);
    free(s);
}

static size_t chunk(char *out, const char *text, size_t size) {
    size_t head = (size_t)sprintf(out, "%zx\r\n", size);
    memcpy(out + head, text, size);
    memcpy(out + head + size, "\r\n", 2);
    return head + size + 2;
}

static const char HEAD_OF_STREAM[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";
static const char CHUNK_OF[] =
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"m\",\"choices\":[{\"index\":0,"
    "\"delta\":{%s},\"finish_reason\":%s}]}\n\n";

/* Send the next event, the head before the first and the end after the last; 0 when the connection is no good. */
static int send_event(struct stream *s) {
    char out[EVENT * 4], event[EVENT], delta[96];
    size_t size = 0, text;
    if (s->sent == 0) {
        size = sizeof HEAD_OF_STREAM - 1;
        memcpy(out, HEAD_OF_STREAM, size);
    }
    snprintf(delta, sizeof delta, "%s\"content\":\"@%lld:%lld@\"", s->sent ? "" : "\"role\":\"assistant\",",
             (long long)s->sent, (long long)now_ns());
    text = (size_t)snprintf(event, sizeof event, CHUNK_OF, delta, "null");
    size += chunk(out + size, event, text);
    if (++s->sent == s->events) {
        text = (size_t)snprintf(event, sizeof event, CHUNK_OF, "", "\"stop\"");
        size += chunk(out + size, event, text);
        size += chunk(out + size, "data: [DONE]\n\n", 14);
        size += (size_t)sprintf(out + size, "0\r\n\r\n");
        s->events = 0;
    }
    return send(s->fd, out, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static void send_all_due(void) {
    int64_t now = now_ns();
    while (serving.count && due(serving.heap[0]) <= now) {
        struct stream *s = serving.heap[0];
        if (!send_event(s)) {
            drop(s);
        } else if (s->events) {
            sift_down(0);
        } else {
            serving.heap[0] = serving.heap[--serving.count];
            sift_down(0);
        }
    }
}

static int64_t number_after(const char *text, const char *name) {
    const char *found = strstr(text, name);
    return found ? atoll(found + strlen(name) + strspn(found + strlen(name), "\": ")) : 0;
}

static int answer_whole(struct stream *s) {
    static const char body[] =
        "{\"object\":\"list\",\"data\":[],\"id\":\"c1\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"ok\"},"
        "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}}";
    char out[1024];
    int size = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                        sizeof body - 1, body);
    return send(s->fd, out, (size_t)size, MSG_NOSIGNAL) == size;
}

/* Answer the request that has come, if it is whole; 0 when the connection is no good. */
static int answer(struct stream *s) {
    s->request[s->held] = 0;
    char *end = strstr(s->request, "\r\n\r\n");
    if (!end) return s->held < LONGEST;
    char *length = strcasestr(s->request, "\r\ncontent-length:");
    size_t size = (size_t)(end + 4 - s->request) + (length && length < end ? (size_t)atoll(length + 17) : 0);
    if (size >= sizeof s->request) return 0;
    if (s->held < size) return 1;
    if (s->events) return 0; /* a second request on a connection that still streams */
    char after = s->request[size];
    s->request[size] = 0;
    int streams = strstr(end, "\"stream\":true") || strstr(end, "\"stream\": true");
    int64_t events = number_after(end, "_tokens\"");
    s->request[size] = after;
    s->held -= size;
    memmove(s->request, s->request + size, s->held);
    if (!streams) return answer_whole(s);
    s->start = now_ns();
    s->sent = 0;
    s->events = events > 0 ? events : 1;
    if (!send_event(s)) return 0;
    if (s->events) push(s);
    return 1;
}

static void take_connections(int listener) {
    for (;;) {
        int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct stream *s = malloc(sizeof *s);
        s->fd = fd;
        s->held = 0;
        s->start = s->events = s->sent = 0;
        watch(serving.epoll, EPOLL_CTL_ADD, fd, EPOLLIN, s);
    }
}

static void take_request(struct stream *s) {
    ssize_t n = recv(s->fd, s->request + s->held, sizeof s->request - 1 - s->held, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        drop(s);
        return;
    }
    s->held += (size_t)n;
    if (!answer(s)) drop(s);
}

static _Noreturn void serve(int port) {
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&where, sizeof where) < 0 || listen(listener, 4096) < 0) fail("listen");
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    serving.epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(serving.epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &serving);
    watch(serving.epoll, EPOLL_CTL_ADD, timer, EPOLLIN | EPOLLET, NULL);
    for (;;) {
        struct epoll_event events[512];
        if (serving.count) set_timer(timer, due(serving.heap[0]));
        int count = epoll_wait(serving.epoll, events, 512, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &serving) take_connections(listener);
            else if (events[i].data.ptr) take_request(events[i].data.ptr);
        }
        send_all_due();
    }
}

/* --- hold --- */

enum state { CONNECTING, STREAMING, ENDED };

struct held {
    int fd;
    enum state state;
    struct reply reply;
    char event[LONGEST]; /* what has come of the event that is under way */
    size_t length;
    int64_t asked, sent_before, came_before, next;
    int done, whole;
};

static struct {
    int epoll, port, count;
    int64_t events;
    char *request;
    size_t request_size;
    struct held *streams;
    int begun, with_event, ended, closing;
    double *ttft, *delay, *gap;
    size_t ttfts, delays, gaps;
    size_t received, lost, late, merged, repeated, unreadable, bad_status, broken;
} held;

/* An event came whole. Its text may hold fields and framing of the server's own; the content is found in it. */
static void take_event(struct held *s, int64_t at) {
    int contents = 0;
    s->event[s->length] = 0;
    if (strstr(s->event, "[DONE]")) s->done = 1;
    for (char *mark = strchr(s->event, '@'); mark; mark = strchr(mark + 1, '@')) {
        long long number, sent;
        int size = 0;
        if (sscanf(mark, "@%lld:%lld@%n", &number, &sent, &size) != 2 || !size) {
            held.unreadable++;
            continue;
        }
        mark += size - 1;
        if (contents++) held.merged++;
        held.received++;
        if (held.delays < (size_t)held.count * (size_t)held.events) held.delay[held.delays++] = (double)(at - sent) / 1e6;
        if (number < s->next) {
            held.repeated++;
            continue;
        }
        if (number == 0) {
            held.with_event++;
            held.ttft[held.ttfts++] = (double)(at - s->asked) / 1e6;
        } else if (number == s->next) {
            held.gap[held.gaps++] = (double)((at - s->came_before) - (sent - s->sent_before)) / 1e6;
        }
        held.lost += (size_t)(number - s->next);
        s->next = number + 1;
        s->sent_before = sent;
        s->came_before = at;
    }
}

static void take_body(void *who, const char *data, size_t size) {
    struct held *s = who;
    int64_t at = now_ns();
    for (size_t i = 0; i < size; i++) {
        if (data[i] == '\r') continue;
        if (data[i] == '\n' && s->length && s->event[s->length - 1] == '\n') {
            take_event(s, at);
            s->length = 0;
        } else if (s->length + 1 < sizeof s->event) {
            s->event[s->length++] = data[i];
        }
    }
}

static void say(const char *what) {
    printf("%s %zu\n", what, held.received);
    fflush(stdout);
}

static void end(struct held *s, int in_time) {
    size_t missing = s->next < held.events ? (size_t)(held.events - s->next) : 0;
    if (!held.closing++) say("closing");
    if (s->reply.status && s->reply.status != 200) held.bad_status++;
    else if (in_time && (!s->whole || !s->done)) held.broken++;
    if (in_time) held.lost += missing;
    else held.late += missing;
    s->state = ENDED;
    held.ended++;
    close(s->fd);
}

static void begin(struct held *s) {
    reply_start(&s->reply);
    s->state = CONNECTING;
    s->asked = now_ns();
    s->fd = dial(held.port);
    if (s->fd < 0) fail("connect");
    watch(held.epoll, EPOLL_CTL_ADD, s->fd, EPOLLIN | EPOLLOUT, s);
}

static void ready(struct held *s, uint32_t events) {
    static char data[65536];
    if (s->state == ENDED) return;
    if (s->state == CONNECTING && events & EPOLLOUT && !(events & (EPOLLERR | EPOLLHUP))) {
        s->state = STREAMING;
        watch(held.epoll, EPOLL_CTL_MOD, s->fd, EPOLLIN, s);
        if (send(s->fd, held.request, held.request_size, MSG_NOSIGNAL) != (ssize_t)held.request_size) end(s, 1);
        return;
    }
    ssize_t n = recv(s->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN) return;
    int was_open = held.with_event;
    if (n > 0) reply_feed(&s->reply, data, (size_t)n, take_body, s);
    if (was_open < held.count && held.with_event == held.count) say("open");
    s->whole = s->reply.part == DONE || (n == 0 && s->reply.part == UNTIL_CLOSE);
    if (n <= 0 || s->whole || s->reply.part == BROKEN) end(s, 1);
}

static void hold(int64_t ramp, double patience) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(held.epoll, EPOLL_CTL_ADD, timer, EPOLLIN | EPOLLET, NULL);
    int64_t start = now_ns(), until = start + ramp + (int64_t)(patience * 1e9), step = ramp / held.count;
    while (held.ended < held.count && now_ns() < until) {
        struct epoll_event events[512];
        while (held.begun < held.count && start + held.begun * step <= now_ns()) begin(&held.streams[held.begun++]);
        if (held.begun < held.count) set_timer(timer, start + held.begun * step);
        int count = epoll_wait(held.epoll, events, 512, 100);
        for (int i = 0; i < count; i++)
            if (events[i].data.ptr) ready(events[i].data.ptr, events[i].events);
    }
    for (int i = 0; i < held.begun; i++)
        if (held.streams[i].state != ENDED) end(&held.streams[i], 0);
}

static int run_hold(int64_t ramp, double patience) {
    size_t all = (size_t)held.count * (size_t)held.events;
    held.epoll = epoll_create1(EPOLL_CLOEXEC);
    held.streams = calloc((size_t)held.count, sizeof *held.streams);
    held.ttft = calloc((size_t)held.count, sizeof(double));
    held.delay = calloc(all, sizeof(double));
    held.gap = calloc(all, sizeof(double));
    hold(ramp, patience);
    printf("{\"streams\": %d, \"expected\": %zu, \"events\": %zu, \"lost\": %zu, \"late\": %zu, \"merged\": %zu, \"repeated\": %zu, "
           "\"unreadable\": %zu, \"bad_status\": %zu, \"broken\": %zu, ",
           held.count, all, held.received, held.lost, held.late, held.merged, held.repeated, held.unreadable, held.bad_status,
           held.broken);
    print_percentiles("ttft_ms", held.ttft, held.ttfts);
    printf(", ");
    print_percentiles("delay_ms", held.delay, held.delays);
    printf(", ");
    print_percentiles("gap_ms", held.gap, held.gaps);
    printf("}\n");
    return 0;
}

int main(int argc, char **argv) {
    double gap_ms = 50, ramp_ms = 1000, patience = 30;
    int option;
    static const struct option options[] = {{"port", 1, 0, 'p'},    {"gap-ms", 1, 0, 'g'},  {"request", 1, 0, 'q'},  {"streams", 1, 0, 'n'},
                                            {"events", 1, 0, 'e'}, {"ramp-ms", 1, 0, 'r'}, {"patience", 1, 0, 't'}, {0}};
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) switch (option) {
            case 'p': held.port = atoi(optarg); break;
            case 'g': gap_ms = atof(optarg); break;
            case 'q': held.request = read_file(optarg, &held.request_size); break;
            case 'n': held.count = atoi(optarg); break;
            case 'e': held.events = atoll(optarg); break;
            case 'r': ramp_ms = atof(optarg); break;
            case 't': patience = atof(optarg); break;
            default: return 2;
        }
    const char *what = optind < argc ? argv[optind] : "";
    serving.gap = (int64_t)(gap_ms * 1e6);
    if (held.port && !strcmp(what, "serve")) serve(held.port);
    if (held.port && !strcmp(what, "hold") && held.request && held.count > 0 && held.events > 0)
        return run_hold((int64_t)(ramp_ms * 1e6), patience);
    fprintf(stderr, "streams serve --port N, or streams hold --port N --request FILE --streams N --events N; see streams.c\n");
    return 2;
}
