/* The bench's own upstream and load client: one thread each, epoll, very little CPU.

   load upstream                         serves on a free port of 127.0.0.1, prints it, runs until killed
   load client PORT FILE [name=value]..  sends the HTTP request in FILE over and over, prints one JSON line

   The upstream answers every POST with the Codex event stream that a message in the body asks for, because
   a gateway rewrites everything else: `bench n=1000 gap_ms=0 size=24` is 1,000 deltas of 24 characters, as
   fast as they are read. Each delta reads "@SEQUENCE:MICROSECONDS;padding", on the monotonic clock that
   both programs share; the client knows from it what was lost, reordered or late.

   Client options: connections, requests (in all) or seconds (none is started later), expect (deltas per
   answer), ramp_ms (between two new connections), window_ms (later deltas are not `kept`), timeout_s. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 32 << 10, READ_MAX = 1 << 20, BATCH = 16 << 10, CARRY = 96, FDS_MAX = 8192,
       DELTA_MAX = 64, TEXT_MAX = 1400000 };

static int poller;
static char scratch[CARRY + READ_MAX + 1];

static long now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

static void die(const char *what) { perror(what), exit(1); }

static void watch(int fd, void *owner, unsigned events, int how) {
  struct epoll_event want = {.events = events, .data.ptr = owner};
  if (epoll_ctl(poller, how, fd, &want)) die("epoll_ctl");
}

struct head { size_t len; bool whole; char bytes[HEAD_MAX + 1]; };

/* Collect a head; returns how many of the bytes were already body, moved to the front. */
static size_t read_head(struct head *h, char *bytes, size_t len) {
  size_t before = h->len, take = len < HEAD_MAX - before ? len : HEAD_MAX - before;
  memcpy(h->bytes + before, bytes, take);
  h->bytes[h->len += take] = 0;
  char *end = strstr(h->bytes, "\r\n\r\n");
  if (!(h->whole = end != 0)) return 0;
  end[2] = 0;
  size_t used = end + 4 - h->bytes - before;
  memmove(bytes, bytes + used, len - used);
  return len - used;
}

/* A header's number; `missing` without it. */
static long header(struct head *h, const char *name, long missing) {
  const char *found = strcasestr(h->bytes, name);
  return found ? atol(found + strlen(name)) : missing;
}

/* ---- upstream: HEAD -> BODY -> ANSWER -> HEAD ---------------------------------------------------- */

struct stream {
  int fd, slot;
  enum { HEAD, BODY, ANSWER } phase;
  struct head head;
  char carry[CARRY];
  size_t carry_len;
  long body_left;
  bool chosen, ended, wants_out;
  int n, size, sent, sequence;
  long gap_us, started;
  char *text, *out;
  size_t text_len, text_cap, out_len, out_at, out_cap;
};

static struct stream *streams[FDS_MAX];
static int streams_open;

static char batch[3 * TEXT_MAX + (1 << 20)];  /* the closing events hold the text three times */
static size_t batch_len;

static void put(struct stream *s, const char *bytes, size_t len) {
  if (s->out_len + len > s->out_cap) s->out = realloc(s->out, s->out_cap = (s->out_len + len) * 2);
  memcpy(s->out + s->out_len, bytes, len);
  s->out_len += len;
}

static void put_chunk(struct stream *s) {
  char size[24];
  if (!batch_len) return;
  put(s, size, sprintf(size, "%zx\r\n", batch_len));
  put(s, batch, batch_len), put(s, "\r\n", 2);
  batch_len = 0;
}

#define OPENING(type) "event: " type "\ndata: {\"type\":\"" type "\",\"sequence_number\":%d,"
#define EVENT(s, type, ...)                                                      \
  (batch_len += sprintf(batch + batch_len, OPENING(type), (s)->sequence++),      \
   batch_len += sprintf(batch + batch_len, __VA_ARGS__))

