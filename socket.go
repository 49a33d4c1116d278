package main

// ZeroMQ sockets as the three tools use them: a message is one call into C, and so is a wait.
// With a call for each property of each frame, calling into C would cost the broker more than
// all its other work.

/*
#cgo pkg-config: libzmq
#cgo nocallback receive_frames
#cgo noescape receive_frames
#cgo nocallback send_frames
#cgo noescape send_frames
#cgo nocallback close_frames
#cgo noescape close_frames
#include <errno.h>
#ifdef __linux__
#include <linux/tcp.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zmq.h>

enum { MAX_FRAMES = 16, MAX_LENT = 4, LONG_FRAME = 16 << 10 };

// The frames of a message, or as many of them as there is room for. With lends, long frames are lent until
// the next message is received: they can be used, and sent, without a copy.
typedef struct {
	zmq_msg_t frames[MAX_FRAMES];
	struct { void *data; size_t size; int lent; } views[MAX_FRAMES];
	int count, more;
	int source; // the descriptor of the connection that they came over, or -1
	zmq_msg_t lent[MAX_LENT];
	int lends, lent_count;
} frame_batch;

static void end_loans(frame_batch *batch) {
	for (; batch->lent_count > 0; batch->lent_count--)
		zmq_msg_close(&batch->lent[batch->lent_count - 1]);
}

// lend keeps a frame that was received until end_loans, if there is room.
static int lend(frame_batch *batch, zmq_msg_t *frame) {
	if (!batch->lends || batch->lent_count == MAX_LENT || zmq_msg_size(frame) < LONG_FRAME)
		return 0;
	zmq_msg_init(&batch->lent[batch->lent_count]);
	zmq_msg_move(&batch->lent[batch->lent_count++], frame);
	return 1;
}

// lent_frame returns the frame that was lent with its data there, or NULL.
static zmq_msg_t *lent_frame(frame_batch *batch, const void *data) {
	for (int i = 0; i < batch->lent_count; i++)
		if (zmq_msg_data(&batch->lent[i]) == data)
			return &batch->lent[i];
	return NULL;
}

// receive_frames receives frames of one message. If it is a new one, the loans of the last one end. It returns
// 0 or an errno.
static int receive_frames(uintptr_t socket, frame_batch *batch) {
	if (!batch->more)
		end_loans(batch);
	for (batch->count = 0, batch->more = 1; batch->more && batch->count < MAX_FRAMES; batch->count++) {
		zmq_msg_t *frame = &batch->frames[batch->count];
		zmq_msg_init(frame);
		while (zmq_msg_recv(frame, (void *)socket, ZMQ_DONTWAIT) == -1)
			if (errno != EINTR)
				return errno;
		batch->views[batch->count].data = zmq_msg_data(frame);
		batch->views[batch->count].size = zmq_msg_size(frame);
		batch->more = zmq_msg_more(frame);
		batch->views[batch->count].lent = lend(batch, frame);
	}
	batch->source = batch->count > 1 ? zmq_msg_get(&batch->frames[1], ZMQ_SRCFD) : -1;
	return 0;
}

static void close_frames(frame_batch *batch) {
	for (; batch->count > 0; batch->count--)
		zmq_msg_close(&batch->frames[batch->count - 1]);
}

// A waker wakes a broker when a peer has read. It counts the bytes that ZeroMQ holds for all peers. It is
// never freed: ZeroMQ may still hold messages.
typedef struct { pthread_mutex_t mutex; int fd, woken; int64_t bytes; } waker;

static waker *new_waker(int fd) {
	waker *w = calloc(1, sizeof *w);
	pthread_mutex_init(&w->mutex, NULL);
	w->fd = fd;
	return w;
}

static void wake(waker *w) {
	pthread_mutex_lock(&w->mutex);
	if (!w->woken && w->fd != -1)
		w->woken = write(w->fd, "", 1) == 1;
	pthread_mutex_unlock(&w->mutex);
}

// take_wake tells whether there was a wake since the last time.
static int take_wake(waker *w) {
	pthread_mutex_lock(&w->mutex);
	int woken = w->woken;
	w->woken = 0;
	pthread_mutex_unlock(&w->mutex);
	return woken;
}

static void close_waker(waker *w) {
	pthread_mutex_lock(&w->mutex);
	w->fd = -1;
	pthread_mutex_unlock(&w->mutex);
}

// A send_queue counts the bytes that ZeroMQ holds for one peer. Its waker is told once when no more than low
// bytes are left, unless that is -1.
typedef struct { int64_t bytes, low; waker *waker; int references; } send_queue;

static send_queue *new_queue(waker *waker) {
	send_queue *queue = calloc(1, sizeof *queue);
	queue->references = 1;
	queue->low = -1;
	queue->waker = waker;
	return queue;
}

static void release_queue(send_queue *queue) {
	if (__atomic_sub_fetch(&queue->references, 1, __ATOMIC_ACQ_REL) == 0)
		free(queue);
}

static void wake_if_low(send_queue *queue) {
	int64_t low = __atomic_load_n(&queue->low, __ATOMIC_SEQ_CST);
	if (low >= 0 && __atomic_load_n(&queue->bytes, __ATOMIC_SEQ_CST) <= low &&
	    __atomic_compare_exchange_n(&queue->low, &low, -1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
		wake(queue->waker);
}

static void notify_when_low(send_queue *queue, int64_t low) {
	__atomic_store_n(&queue->low, low, __ATOMIC_SEQ_CST);
	wake_if_low(queue); // It may have become that low before.
}

// A counted_frame is the last frame of a message, and what the whole message costs. The data is here, or in
// a frame that was lent.
typedef struct { send_queue *queue; int64_t cost; zmq_msg_t lent; char data[]; } counted_frame;

static void count_queued(send_queue *queue, int64_t cost) {
	__atomic_add_fetch(&queue->bytes, cost, __ATOMIC_SEQ_CST);
	__atomic_add_fetch(&queue->waker->bytes, cost, __ATOMIC_RELAXED);
}

// free_counted is called by ZeroMQ's I/O thread once the frame was written to the connection or
// dropped with it.
static void free_counted(void *data, void *hint) {
	counted_frame *frame = hint;
	(void)data;
	count_queued(frame->queue, -frame->cost);
	wake_if_low(frame->queue);
	release_queue(frame->queue);
	zmq_msg_close(&frame->lent);
	free(frame);
}

static int send_counted(uintptr_t socket, const char *data, size_t size, zmq_msg_t *lent, send_queue *queue, int64_t cost) {
	counted_frame *frame = malloc(sizeof *frame + (lent ? 0 : size));
	zmq_msg_t message;

	if (frame == NULL) {
		errno = ENOMEM;
		return -1;
	}
	frame->queue = queue;
	frame->cost = cost;
	__atomic_add_fetch(&queue->references, 1, __ATOMIC_RELAXED);
	count_queued(queue, cost);
	zmq_msg_init(&frame->lent);
	if (lent)
		zmq_msg_copy(&frame->lent, lent);
	else
		memcpy(frame->data, data, size);
	zmq_msg_init_data(&message, lent ? zmq_msg_data(&frame->lent) : frame->data, size, free_counted, frame);
	while (zmq_msg_send(&message, (void *)socket, ZMQ_DONTWAIT) == -1)
		if (errno != EINTR) {
			int failed = errno;
			zmq_msg_close(&message);
			errno = failed;
			return -1;
		}
	return 0;
}

// send_frames sends frames that lie in memory one after the other; more tells whether frames of
// the same message follow. If queue is not NULL, it counts the message, which costs so many bytes,
// until ZeroMQ has written it. The frames of a batch that was received by the same socket may be lent. It
// returns 0 or an errno, which is negative if a frame was sent.
static int send_frames(uintptr_t socket, frame_batch *batch, const char *data, const size_t *sizes, int count, int more, send_queue *queue, int64_t cost) {
	for (int i = 0; i < count; data += sizes[i++]) {
		int flags = ZMQ_DONTWAIT | (more || i < count - 1 ? ZMQ_SNDMORE : 0);
		if (queue && !(flags & ZMQ_SNDMORE)) {
			if (send_counted(socket, data, sizes[i], lent_frame(batch, data), queue, cost) == -1)
				return i == 0 ? errno : -errno;
			continue;
		}
		while (zmq_send((void *)socket, data, sizes[i], flags) == -1)
			if (errno != EINTR)
				return i == 0 ? errno : -errno;
	}
	return 0;
}

// user_of returns the user that the ZAP handler named when it admitted the peer that a message came from,
// or NULL. It is there on the second frame; the first, which has the identity, may lack it.
static const char *user_of(frame_batch *batch) {
	return batch->count > 1 ? zmq_msg_gets(&batch->frames[1], "User-Id") : NULL;
}

// Without a ZAP handler, ZeroMQ lets everybody in unless this option is set.
static int enforce_domain(uintptr_t socket) {
	enum { ZAP_ENFORCE_DOMAIN = 93 };
	int on = 1;
	return zmq_setsockopt((void *)socket, ZAP_ENFORCE_DOMAIN, &on, sizeof on) == -1 ? errno : 0;
}

// bytes_received returns the number of bytes that a TCP connection has received, or 0 if that is
// unknown.
static uint64_t bytes_received(int fd) {
#ifdef __linux__
	struct tcp_info info = {0};
	socklen_t size = sizeof info;

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0)
		return info.tcpi_bytes_received;
#endif
	return 0;
}

// keep_memory keeps what is free at the end of the heap for the next frames.
static void keep_memory(void) {
#ifdef __GLIBC__
	mallopt(M_TRIM_THRESHOLD, 8 << 20);
#endif
}

// use_mmap lets free return the memory of long frames to the system at once, and keep what parts of streams
// need again and again.
static void use_mmap(void) {
	keep_memory();
#ifdef __GLIBC__
	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	mallopt(M_TOP_PAD, 1 << 20);
#endif
}

// trim_memory returns what else is free.
static void trim_memory(void) {
#ifdef __GLIBC__
	malloc_trim(0);
#endif
}
*/
import "C"

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	zmq "github.com/pebbe/zmq4"
)

