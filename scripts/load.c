/* The load that scripts/bench puts on a broker: clients and workers of MDP/0.1 with as
 * little in them as there can be, so that what is measured is the broker.
 *
 *	load workers  ENDPOINT SERVICE N     N workers that reply with what they are sent
 *	load echo     ENDPOINT N             the same behind zmq_proxy
 *	load bound    ENDPOINT               the same without anything between: the ceiling
 *	load proxy    ENDPOINT BACKEND       zmq_proxy from clients to such workers
 *	load pipeline ENDPOINT SERVICE N W   N requests, W of them at a time; prints the seconds
 *	load sync     ENDPOINT SERVICE N     N requests one by one; prints the median in seconds
 *	load clients  ENDPOINT N             N clients that ask once and stay
 *	load waiting  ENDPOINT SERVICE N     N requests of 100 bytes that nobody serves, and stays
 *	load services ENDPOINT NAME N        N workers of a service each, NAME0 and so on, that do nothing
 *
 * What stays prints "ready" once it is, and stops with SIGTERM.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

enum { MOST = 16 }; /* frames in a message */

static const char client_protocol[] = "MDPC01", worker_protocol[] = "MDPW01";
static const char READY = 1, REQUEST = 2, REPLY = 3, HEARTBEAT = 4;
static char payload[100];
static void *context;

#define CHECK(call) check((call) != -1, #call)