#define MESSAGE "\"id\":\"msg_bench\",\"type\":\"message\",\"role\":\"assistant\",\"phase\":\"final_answer\","
#define PART "\"item_id\":\"msg_bench\",\"output_index\":0,\"content_index\":0,"
#define RESPONSE                                                                                        \
  "\"response\":{\"id\":\"resp_bench\",\"object\":\"response\",\"created_at\":1795380000,\"status\":"   \
  "\"%s\",\"background\":false,\"error\":null,\"incomplete_details\":null,\"instructions\":null,"       \
  "\"max_output_tokens\":null,\"model\":\"gpt-5.4\",\"output\":[],\"parallel_tool_calls\":true,"        \
  "\"previous_response_id\":null,\"reasoning\":{\"effort\":\"medium\",\"summary\":null},"               \
  "\"service_tier\":\"auto\",\"store\":false,\"temperature\":1.0,\"text\":{\"format\":{\"type\":"       \
  "\"text\"},\"verbosity\":\"low\"},\"tool_choice\":\"auto\",\"tools\":[],\"top_p\":1.0,"               \
  "\"truncation\":\"disabled\",\"usage\":%s,\"user\":null,\"metadata\":{}}}\n\n"

static void add_delta(struct stream *s, long now) {
  static const char letters[] = " lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do";
  char delta[128];
  int len = sprintf(delta, "@%d:%ld;", s->sent++, now);
  if (len < s->size) len += sprintf(delta + len, "%.*s", s->size - len, letters);
  EVENT(s, "response.output_text.delta",
        PART "\"delta\":\"%.*s\",\"logprobs\":[],\"obfuscation\":\"aW5ub2NlbnQ\"}\n\n", len, delta);
  if (s->text_len + len > s->text_cap) s->text = realloc(s->text, s->text_cap = s->text_cap * 2 + 4096);
  memcpy(s->text + s->text_len, delta, len);
  s->text_len += len;
}

static void end_answer(struct stream *s) {
  int len = (int)s->text_len;
  EVENT(s, "response.output_text.done", PART "\"text\":\"%.*s\",\"logprobs\":[]}\n\n", len, s->text);
  EVENT(s, "response.content_part.done",
        PART "\"part\":{\"type\":\"output_text\",\"text\":\"%.*s\",\"annotations\":[]}}\n\n", len, s->text);
  EVENT(s, "response.output_item.done",
        "\"output_index\":0,\"item\":{" MESSAGE "\"status\":\"completed\",\"content\":[{\"type\":"
        "\"output_text\",\"text\":\"%.*s\",\"annotations\":[]}]}}\n\n", len, s->text);
  char usage[160];
  sprintf(usage, "{\"input_tokens\":20,\"output_tokens\":%d,\"total_tokens\":%d}", s->n, s->n + 20);
  EVENT(s, "response.completed", RESPONSE, "completed", usage);
  put_chunk(s);
  put(s, "0\r\n\r\n", 5);
  s->ended = true;
}

static long next_due(struct stream *s) { return s->started + s->sent * s->gap_us; }

static void fill(struct stream *s, long now) {
  while (s->sent < s->n && batch_len < BATCH && (!s->gap_us || next_due(s) <= now)) add_delta(s, now);
  put_chunk(s);
  if (s->sent == s->n && !s->ended) end_answer(s);
}