// A socket is a ZeroMQ socket and, perhaps, a monitor of its connections. It belongs to one
// goroutine.
type socket struct {
	*zmq.Socket
	handle  C.uintptr_t
	fd      C.int // readable when there may be new messages
	batch   *C.frame_batch
	sending []byte   // short frames, joined
	spare   [][]byte // memory of long frames that were received
	drained bool     // no message is left, until fd becomes readable
	// knowsUsers tells that a ZAP handler admits the peers, so that messages have a user.
	knowsUsers bool
	blocked    bool // a wait ends when a message can be sent
	paused     bool // a wait does not end when a message can be received

	// What the last wait found: perhaps a message, and perhaps an event of the monitor.
	readable, monitored bool

	monitor   *zmq.Socket
	monitorFd C.int // -1 without a monitor
}

func newSocket(kind zmq.Type) (*socket, error) {
	// A ROUTER names peers without an identity by a number that counts up from rand(3), which ZeroMQ
	// does not seed. It aborts if another peer has chosen the next one, so nobody may guess it.
	C.srand(C.uint(rand.Uint32()))
	opened, err := zmq.NewSocket(kind)
	if err != nil {
		return nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s := &socket{Socket: opened, batch: (*C.frame_batch)(C.calloc(1, C.sizeof_frame_batch)), monitorFd: -1}
	handle, handleErr := handleOf(opened)
	fd, fdErr := opened.GetFd()
	if err := errors.Join(handleErr, fdErr); err != nil {
		s.Close()
		return nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s.handle, s.fd = handle, C.int(fd)
	return s, nil
}

// handleOf returns libzmq's handle of a socket. The binding keeps it in a private field; with
// the functions that it exports, a broker passes 40 % fewer requests in the same time.
func handleOf(s *zmq.Socket) (C.uintptr_t, error) {
	field := reflect.ValueOf(s).Elem().FieldByName("soc")
	if !field.IsValid() || field.Kind() != reflect.UnsafePointer || field.IsNil() {
		return 0, fmt.Errorf("this version of github.com/pebbe/zmq4 keeps its handle elsewhere: %s", versionOf("github.com/pebbe/zmq4"))
	}
	return C.uintptr_t(field.Pointer()), nil
}

// versionOf returns the version of a module that this binary was built with.
func versionOf(path string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == path {
				return module.Version
			}
		}
	}
	return "unknown"
}

