/* Load generator for scripts/bench: MDP/0.1 clients and workers that do as little work as
 * possible, so that the broker dominates the measurement.
 *
 *	load workers  ENDPOINT SERVICE N     run N workers that echo each request
 *	load echo     ENDPOINT N             run N echo sockets behind zmq_proxy
 *	load bound    ENDPOINT               bind one echo socket to ENDPOINT: the upper bound
 *	load proxy    ENDPOINT BACKEND       run zmq_proxy between clients and echo sockets
 *	load pipeline ENDPOINT SERVICE N W   send N requests, up to W in flight; print the time in seconds
 *	load sync     ENDPOINT SERVICE N     send N requests, one at a time; print the median time in seconds
 *	load clients  ENDPOINT N             connect N clients, each of which sends one request
 *	load waiting  ENDPOINT SERVICE N     send N requests of 100 bytes to a service without workers
 *	load services ENDPOINT NAME N        register N idle workers, for the services NAME0, NAME1, ...
 *	load request  ENDPOINT SERVICE TEXT  send one request, as a program that does nothing else; print the reply
 *	load turns N KEY COMMAND... [-- KEY COMMAND...]...
 *	                                     run each command once, N times over; print each key and the median
 *	                                     milliseconds from the start of its command to the end
 *	load first N KEY COMMAND... [-- KEY COMMAND...]...
 *	                                     the same, to the first byte of the output
 *
 * If BACKBONE_BROKER_KEY is set, connections use it and a new key of their own.
 *
 * All modes except pipeline, sync, request, turns and first print "ready" after setup and run until SIGTERM.
 */
#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

enum { MAX_FRAMES = 16 }; /* in a message */

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

/* open_socket returns a socket that drops no messages. Its receive timeout of 30 seconds
 * prevents a hang if a message is lost. */
static void *open_socket(int kind)
{
	void *socket = zmq_socket(context, kind);
	int none = 0, timeout = 30000;
	check(socket != NULL, "zmq_socket");
	CHECK(zmq_setsockopt(socket, ZMQ_SNDHWM, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_RCVHWM, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_LINGER, &none, sizeof none));
	CHECK(zmq_setsockopt(socket, ZMQ_RCVTIMEO, &timeout, sizeof timeout));
	return socket;
}

/* use_keys makes the connections of a socket use CURVE with a broker whose key is bbpub- and 64
 * hexadecimal digits. */
static void use_keys(void *socket, const char *broker)
{
	char public[41], secret[41];
	unsigned char raw[32];

	for (int i = 0; i < 32; i++)
		check(sscanf(broker + strlen("bbpub-") + 2 * i, "%2hhx", &raw[i]) == 1, "BACKBONE_BROKER_KEY");
	CHECK(zmq_curve_keypair(public, secret));
	CHECK(zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, raw, sizeof raw));
	CHECK(zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, public, 41));
	CHECK(zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, 41));
}

static void *dealer(const char *endpoint)
{
	void *socket = open_socket(ZMQ_DEALER);
	const char *broker = getenv("BACKBONE_BROKER_KEY");
	if (broker != NULL)
		use_keys(socket, broker);
	CHECK(zmq_connect(socket, endpoint));
	return socket;
}

static void send_frame(void *socket, const void *data, size_t length, int more)
{
	CHECK(zmq_send(socket, data, length, more ? ZMQ_SNDMORE : 0));
}

/* receive reads a message and returns its number of frames. With ZMQ_DONTWAIT, it returns 0
 * if there is no message. */
static int receive(void *socket, zmq_msg_t *frames, int flags)
{
	int n = 0;
	do {
		assert(n < MAX_FRAMES);
		zmq_msg_init(&frames[n]);
		if (zmq_msg_recv(&frames[n], socket, flags) == -1) {
			check(flags == ZMQ_DONTWAIT && zmq_errno() == EAGAIN && n == 0, "zmq_msg_recv");
			return 0;
		}
	} while (zmq_msg_more(&frames[n++]));
	return n;
}

static int frame_equals(zmq_msg_t *frame, const void *data, size_t length)
{
	return zmq_msg_size(frame) == length && memcmp(zmq_msg_data(frame), data, length) == 0;
}

static void close_frames(zmq_msg_t *frames, int n)
{
	while (n-- > 0)
		zmq_msg_close(&frames[n]);
}

static void send_request(void *socket, const char *service, const char *body, size_t length)
{
	send_frame(socket, "", 0, 1);
	send_frame(socket, client_protocol, 6, 1);
	send_frame(socket, service, strlen(service), 1);
	send_frame(socket, body, length, 0);
}