static void begin_answer(struct stream *s, long now) {
  static const char head[] =
      "HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 12:00:00 GMT\r\nContent-Type: text/event-stream; charset=utf-8"
      "\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\nCache-Control: no-cache\r\n"
      "x-codex-plan-type: plus\r\nx-codex-active-limit: premium\r\nx-codex-primary-used-percent: 12.5\r\n"
      "x-codex-primary-window-minutes: 300\r\nx-codex-primary-reset-at: 1895380000\r\n"
      "x-codex-secondary-used-percent: 3.0\r\nx-codex-secondary-window-minutes: 10080\r\n"
      "x-codex-secondary-reset-at: 1895980000\r\nx-codex-credits-has-credits: False\r\n"
      "x-models-etag: W/\"bench\"\r\nopenai-model: gpt-5.4\r\nx-request-id: req_bench\r\n\r\n";
  s->phase = ANSWER, s->ended = false, s->started = now;
  s->sent = s->sequence = s->text_len = s->out_at = s->out_len = 0;
  put(s, head, sizeof head - 1);
  EVENT(s, "response.created", RESPONSE, "in_progress", "null");
  EVENT(s, "response.in_progress", RESPONSE, "in_progress", "null");
  EVENT(s, "response.output_item.added",
        "\"output_index\":0,\"item\":{" MESSAGE "\"status\":\"in_progress\",\"content\":[]}}\n\n");
  EVENT(s, "response.content_part.added",
        PART "\"part\":{\"type\":\"output_text\",\"text\":\"\",\"annotations\":[],\"logprobs\":[]}}\n\n");
  fill(s, now);
}

static void drop(struct stream *s) {
  close(s->fd);
  streams[s->slot] = streams[--streams_open];
  streams[s->slot]->slot = s->slot;
  free(s->text), free(s->out), free(s);
}

/* One write of what is due. False when the connection is gone. */
static bool pump(struct stream *s, long now) {
  if (s->out_at == s->out_len) {
    s->out_at = s->out_len = 0;
    fill(s, now);
  }
  while (s->out_at < s->out_len) {
    ssize_t put_now = write(s->fd, s->out + s->out_at, s->out_len - s->out_at);
    if (put_now < 0 && errno != EAGAIN) return drop(s), false;
    if (put_now < 0) break;
    s->out_at += put_now;
  }
  bool empty = s->out_at == s->out_len;
  if (empty && s->ended) s->phase = HEAD, s->head.len = 0, s->chosen = false;
  bool wants_out = s->phase == ANSWER && (!empty || !s->gap_us);
  if (wants_out != s->wants_out) watch(s->fd, s, EPOLLIN | (wants_out ? EPOLLOUT : 0), EPOLL_CTL_MOD);
  s->wants_out = wants_out;
  return true;
}

/* Look for the knob in a piece of the body; a knob that is cut in two is put together by `carry`. */
static void choose(struct stream *s, char *piece, size_t len) {
  if (s->chosen) return;
  memcpy(piece - s->carry_len, s->carry, s->carry_len);
  piece -= s->carry_len, len += s->carry_len;
  char *knob = memmem(piece, len, "bench n=", 8);
  long gap_ms = 0;
  if (knob && (piece + len - knob > 64 || s->body_left <= 0)) {
    piece[len] = 0;
    sscanf(knob, "bench n=%d gap_ms=%ld size=%d", &s->n, &gap_ms, &s->size);
    s->gap_us = gap_ms * 1000;
    if (s->size > DELTA_MAX) s->size = DELTA_MAX;
    if (s->n > TEXT_MAX / DELTA_MAX) s->n = TEXT_MAX / DELTA_MAX;
    s->chosen = true;
  }
  s->carry_len = len < CARRY ? len : CARRY;
  memcpy(s->carry, piece + len - s->carry_len, s->carry_len);
}

static void readable(struct stream *s, long now) {
  static const char nothing[] = "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n"
                                "Content-Length: 22\r\n\r\n{\"detail\":\"Not Found\"}";
  char *bytes = scratch + CARRY;
  ssize_t got = read(s->fd, bytes, s->phase == HEAD ? HEAD_MAX - s->head.len : READ_MAX);
  if (got < 0 && errno == EAGAIN) return;
  if (got <= 0) return drop(s);
  if (s->phase == HEAD) {
    got = read_head(&s->head, bytes, got);
    if (!s->head.whole) return;
    s->phase = BODY;
    s->body_left = header(&s->head, "\r\ncontent-length:", 0);
    s->carry_len = s->gap_us = 0;
    s->n = 1, s->size = 24;
    if (!strncmp(s->head.bytes, "GET ", 4)) {
      s->phase = HEAD, s->head.len = 0;
      return (void)!write(s->fd, nothing, sizeof nothing - 1);
    }
  }
  if (s->phase == ANSWER) return;
  s->body_left -= got;
  choose(s, bytes, got);
  if (s->body_left <= 0) begin_answer(s, now), pump(s, now);
}