// Close stops the events of the monitor first: ZeroMQ's I/O thread would wait for ever to tell
// a monitor that is gone (libzmq#3575).
func (s *socket) Close() {
	if s.monitor != nil {
		s.Monitor("", 0)
		s.monitor.Close()
	}
	s.Socket.Close()
	C.end_loans(s.batch)
	C.free(unsafe.Pointer(s.batch))
	s.batch = nil
}

// errWouldBlock is what send returns when no peer is connected, or none has read enough of what
// it was sent before.
var errWouldBlock = errors.New("the peer takes no messages")

// maxJoined limits what is copied to save calls into C and allocations, in bytes: frames that are
// sent together, and each of the received frames that share memory. A longer frame has memory of
// its own, which no short one keeps from being freed.
const maxJoined = C.LONG_FRAME

// send sends a message without waiting. After errWouldBlock nothing was sent. At a ROUTER, any other
// error means that the peer is gone. At a DEALER it means that the connection broke within the
// message, and that ZeroMQ drops the next frames: the socket must be closed.
func (s *socket) send(frames [][]byte) error { return s.sendCounted(frames, nil) }

// sendCounted sends a message and counts it in a queue, unless that is nil.
func (s *socket) sendCounted(frames [][]byte, queue *sendQueue) error {
	var counter *C.send_queue
	var cost C.int64_t
	if queue != nil {
		counter, cost = queue.counter, C.int64_t(costOf(frames))
	}
	s.drained = false // Sending handles the events that fd tells of, too.
	for first := true; len(frames) > 0; first = false {
		var sizes [C.MAX_FRAMES]C.size_t
		data, n := frames[0], 1
		sizes[0] = C.size_t(len(data))
		if len(data) < maxJoined {
			s.sending = append(s.sending[:0], data...)
			for ; n < min(len(frames), C.MAX_FRAMES) && len(s.sending)+len(frames[n]) < maxJoined; n++ {
				s.sending = append(s.sending, frames[n]...)
				sizes[n] = C.size_t(len(frames[n]))
			}
			data = s.sending
		}
		frames = frames[n:]
		more := C.int(min(1, len(frames)))
		errno := C.send_frames(s.handle, s.batch, (*C.char)(unsafe.Pointer(unsafe.SliceData(data))), &sizes[0], C.int(n), more, counter, cost)
		switch {
		case first && errno == C.EAGAIN:
			return errWouldBlock
		case errno != 0:
			return fmt.Errorf("send: %w", zmq.Errno(max(errno, -errno)))
		}
	}
	return nil
}