/* receive_reply reads a reply, prints its body to a file unless that is NULL, and returns 1. With
 * ZMQ_DONTWAIT, it returns 0 if there is none. */
static int receive_reply(void *socket, int flags, FILE *file)
{
	zmq_msg_t frames[MAX_FRAMES];
	int n = receive(socket, frames, flags);
	if (n == 0)
		return 0;
	if (n != 4 || !frame_equals(&frames[1], client_protocol, 6)) {
		fprintf(stderr, "load: unexpected reply of %d frames\n", n);
		exit(1);
	}
	if (file != NULL)
		fwrite(zmq_msg_data(&frames[3]), 1, zmq_msg_size(&frames[3]), file);
	close_frames(frames, n);
	return 1;
}

static void print_ready(void)
{
	puts("ready");
	fflush(stdout);
}

static void register_worker(void *socket, const char *service)
{
	send_frame(socket, "", 0, 1);
	send_frame(socket, worker_protocol, 6, 1);
	send_frame(socket, &READY, 1, 1);
	send_frame(socket, service, strlen(service), 0);
}

static void send_heartbeat(void *socket)
{
	send_frame(socket, "", 0, 1);
	send_frame(socket, worker_protocol, 6, 1);
	send_frame(socket, &HEARTBEAT, 1, 0);
}

/* echo sends each received message back. For a worker, it turns the REQUEST into a REPLY. */
static void echo(void *socket, int worker)
{
	zmq_msg_t frames[MAX_FRAMES];
	int n;
	while ((n = receive(socket, frames, ZMQ_DONTWAIT)) > 0) {
		if (worker && frame_equals(&frames[2], &REQUEST, 1))
			*(char *)zmq_msg_data(&frames[2]) = REPLY;
		else if (worker) {
			close_frames(frames, n); /* a heartbeat */
			continue;
		}
		for (int i = 0; i < n; i++)
			CHECK(zmq_msg_send(&frames[i], socket, i < n - 1 ? ZMQ_SNDMORE : 0));
	}
}

/* serve echoes on n sockets forever. For workers, it sends a heartbeat per second on each. */
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
				send_heartbeat(sockets[i]);
		}
	}
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* time_of runs a command and returns the seconds from its start to its end, or to the first byte of its
 * output. */
static double time_of(char **command, int first_byte)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), ends[2] = {null, null}, status;
	double begin, seconds = 0;
	char byte;
	pid_t pid;

	check(null >= 0 && (!first_byte || pipe(ends) == 0), "pipe");
	begin = now();
	if ((pid = vfork()) == 0) {
		dup2(null, 0);
		dup2(ends[1], 1);
		execvp(command[0], command);
		_exit(127);
	}
	check(pid > 0, "vfork");
	if (first_byte) {
		close(ends[1]);
		check(read(ends[0], &byte, 1) == 1, command[0]);
		seconds = now() - begin;
		while (read(ends[0], &byte, 1) > 0)
			;
		close(ends[0]);
	}
	check(waitpid(pid, &status, 0) == pid, "waitpid");
	if (!first_byte)
		seconds = now() - begin;
	if (status != 0) {
		fprintf(stderr, "load: %s failed\n", command[0]);
		exit(1);
	}
	close(null);
	return seconds;
}

