package main

// Sockets of ZeroMQ, as the three tools use them: a message is one call into C, a wait is
// another. With a call for each property of each frame, calling would cost a broker more
// than all that it does.

/*
#cgo pkg-config: libzmq
#cgo nocallback await
#cgo noescape await
#cgo nocallback put
#cgo noescape put
#cgo nocallback take
#cgo noescape take
#cgo nocallback drop
#cgo noescape drop
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <zmq.h>

enum { ROOM = 16 };

// An inbox holds frames of one message, all of them or as many as there is room for.
typedef struct {
	zmq_msg_t frames[ROOM];
	struct { void *data; size_t size; } parts[ROOM];
	int count, more;
} inbox;

// take receives frames of a message, and returns 0 or what errno is.
static int take(uintptr_t socket, inbox *in) {
	for (in->count = 0, in->more = 1; in->more && in->count < ROOM; in->count++) {
		zmq_msg_t *frame = &in->frames[in->count];
		zmq_msg_init(frame);
		while (zmq_msg_recv(frame, (void *)socket, ZMQ_DONTWAIT) == -1)
			if (errno != EINTR)
				return errno;
		in->parts[in->count].data = zmq_msg_data(frame);
		in->parts[in->count].size = zmq_msg_size(frame);
		in->more = zmq_msg_more(frame);
	}
	return 0;
}

static void drop(inbox *in) {
	for (; in->count > 0; in->count--)
		zmq_msg_close(&in->frames[in->count - 1]);
}

// put sends frames that lie one after the other, with or without more to follow, and
// returns 0 or what errno is: negative when a frame had been sent before.
static int put(uintptr_t socket, const char *data, const size_t *sizes, int count, int more) {
	for (int i = 0; i < count; data += sizes[i++]) {
		int flags = ZMQ_DONTWAIT | (more || i < count - 1 ? ZMQ_SNDMORE : 0);
		while (zmq_send((void *)socket, data, sizes[i], flags) == -1)
			if (errno != EINTR)
				return i == 0 ? errno : -errno;
	}
	return 0;
}

enum { MESSAGE = 1, NEWS = 2, RING = 4 };

// await waits for a message, for news of the monitor and for a bell, so many milliseconds.
// socket is 0 where it need not be asked. It returns what there may be, or what errno is
// as a negative number.
static int await(uintptr_t socket, int fd, int monitor, int bell, int timeout) {
	struct pollfd fds[] = {{fd, POLLIN, 0}, {monitor, POLLIN, 0}, {bell, POLLIN, 0}};
	int events = 0, there = 0;
	size_t size = sizeof events;
	char ring;

	// The descriptor tells of what is new, not of what was there before.
	while (socket && zmq_getsockopt((void *)socket, ZMQ_EVENTS, &events, &size) == -1)
		if (errno != EINTR)
			return -errno;
	if (poll(fds, 3, events & ZMQ_POLLIN ? 0 : timeout) == -1)
		return errno == EINTR ? 0 : -errno;
	if (events & ZMQ_POLLIN || fds[0].revents)
		there |= MESSAGE;
	if (fds[1].revents)
		there |= NEWS;
	if (fds[2].revents && read(bell, &ring, 1) == 1)
		there |= RING;
	return there;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	zmq "github.com/pebbe/zmq4"
)

// A socket is one of ZeroMQ and, perhaps, a monitor of what happens to its connections. It
// belongs to one goroutine.
type socket struct {
	*zmq.Socket
	handle C.uintptr_t // what zmq.Socket keeps to itself
	fd     C.int       // readable when there is news
	in     *C.inbox
	flat   []byte // frames on their way out
	dry    bool   // nothing is left to receive, until the descriptor tells of news

	monitor   *zmq.Socket
	monitorFd C.int

	stirred, told atomic.Bool // what rang a bell: the socket, the monitor
	copies        []*os.File  // of the descriptors, for that
}

func newSocket(kind zmq.Type) (*socket, error) {
	opened, err := zmq.NewSocket(kind)
	if err != nil {
		return nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s := &socket{Socket: opened, in: (*C.inbox)(C.calloc(1, C.sizeof_inbox)), monitorFd: -1}
	s.handle = C.uintptr_t(reflect.ValueOf(opened).Elem().FieldByName("soc").Pointer())
	fd, err := opened.GetFd()
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s.fd = C.int(fd)
	return s, nil
}

// errWouldBlock is what send returns when nothing was sent, for want of a peer that is
// connected and has read enough of what it got before.
var errWouldBlock = errors.New("it takes no messages")

// short is the length of frames, in bytes, that are rather copied than handled one by one.
// On their way in they share memory, and none keeps a long one from being freed.
const short = 16 << 10

// send sends a message, without waiting.
func (s *socket) send(frames [][]byte) error {
	s.dry = false // to send is to take note of news, too
	for first := true; len(frames) > 0; first = false {
		var sizes [C.ROOM]C.size_t
		data, n := frames[0], 1
		sizes[0] = C.size_t(len(data))
		if len(data) < short {
			s.flat = append(s.flat[:0], data...)
			for ; n < min(len(frames), C.ROOM) && len(s.flat)+len(frames[n]) < short; n++ {
				s.flat = append(s.flat, frames[n]...)
				sizes[n] = C.size_t(len(frames[n]))
			}
			data = s.flat
		}
		frames = frames[n:]
		more := C.int(min(1, len(frames)))
		failed := C.put(s.handle, (*C.char)(unsafe.Pointer(unsafe.SliceData(data))), &sizes[0], C.int(n), more)
		switch {
		case first && failed == C.EAGAIN:
			return errWouldBlock
		case failed != 0:
			// In the midst of a message this is a lost connection. ZeroMQ now drops
			// frames up to the next end of a message: the socket is of no more use.
			return fmt.Errorf("send: %w", zmq.Errno(max(failed, -failed)))
		}
	}
	return nil
}

// receive returns the next message, or nil when there is none yet.
func (s *socket) receive() (frames [][]byte, err error) {
	s.dry = false
	for more := true; more; {
		failed := C.take(s.handle, s.in)
		if failed != 0 {
			C.drop(s.in)
			if failed == C.EAGAIN && frames == nil {
				s.dry = true
				return nil, nil
			}
			return nil, fmt.Errorf("receive: %w", zmq.Errno(failed))
		}
		parts := s.in.parts[:s.in.count]
		length := 0
		for _, part := range parts {
			if part.size < short {
				length += int(part.size)
			}
		}
		together := make([]byte, length)
		frames = slices.Grow(frames, len(parts))
		for _, part := range parts {
			var frame []byte
			if part.size < short {
				frame, together = together[:part.size:part.size], together[part.size:]
			} else {
				frame = make([]byte, part.size)
			}
			copy(frame, unsafe.Slice((*byte)(part.data), part.size))
			frames = append(frames, frame)
		}
		more = s.in.more != 0
		C.drop(s.in)
	}
	return frames, nil
}

// watch has a monitor tell of some events, from before the first connection.
func (s *socket) watch(events zmq.Event) error {
	address := fmt.Sprintf("inproc://monitor.%016x", rand.Uint64())
	monitor, err := zmq.NewSocket(zmq.PAIR)
	if err != nil {
		return fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	s.monitor = monitor
	fd, err := monitor.GetFd()
	s.monitorFd = C.int(fd)
	err = errors.Join(err, s.Monitor(address, events), monitor.Connect(address), monitor.SetLinger(0))
	if err == nil {
		_, err = s.event() // ZeroMQ tells of news only those who found none before
	}
	return err
}

// event returns the next event of the monitor, or 0 when there is none yet.
func (s *socket) event() (zmq.Event, error) {
	event, _, _, err := s.monitor.RecvEvent(zmq.DONTWAIT)
	if zmq.AsErrno(err) == zmq.Errno(syscall.EAGAIN) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("monitor the connections: %w", err)
	}
	return event, nil
}

// Close stops the monitor's events first: ZeroMQ's I/O thread would wait for ever to tell a
// monitor that is gone (libzmq#3575).
func (s *socket) Close() {
	for _, file := range s.copies {
		file.Close()
	}
	if s.monitor != nil {
		s.Monitor("", 0)
		s.monitor.Close()
	}
	s.Socket.Close()
	C.free(unsafe.Pointer(s.in))
	s.in = nil
}

// A threadBell lets the goroutine that owns a socket wait for it, for its monitor, for a
// deadline and for other goroutines at once, in poll(2): a thread waits too, which wakes
// sooner and at less cost than Go's scheduler would wake the goroutine.
type threadBell struct {
	rung atomic.Bool
	pipe [2]*os.File // closed when they are garbage
	fd   C.int       // of the end to read
	err  error       // why there is no pipe
}

func newThreadBell() *threadBell {
	// os.Pipe would start Go's poller, which takes a request some of its time for nothing.
	ends, err := uninherited(func() ([]int, error) {
		ends := make([]int, 2)
		return ends, syscall.Pipe(ends)
	})
	if err != nil {
		return &threadBell{err: fmt.Errorf("open a pipe: %w", err)}
	}
	b := &threadBell{fd: C.int(ends[0])}
	for i, end := range ends {
		b.pipe[i] = os.NewFile(uintptr(end), "bell")
	}
	return b
}

// uninherited returns what open opens, as descriptors that no command inherits.
func uninherited(open func() ([]int, error)) ([]int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	opened, err := open()
	if err != nil {
		return nil, err
	}
	for _, fd := range opened {
		syscall.CloseOnExec(fd)
	}
	return opened, nil
}

// Ring ends the current Wait, or else the next. Any goroutine may call it.
func (b *threadBell) Ring() {
	if !b.rung.Swap(true) && b.err == nil {
		b.pipe[1].Write([]byte{0})
	}
}

// Wait returns when there may be a message to receive or news of the monitor, and else at a
// Ring or at the deadline, unless that is zero. Without a socket only those matter.
func (b *threadBell) Wait(s *socket, deadline time.Time) (message, news bool, err error) {
	if b.err != nil {
		return false, false, b.err
	}
	timeout := C.int(-1)
	if !deadline.IsZero() {
		// Rounded up, lest it be too early again and again.
		timeout = C.int(min(max(0, time.Until(deadline)+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
	}
	handle, fd, monitor := C.uintptr_t(0), C.int(-1), C.int(-1)
	if s != nil {
		fd, monitor = s.fd, s.monitorFd
		if !s.dry {
			handle = s.handle
		}
	}
	there := C.await(handle, fd, monitor, b.fd, timeout)
	if there < 0 {
		return false, false, fmt.Errorf("wait for a ZeroMQ socket: %w", zmq.Errno(-there))
	}
	if there&C.RING != 0 {
		b.rung.Swap(false)
	}
	return there&C.MESSAGE != 0, there&C.NEWS != 0, nil
}

// A bell does the same by Go's means: any number of them take no thread.
type bell struct {
	rings chan struct{}
	timer *time.Timer
}

func newBell() *bell {
	return &bell{rings: make(chan struct{}, 1), timer: time.NewTimer(0)}
}

func (b *bell) Ring() {
	select {
	case b.rings <- struct{}{}:
	default:
	}
}

// hear has a socket ring until it is closed.
func (b *bell) hear(s *socket) error {
	return errors.Join(
		s.onNews(s.fd, func() {
			s.stirred.Store(true)
			b.Ring()
		}),
		s.onNews(s.monitorFd, func() {
			s.told.Store(true)
			b.Ring()
		}),
	)
}

// onNews calls ring whenever a descriptor is readable anew, until the socket is closed.
func (s *socket) onNews(fd C.int, ring func()) error {
	// A copy, since the original is ZeroMQ's to close.
	copied, err := uninherited(func() ([]int, error) {
		copied, err := syscall.Dup(int(fd))
		return []int{copied}, err
	})
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(copied[0]), "ZMQ_FD")
	s.copies = append(s.copies, file)
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	go conn.Read(func(uintptr) (done bool) {
		ring()
		return false
	})
	return nil
}

// Wait is for a socket that it hears.
func (b *bell) Wait(s *socket, deadline time.Time) (message, news bool, err error) {
	if !s.dry {
		events, err := s.GetEvents()
		if err != nil {
			return false, false, fmt.Errorf("look at a ZeroMQ socket: %w", err)
		}
		if events&zmq.POLLIN != 0 {
			return true, s.told.Swap(false), nil
		}
	}
	if deadline.IsZero() {
		<-b.rings
	} else {
		b.timer.Reset(time.Until(deadline))
		select {
		case <-b.rings:
		case <-b.timer.C:
		}
	}
	return s.stirred.Swap(false), s.told.Swap(false), nil
}