// A sendQueue counts the bytes that ZeroMQ holds for one peer.
type sendQueue struct{ counter *C.send_queue }

func newSendQueue(w *queueWaker) *sendQueue { return &sendQueue{C.new_queue(w.waker)} }

func (q *sendQueue) size() size { return loadBytes(&q.counter.bytes) }

// notify wakes the waker of the queue once it is down to low bytes or less.
func (q *sendQueue) notify(low size) { C.notify_when_low(q.counter, C.int64_t(low)) }

// close ends the use of the queue. ZeroMQ keeps it for what it still holds.
func (q *sendQueue) close() { C.release_queue(q.counter) }

// A queueWaker wakes a pollWaiter when one of its queues is as low as its notify wants it.
type queueWaker struct{ waker *C.waker }

func newQueueWaker(w *pollWaiter) *queueWaker {
	return &queueWaker{C.new_waker(C.int(w.wakeFd))}
}

// woken tells whether the waiter was woken since the last time.
func (w *queueWaker) woken() bool { return C.take_wake(w.waker) != 0 }

// queued returns the bytes in all of its queues.
func (w *queueWaker) queued() size { return loadBytes(&w.waker.bytes) }

// close ends the use of the waiter. ZeroMQ may still hold messages.
func (w *queueWaker) close() { C.close_waker(w.waker) }

// loadBytes returns a count of bytes that other threads change. It needs no call into C, which takes longer.
func loadBytes(bytes *C.int64_t) size { return size(atomic.LoadInt64((*int64)(bytes))) }

// bytesReceived returns the number of bytes that a TCP connection has received, or 0 if that is
// unknown.
func bytesReceived(source int) uint64 { return uint64(C.bytes_received(C.int(source))) }

// returnLongFrames lets ZeroMQ return the memory of long frames to the system at once.
func returnLongFrames() { C.use_mmap() }

// keepMemory lets ZeroMQ keep memory for the next frames, rather than return it to the system at once.
func keepMemory() { C.keep_memory() }

// trimMemory returns what else C has freed.
func trimMemory() { C.trim_memory() }

// maxFrames is the most frames of a message that are received. The others are dropped.
const maxFrames = 1 << 18

// A sender is what ZeroMQ itself knows of the peer that a message came from.
type sender struct {
	source int    // descriptor of the connection, or -1
	user   string // as a guard admitted it: a key or ipcUser; empty if no keys are in use
	// admitted is how many connections the broker had accepted when it admitted this one.
	admitted uint64
}

// receive returns the next message, or nil if there is none.
func (s *socket) receive() (frames [][]byte, err error) {
	frames, _, err = s.receiveFrom()
	return frames, err
}