static void accept_all(int listener) {
  int fd;
  while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
    if (streams_open == FDS_MAX) { close(fd); continue; }
    struct stream *s = calloc(1, sizeof *s);
    s->fd = fd;
    streams[s->slot = streams_open++] = s;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    watch(fd, s, EPOLLIN, EPOLL_CTL_ADD);
  }
}

/* Write what has come due; returns the milliseconds until the next delta is. */
static int pump_due(long now) {
  long soonest = now + 1000000;
  for (int i = streams_open - 1; i >= 0; i--) {
    struct stream *s = streams[i];
    if (s->phase != ANSWER || !s->gap_us || s->wants_out) continue;
    if (next_due(s) <= now && !pump(s, now)) continue;
    if (s->phase == ANSWER && next_due(s) < soonest) soonest = next_due(s);
  }
  long wait_us = soonest - now_us();
  return wait_us <= 0 ? 0 : (int)((wait_us + 999) / 1000);
}

static void serve(void) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t at_len = sizeof at;
  struct epoll_event events[256];
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (bind(listener, (void *)&at, at_len) || listen(listener, 4096)) die("listen");
  getsockname(listener, (void *)&at, &at_len);
  watch(listener, 0, EPOLLIN, EPOLL_CTL_ADD);
  printf("%d\n", ntohs(at.sin_port));
  fflush(stdout);
  for (;;) {
    int ready = epoll_wait(poller, events, 256, pump_due(now_us()));
    long now = now_us();
    for (int i = 0; i < ready; i++) {
      struct stream *s = events[i].data.ptr;
      if (!s) accept_all(listener);
      else if ((events[i].events & EPOLLOUT) && !pump(s, now)) continue;
      else if (events[i].events & ~EPOLLOUT) readable(s, now);
    }
  }
}

/* ---- load client --------------------------------------------------------------------------------- */

struct peer {
  int fd;
  bool open, chunked, over;
  enum { SIZE, DATA, DATA_END, LAST } piece;
  size_t sent, carry_len, scan_from;
  long left, started, last_delta, next_sequence;
  int status, deltas;
  struct head head;
  char carry[CARRY];
};

enum { CONNECTIONS, REQUESTS, SECONDS, EXPECT, RAMP_MS, WINDOW_MS, TIMEOUT_S, OPTIONS };
static const char *names[] = {"connections=", "requests=", "seconds=", "expect=", "ramp_ms=", "window_ms=",
                              "timeout_s="};
static long options[] = {1, 0, 0, 0, 0, 0, 120};
static char *request;
static size_t request_len;
static struct sockaddr_in target = {.sin_family = AF_INET};
static struct samples { unsigned *us; size_t len, cap; } ttft, lag, took;
static long begun, finished_at, asked, complete, failed, deltas, kept, lost, reordered, gap_max;
static int busy;
static volatile sig_atomic_t stopped;

static void add_sample(struct samples *all, long us) {
  if (all->len == all->cap) all->us = realloc(all->us, (all->cap = all->cap * 2 + 4096) * sizeof(unsigned));
  all->us[all->len++] = us < 0 ? 0 : (unsigned)us;
}

static bool may_ask(long now) {
  if (stopped || failed > 100 || (options[REQUESTS] && asked >= options[REQUESTS])) return false;
  return !options[SECONDS] || now - begun < options[SECONDS] * 1000000;
}