/* compare runs commands in turn. Each has its key in front, and -- separates them. */
static void compare(long n, char **words, int first_byte)
{
	enum { MAX_COMMANDS = 32 };
	char **commands[MAX_COMMANDS];
	double *times[MAX_COMMANDS];
	int count = 0;

	while (*words != NULL) {
		assert(count < MAX_COMMANDS);
		times[count] = calloc(n, sizeof(double));
		commands[count++] = words;
		while (*words != NULL && strcmp(*words, "--"))
			words++;
		assert(words - commands[count - 1] > 1); /* a key and a command */
		if (*words != NULL)
			*words++ = NULL;
	}
	for (long i = 0; i < n; i++)
		for (int c = 0; c < count; c++)
			times[c][i] = time_of(commands[c] + 1, first_byte);
	for (int c = 0; c < count; c++) {
		qsort(times[c], n, sizeof(double), by_value);
		printf("%s %.6g\n", commands[c][0], times[c][n / 2] * 1e3);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc > 2 ? argv[1] : "", *endpoint = argv[2];
	/* The last argument is N; for pipeline, N is before it and the last argument is W. */
	long last = argc > 3 ? atol(argv[argc - 1]) : 0, n = argc > 4 ? atol(argv[4]) : last;
	void **sockets = calloc(last + 1, sizeof *sockets);

	if (!strcmp(mode, "turns") || !strcmp(mode, "first")) {
		compare(atol(argv[2]), argv + 3, !strcmp(mode, "first"));
		return 0;
	}
	memset(payload, 'x', sizeof payload);
	context = zmq_ctx_new();
	/* The first socket takes the memory for all: no more than are needed. */
	CHECK(zmq_ctx_set(context, ZMQ_MAX_SOCKETS, strcmp(mode, "request") ? last + 2 : 2));

	if (!strcmp(mode, "workers") && argc == 5) {
		for (int i = 0; i < n; i++)
			register_worker(sockets[i] = dealer(endpoint), argv[3]);
		print_ready();
		serve(sockets, n, 1);
	} else if (!strcmp(mode, "services") && argc == 5) {
		for (int i = 0; i < n; i++) {
			char name[100];
			snprintf(name, sizeof name, "%s%d", argv[3], i);
			register_worker(sockets[i] = dealer(endpoint), name);
		}
		print_ready();
		zmq_poll(NULL, 0, -1);
	} else if (!strcmp(mode, "echo") && argc == 4) {
		for (int i = 0; i < n; i++)
			sockets[i] = dealer(endpoint);
		print_ready();
		serve(sockets, n, 0);
	} else if (!strcmp(mode, "bound") && argc == 3) {
		sockets[0] = open_socket(ZMQ_DEALER);
		CHECK(zmq_bind(sockets[0], endpoint));
		print_ready();
		serve(sockets, 1, 0);
	} else if (!strcmp(mode, "proxy") && argc == 4) {
		void *front = open_socket(ZMQ_ROUTER), *back = open_socket(ZMQ_DEALER);
		CHECK(zmq_bind(front, endpoint));
		CHECK(zmq_bind(back, argv[3]));
		print_ready();
		zmq_proxy(front, back, NULL);
	} else if (!strcmp(mode, "pipeline") && argc == 6) {
		void *socket = dealer(endpoint);
		double begin;
		send_request(socket, argv[3], payload, sizeof payload); /* connects before the measurement begins */
		receive_reply(socket, 0, NULL);
		begin = now();
		for (long sent = 0, done = 0; done < n;) {
			for (; sent < n && sent - done < last; sent++)
				send_request(socket, argv[3], payload, sizeof payload);
			done += receive_reply(socket, 0, NULL);
			while (done < sent && receive_reply(socket, ZMQ_DONTWAIT, NULL))
				done++;
		}
		printf("%.6f\n", now() - begin);
	} else if (!strcmp(mode, "sync") && argc == 5) {
		void *socket = dealer(endpoint);
		double *times = calloc(n + 1, sizeof *times);
		for (long i = 0; i <= n; i++) {
			double begin = now();
			send_request(socket, argv[3], payload, sizeof payload);
			receive_reply(socket, 0, NULL);
			times[i] = now() - begin;
		}
		qsort(times + 1, n, sizeof *times, by_value); /* excludes the first request, which connects */
		printf("%.9f\n", times[1 + n / 2]);
	} else if (!strcmp(mode, "request") && argc == 5) {
		void *socket = dealer(endpoint);
		send_request(socket, argv[3], argv[4], strlen(argv[4]));
		receive_reply(socket, 0, stdout);
	} else if (!strcmp(mode, "clients") && argc == 4) {
		for (int i = 0; i < n; i++)
			send_request(sockets[i] = dealer(endpoint), "mmi.service", payload, sizeof payload);
		for (int i = 0; i < n; i++)
			receive_reply(sockets[i], 0, NULL);
		print_ready();
		zmq_poll(NULL, 0, -1);
	} else if (!strcmp(mode, "waiting") && argc == 5) {
		void *socket = dealer(endpoint);
		for (long i = 0; i < n; i++)
			send_request(socket, argv[3], payload, sizeof payload);
		/* The reply to this request shows that the broker has received all the others. */
		send_request(socket, "mmi.service", payload, sizeof payload);
		receive_reply(socket, 0, NULL);
		print_ready();
		zmq_poll(NULL, 0, -1);
	} else {
		fprintf(stderr, "load: wrong usage; see the comment at the top of scripts/load.c\n");
		return 64;
	}
	return 0;
}