// receiveFrom returns the next message, or nil if there is none, and who sent it. A message with more than
// maxFrames is cut off one frame behind them.
func (s *socket) receiveFrom() (frames [][]byte, from sender, err error) {
	s.drained, from.source = false, -1
	for more := true; more; {
		errno := C.receive_frames(s.handle, s.batch)
		if errno != 0 {
			C.close_frames(s.batch)
			if errno == C.EAGAIN && frames == nil {
				s.drained = true
				return nil, from, nil
			}
			return nil, from, fmt.Errorf("receive: %w", zmq.Errno(errno))
		}
		if frames == nil {
			from.source = int(s.batch.source)
			if s.knowsUsers {
				if user := C.user_of(s.batch); user != nil {
					from.user, from.admitted = parseUserID(C.GoString(user))
				}
			}
		}
		if len(frames) <= maxFrames {
			frames = s.appendCopies(frames)
		}
		more = s.batch.more != 0
		C.close_frames(s.batch)
	}
	return frames[:min(len(frames), maxFrames+1)], from, nil
}

// lend makes receive lend the long frames of a message, until the next one is received: they are not copied
// then, nor when they are sent. Who keeps one must copy it.
func (s *socket) lend() { s.batch.lends = 1 }

// maxSpare is how many frames the memory of which is used again a socket keeps at most.
const maxSpare = 64

// reuse takes long frames that were received and are no longer needed. Frames to come have their memory.
func (s *socket) reuse(frames [][]byte) {
	for _, frame := range frames {
		if cap(frame) >= maxJoined && len(s.spare) < maxSpare {
			s.spare = append(s.spare, frame)
		}
	}
}

// room returns memory to append a long frame to.
func (s *socket) room(length int) []byte {
	if last := len(s.spare) - 1; last >= 0 {
		frame := s.spare[last]
		s.spare = s.spare[:last]
		if cap(frame) >= length {
			return frame[:0]
		}
	}
	return nil
}

// appendCopies appends copies of the frames in the batch, or those that are lent. Short ones share one
// allocation.
func (s *socket) appendCopies(frames [][]byte) [][]byte {
	batch := s.batch
	views := batch.views[:batch.count]
	length := 0
	for _, view := range views {
		if view.size < maxJoined {
			length += int(view.size)
		}
	}
	shared := make([]byte, length)
	frames = slices.Grow(frames, len(views))
	for _, view := range views {
		frame := unsafe.Slice((*byte)(view.data), view.size)
		if view.size < maxJoined {
			short := shared[:view.size:view.size]
			copy(short, frame)
			frame, shared = short, shared[view.size:]
		} else if view.lent == 0 {
			frame = append(s.room(int(view.size)), frame...)
		}
		frames = append(frames, frame)
	}
	return frames
}

// admitBy makes the endpoints that are bound from now on take only peers that the ZAP handler admits.
func (s *socket) admitBy(zapDomain string) error {
	err := s.SetZapDomain(zapDomain)
	if errno := C.enforce_domain(s.handle); errno != 0 {
		err = errors.Join(err, zmq.Errno(errno))
	}
	s.knowsUsers = true
	return err
}

// useCurveServer makes the endpoints that are bound from now on take only peers with keys.
func (s *socket) useCurveServer(key *secretKey) error {
	return errors.Join(s.SetCurveServer(1), s.SetCurveSecretkey(key.z85()))
}

// watch monitors events of the connections. Call it before the first one.
func (s *socket) watch(events zmq.Event) error {
	address := fmt.Sprintf("inproc://monitor.%016x", rand.Uint64())
	monitor, err := zmq.NewSocket(zmq.PAIR)
	if err != nil {
		return fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s.monitor = monitor
	fd, err := monitor.GetFd()
	s.monitorFd = C.int(fd)
	err = errors.Join(err,
		// Any number of events may wait. ZeroMQ's I/O thread would wait for ever to add one more, with
		// the lock that Close needs.
		monitor.SetRcvhwm(0),
		monitor.SetLinger(0),
		s.Monitor(address, events),
		monitor.Connect(address),
	)
	if err == nil {
		_, _, err = s.event() // The descriptor only signals after a read that found nothing.
	}
	return err
}

// noCommonMechanism is the value of HANDSHAKE_FAILED_PROTOCOL if one side wants keys and the other none.
const noCommonMechanism = C.ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH

// event returns the next event of the monitor, or 0 if there is none, and its value: the descriptor of
// the connection, or what is wrong.
func (s *socket) event() (event zmq.Event, value int, err error) {
	event, _, value, err = s.monitor.RecvEvent(zmq.DONTWAIT)
	if zmq.AsErrno(err) == zmq.Errno(syscall.EAGAIN) {
		return 0, -1, nil
	}
	if err != nil {
		return 0, -1, fmt.Errorf("monitor the connections: %w", err)
	}
	return event, value, nil
}