static void ask(struct peer *p, long now) {
  *p = (struct peer){.fd = p->fd, .open = true, .started = now};
  asked++, busy++;
  watch(p->fd, p, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
}

static void open_peer(struct peer *p, long now) {
  p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (p->fd < 0) die("socket");
  setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
  if (connect(p->fd, (void *)&target, sizeof target) && errno != EINPROGRESS) die("connect");
  watch(p->fd, p, 0, EPOLL_CTL_ADD);
  ask(p, now);
}

static void end_request(struct peer *p, bool whole, long now) {
  busy--;
  finished_at = now;
  lost += p->next_sequence - p->deltas > 0 ? p->next_sequence - p->deltas : 0;
  if (whole && p->status == 200 && p->deltas >= options[EXPECT]) {
    complete++;
    add_sample(&took, now - p->started);
  } else if (!stopped && failed++ == 0) {
    fprintf(stderr, "failed: status %d, %d deltas, %s: %.*s\n", p->status, p->deltas, whole ? "ended" : "cut",
            (int)p->carry_len, p->carry);
  }
  if (whole && may_ask(now)) return ask(p, now);
  close(p->fd), p->open = false;
  if (!whole && may_ask(now)) open_peer(p, now);
}

static void count_delta(struct peer *p, long sequence, long sent_at, long now) {
  if (p->deltas++ == 0) add_sample(&ttft, now - p->started);
  else if (now - p->last_delta > gap_max) gap_max = now - p->last_delta;
  p->last_delta = now;
  if (sequence < p->next_sequence) reordered++;
  else p->next_sequence = sequence + 1;
  deltas++;
  if (!options[WINDOW_MS] || now - begun <= options[WINDOW_MS] * 1000) kept++;
  add_sample(&lag, now - sent_at);
}

/* Count the deltas in a piece of payload (CARRY bytes in front of it are free). The closing events of
   the upstream repeat the whole text: a marker after "text" is no delta. */
static void scan(struct peer *p, char *piece, size_t len, long now) {
  memcpy(piece - p->carry_len, p->carry, p->carry_len);
  piece -= p->carry_len, len += p->carry_len;
  char *at = piece + p->scan_from, *end = piece + len, *found;
  while ((found = memmem(at, end - at, "\"@", 2))) {
    char *stop = memchr(found, ';', end - found), *number = found + 2;
    if (!stop) break;
    at = stop;
    if (found - piece >= 8 && memmem(found - 8, 8, "text", 4)) continue;
    long sequence = strtol(number, &number, 10);
    count_delta(p, sequence, strtol(number + 1, 0, 10), now);
  }
  at = found ? found : end - (end > at && end[-1] == '"');
  p->carry_len = len < CARRY ? len : CARRY;
  memcpy(p->carry, end - p->carry_len, p->carry_len);
  long from = at - (end - (long)p->carry_len);
  p->scan_from = from > 0 ? from : 0;
}

/* Take the chunk framing away, in place; returns the payload's length and sets `over` at the end. */
static size_t unchunk(struct peer *p, char *bytes, size_t len) {
  size_t payload = 0;
  for (size_t i = 0; i < len && !p->over;) {
    char c = bytes[i];
    if (p->piece == DATA) {
      size_t take = len - i < (size_t)p->left ? len - i : (size_t)p->left;
      memmove(bytes + payload, bytes + i, take);
      payload += take, i += take, p->left -= take;
      if (!p->left) p->piece = DATA_END;
      continue;
    }
    i++;
    if (p->piece == SIZE && c >= '0' && c <= '9') p->left = p->left * 16 + c - '0';
    else if (p->piece == SIZE && isxdigit(c)) p->left = p->left * 16 + (c | 32) - 'a' + 10;
    else if (p->piece == SIZE && c == '\n') p->piece = p->left ? DATA : LAST;
    else if (p->piece == DATA_END && c == '\n') p->piece = SIZE;
    else if (p->piece == LAST && c == '\n') p->over = true;
  }
  return payload;
}

static void receive(struct peer *p) {
  char *bytes = scratch + CARRY;
  ssize_t got = read(p->fd, bytes, READ_MAX);
  long now = now_us();
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) return end_request(p, p->head.whole && p->left == -1, now);
  if (!p->head.whole) {
    got = read_head(&p->head, bytes, got);
    if (!p->head.whole) return;
    p->status = atoi(p->head.bytes + 9);
    p->chunked = strcasestr(p->head.bytes, "\r\ntransfer-encoding:") != 0;
    p->left = p->chunked ? 0 : header(&p->head, "\r\ncontent-length:", -1);
  }
  if (p->chunked) got = unchunk(p, bytes, got);
  else if (p->left >= 0) p->left -= got, p->over = p->left <= 0;
  if (got) scan(p, bytes, got, now);
  if (p->over) end_request(p, true, now);
}