static void check(int ok, const char *call)
{
	if (ok)
		return;
	fprintf(stderr, "load: %s: %s\n", call, zmq_strerror(zmq_errno()));
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* open_socket makes a socket that drops nothing, and that no lost message hangs. */
static void *open_socket(int kind)
{
	void *socket = zmq_socket(context, kind);
	int none = 0, patience = 30000;
	check(socket != NULL, "zmq_socket");
	CHECK(zmq_setsockopt(socket, ZMQ_SNDHWM, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_RCVHWM, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_LINGER, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_RCVTIMEO, &patience, sizeof patience));
	return socket;
}

static void *dealer(const char *endpoint)
{
	void *socket = open_socket(ZMQ_DEALER);
	CHECK(zmq_connect(socket, endpoint));
	return socket;
}

static void put(void *socket, const void *data, size_t length, int more)
{
	CHECK(zmq_send(socket, data, length, more ? ZMQ_SNDMORE : 0));
}

/* take receives a message and returns how many frames it has, or 0 when there is none. */
static int take(void *socket, zmq_msg_t *frames, int flags)
{
	int n = 0;
	do {
		assert(n < MOST);
		zmq_msg_init(&frames[n]);
		if (zmq_msg_recv(&frames[n], socket, flags) == -1) {
			check(flags == ZMQ_DONTWAIT && zmq_errno() == EAGAIN && n == 0, "zmq_msg_recv");
			return 0;
		}
	} while (zmq_msg_more(&frames[n++]));
	return n;
}

static int is(zmq_msg_t *frame, const void *data, size_t length)
{
	return zmq_msg_size(frame) == length && memcmp(zmq_msg_data(frame), data, length) == 0;
}

static void drop(zmq_msg_t *frames, int n)
{
	while (n-- > 0)
		zmq_msg_close(&frames[n]);
}

static void ask(void *socket, const char *service, size_t length)
{
	put(socket, "", 0, 1);
	put(socket, client_protocol, 6, 1);
	put(socket, service, strlen(service), 1);
	put(socket, payload, length, 0);
}

/* answered takes one reply of a broker. */
static int answered(void *socket, int flags)
{
	zmq_msg_t frames[MOST];
	int n = take(socket, frames, flags);
	if (n == 0)
		return 0;
	if (n != 4 || !is(&frames[1], client_protocol, 6)) {
		fprintf(stderr, "load: no reply of a service, but %d frames\n", n);
		exit(1);
	}
	drop(frames, n);
	return 1;
}

static void ready(void)
{
	puts("ready");
	fflush(stdout);
}

static void register_worker(void *socket, const char *service)
{
	put(socket, "", 0, 1);
	put(socket, worker_protocol, 6, 1);
	put(socket, &READY, 1, 1);
	put(socket, service, strlen(service), 0);
}

static void beat(void *socket)
{
	put(socket, "", 0, 1);
	put(socket, worker_protocol, 6, 1);
	put(socket, &HEARTBEAT, 1, 0);
}

/* echo sends back what came, as the REPLY to it where it is a worker's. */
static void echo(void *socket, int worker)
{
	zmq_msg_t frames[MOST];
	int n;
	while ((n = take(socket, frames, ZMQ_DONTWAIT)) > 0) {
		if (worker && is(&frames[2], &REQUEST, 1))
			*(char *)zmq_msg_data(&frames[2]) = REPLY;
		else if (worker) {
			drop(frames, n); /* a heartbeat */
			continue;
		}
		for (int i = 0; i < n; i++)
			CHECK(zmq_msg_send(&frames[i], socket, i < n - 1 ? ZMQ_SNDMORE : 0));
	}
}

/* serve is the loop of so many sockets, with a heartbeat a second where they are workers. */
static void serve(void **sockets, int n, int workers)
{
	zmq_pollitem_t *items = calloc(n, sizeof *items);
	double due = now() + 1;
	for (int i = 0; i < n; i++) {
		items[i].socket = sockets[i];
		items[i].events = ZMQ_POLLIN;
	}
	for (;;) {
		CHECK(zmq_poll(items, n, 1000));
		for (int i = 0; i < n; i++)
			if (items[i].revents)
				echo(sockets[i], workers);
		if (workers && now() >= due) {
			due = now() + 1;
			for (int i = 0; i < n; i++)
				beat(sockets[i]);
		}
	}
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[1] : "", *endpoint = argv[2];
	long last = argc > 3 ? atol(argv[argc - 1]) : 0, n = argc > 4 ? atol(argv[4]) : last;
	void **sockets = calloc(last + 1, sizeof *sockets);

	memset(payload, 'x', sizeof payload);
	context = zmq_ctx_new();
	CHECK(zmq_ctx_set(context, ZMQ_MAX_SOCKETS, 20000));

	if (!strcmp(what, "workers") && argc == 5) {
		for (int i = 0; i < n; i++)
			register_worker(sockets[i] = dealer(endpoint), argv[3]);
		ready();
		serve(sockets, n, 1);
	} else if (!strcmp(what, "services") && argc == 5) {
		for (int i = 0; i < n; i++) {
			char name[100];
			snprintf(name, sizeof name, "%s%d", argv[3], i);
			register_worker(sockets[i] = dealer(endpoint), name);
		}
		ready();
		zmq_poll(NULL, 0, -1);
	} else if (!strcmp(what, "echo") && argc == 4) {
		for (int i = 0; i < n; i++)
			sockets[i] = dealer(endpoint);
		ready();
		serve(sockets, n, 0);
	} else if (!strcmp(what, "bound") && argc == 3) {
		sockets[0] = open_socket(ZMQ_DEALER);
		CHECK(zmq_bind(sockets[0], endpoint));
		ready();
		serve(sockets, 1, 0);
	} else if (!strcmp(what, "proxy") && argc == 4) {
		void *front = open_socket(ZMQ_ROUTER), *back = open_socket(ZMQ_DEALER);
		CHECK(zmq_bind(front, endpoint));
		CHECK(zmq_bind(back, argv[3]));
		ready();
		zmq_proxy(front, back, NULL);
	} else if (!strcmp(what, "pipeline") && argc == 6) {
		void *socket = dealer(endpoint);
		double begin;
		ask(socket, argv[3], sizeof payload); /* the connection is no part of it */
		answered(socket, 0);
		begin = now();
		for (long sent = 0, done = 0; done < n;) {
			for (; sent < n && sent - done < last; sent++)
				ask(socket, argv[3], sizeof payload);
			done += answered(socket, 0);
			while (done < sent && answered(socket, ZMQ_DONTWAIT))
				done++;
		}
		printf("%.6f\n", now() - begin);
	} else if (!strcmp(what, "sync") && argc == 5) {
		void *socket = dealer(endpoint);
		double *times = calloc(n + 1, sizeof *times);
		for (long i = 0; i <= n; i++) {
			double begin = now();
			ask(socket, argv[3], sizeof payload);
			answered(socket, 0);
			times[i] = now() - begin;
		}
		qsort(times + 1, n, sizeof *times, by_value); /* without the first, which connects */
		printf("%.9f\n", times[1 + n / 2]);
	} else if (!strcmp(what, "clients") && argc == 4) {
		for (int i = 0; i < n; i++)
			ask(sockets[i] = dealer(endpoint), "mmi.service", sizeof payload);
		for (int i = 0; i < n; i++)
			answered(sockets[i], 0);
		ready();
		zmq_poll(NULL, 0, -1);
	} else if (!strcmp(what, "waiting") && argc == 5) {
		void *socket = dealer(endpoint);
		for (long i = 0; i < n; i++)
			ask(socket, argv[3], sizeof payload);
		ask(socket, "mmi.service", sizeof payload); /* its reply tells that all have come */
		answered(socket, 0);
		ready();
		zmq_poll(NULL, 0, -1);
	} else {
		fprintf(stderr, "load: see the head of scripts/load.c\n");
		return 64;
	}
	return 0;
}