static void send_more(struct peer *p) {
  while (p->sent < request_len) {
    ssize_t put_now = send(p->fd, request + p->sent, request_len - p->sent, MSG_NOSIGNAL);
    if (put_now < 0) return;  /* full, or broken: then the read says so */
    p->sent += put_now;
  }
  watch(p->fd, p, EPOLLIN, EPOLL_CTL_MOD);
}

static int by_size(const void *a, const void *b) {
  return (*(unsigned *)a > *(unsigned *)b) - (*(unsigned *)a < *(unsigned *)b);
}

static void print_samples(const char *name, struct samples *all) {
  qsort(all->us, all->len, sizeof *all->us, by_size);
  double p50 = all->len ? all->us[all->len / 2] : 0, p99 = all->len ? all->us[all->len * 99 / 100] : 0;
  printf(",\"%s_p50_ms\":%.3f,\"%s_p99_ms\":%.3f", name, p50 / 1e3, name, p99 / 1e3);
}

static void stop(int signal_number) { stopped = signal_number; }

static void load(int argc, char **argv) {
  for (int i = 4; i < argc; i++)
    for (int k = 0; k < OPTIONS; k++)
      if (!strncmp(argv[i], names[k], strlen(names[k]))) options[k] = atol(argv[i] + strlen(names[k]));
  int file = open(argv[3], O_RDONLY);
  request_len = lseek(file, 0, SEEK_END);
  request = mmap(0, request_len, PROT_READ, MAP_PRIVATE, file, 0);
  if (request == MAP_FAILED) die(argv[3]);
  target.sin_port = htons(atoi(argv[2]));
  target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  struct peer *peers = calloc(options[CONNECTIONS], sizeof *peers);
  struct epoll_event events[256];
  long opened = 0;
  for (begun = now_us(); (busy || (opened < options[CONNECTIONS] && may_ask(now_us()))) && !stopped;) {
    long now = now_us();
    if (now - begun > options[TIMEOUT_S] * 1000000) break;
    while (opened < options[CONNECTIONS] && now >= begun + opened * options[RAMP_MS] * 1000 && may_ask(now))
      open_peer(&peers[opened++], now);
    int ready = epoll_wait(poller, events, 256, opened < options[CONNECTIONS] ? 1 : 100);
    for (int i = 0; i < ready; i++) {
      struct peer *p = events[i].data.ptr;
      if (p->open && (events[i].events & EPOLLOUT)) send_more(p);
      if (p->open && (events[i].events & ~EPOLLOUT)) receive(p);
    }
  }
  if (!stopped) failed += busy;
  printf("{\"requests\":%ld,\"failed\":%ld,\"seconds\":%.4f,\"deltas\":%ld,\"kept\":%ld,\"lost\":%ld", complete,
         failed, (finished_at - begun) / 1e6, deltas, kept, lost);
  printf(",\"reordered\":%ld,\"gap_max_ms\":%.3f", reordered, gap_max / 1e3);
  print_samples("ttft", &ttft), print_samples("lag", &lag), print_samples("took", &took), puts("}");
}

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  poller = epoll_create1(0);
  if (argc == 2 && !strcmp(argv[1], "upstream")) serve();
  if (argc < 4) return fputs("load upstream | load client PORT FILE [name=value]...\n", stderr), 2;
  signal(SIGTERM, stop);
  load(argc, argv);
  return 0;
}
