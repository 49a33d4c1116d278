package main

// Waiting for ZeroMQ sockets: in poll(2), or by means of Go's network poller.

/*
#cgo nocallback wait_for_events
#cgo noescape wait_for_events
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <unistd.h>
#include <zmq.h>

enum { READABLE = 1, MONITORED = 2 };

// A waited_socket is a socket to wait for. wanted are the ZMQ_EVENTS that it may have already, 0 for
// none. happened is what there may be afterwards.
typedef struct { uintptr_t socket; int wanted, fd, monitor_fd, happened; } waited_socket;

// wait_for_events waits up to timeout milliseconds for messages and events of the monitors of
// sockets, and for a byte in the wake pipe. It returns whether there was one, or a negative errno.
static int wait_for_events(waited_socket *sockets, int count, int wake_fd, int timeout) {
	struct pollfd fds[2 * count + 1];
	char byte;

	for (int i = 0; i < count; i++) {
		int events = 0;
		size_t size = sizeof events;

		// The descriptor tells of new events only, not of those that were there before.
		while (sockets[i].wanted && zmq_getsockopt((void *)sockets[i].socket, ZMQ_EVENTS, &events, &size) == -1)
			if (errno != EINTR)
				return -errno;
		sockets[i].happened = events & sockets[i].wanted ? READABLE : 0;
		if (sockets[i].happened)
			timeout = 0;
		fds[2 * i] = (struct pollfd){sockets[i].fd, POLLIN, 0};
		fds[2 * i + 1] = (struct pollfd){sockets[i].monitor_fd, POLLIN, 0};
	}
	fds[2 * count] = (struct pollfd){wake_fd, POLLIN, 0};
	if (poll(fds, 2 * count + 1, timeout) == -1)
		return errno == EINTR ? 0 : -errno;
	for (int i = 0; i < count; i++) {
		if (fds[2 * i].revents)
			sockets[i].happened |= READABLE;
		if (fds[2 * i + 1].revents)
			sockets[i].happened |= MONITORED;
	}
	return fds[2 * count].revents && read(wake_fd, &byte, 1) == 1;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	zmq "github.com/pebbe/zmq4"
)

// A pollWaiter lets the goroutine that owns sockets wait for them, their monitors, a deadline and
// other goroutines. It waits in poll(2), which takes a thread but wakes sooner and at less cost
// than Go's scheduler.
type pollWaiter struct {
	woken   atomic.Bool
	pipe    [2]*os.File // closed when the waiter is garbage
	fd      C.int       // of the end to read
	wakeFd  int         // of the end to write
	err     error       // why there is no pipe
	sockets []C.waited_socket
}

func newPollWaiter() *pollWaiter {
	ends, err := openPipe()
	if err != nil {
		return &pollWaiter{wakeFd: -1, err: fmt.Errorf("open a pipe: %w", err)}
	}
	w := &pollWaiter{fd: C.int(ends[0]), wakeFd: ends[1]}
	for i, end := range ends {
		w.pipe[i] = os.NewFile(uintptr(end), "wake")
	}
	return w
}

// Wake ends the current Wait, or else the next one. Any goroutine may call it.
func (w *pollWaiter) Wake() {
	if !w.woken.Swap(true) && w.err == nil {
		w.pipe[1].Write([]byte{0})
	}
}

// Wait returns when a socket may have a message to receive or an event of its monitor, when one that
// is blocked can send again, after a Wake, and at the deadline unless that is zero. It sets readable
// and monitored of the sockets.
func (w *pollWaiter) Wait(deadline time.Time, sockets ...*socket) error {
	if w.err != nil {
		return w.err
	}
	timeout := C.int(-1)
	if !deadline.IsZero() {
		// Rounded up, or it would return too early again and again.
		timeout = C.int(min(max(0, time.Until(deadline)+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
	}
	w.sockets = w.sockets[:0]
	for _, s := range sockets {
		wanted := C.int(0)
		if !s.drained {
			wanted |= C.ZMQ_POLLIN
		}
		if s.blocked {
			wanted |= C.ZMQ_POLLOUT
		}
		fd := s.fd
		if s.paused {
			wanted &^= C.ZMQ_POLLIN
			fd = -1
		}
		w.sockets = append(w.sockets, C.waited_socket{socket: s.handle, wanted: wanted, fd: fd, monitor_fd: s.monitorFd})
	}
	woken := C.wait_for_events(unsafe.SliceData(w.sockets), C.int(len(w.sockets)), w.fd, timeout)
	if woken < 0 {
		return fmt.Errorf("wait for a ZeroMQ socket: %w", zmq.Errno(-woken))
	}
	if woken > 0 {
		w.woken.Store(false)
	}
	for i, s := range sockets {
		s.readable = w.sockets[i].happened&C.READABLE != 0
		s.monitored = w.sockets[i].happened&C.MONITORED != 0
	}
	return nil
}

// A netWaiter does the same for one socket by means of Go's network poller, so that any number
// of sockets are waited for without a thread each.
type netWaiter struct {
	socket              *socket
	wake                chan struct{}
	readable, monitored atomic.Bool // since the last wait
	copies              []*os.File  // of the descriptors, which are ZeroMQ's to close
	timer               *time.Timer
}

func newNetWaiter(s *socket) (*netWaiter, error) {
	w := &netWaiter{socket: s, wake: make(chan struct{}, 1), timer: time.NewTimer(0)}
	err := errors.Join(w.watch(s.fd, &w.readable), w.watch(s.monitorFd, &w.monitored))
	if err != nil {
		w.Close()
		return nil, fmt.Errorf("watch a ZeroMQ socket: %w", err)
	}
	return w, nil
}

// watch sets a flag and wakes the waiter whenever a descriptor becomes readable.
func (w *netWaiter) watch(fd C.int, flag *atomic.Bool) error {
	copied, err := openUninherited(func() ([]int, error) {
		copied, err := syscall.Dup(int(fd))
		return []int{copied}, err
	})
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(copied[0]), "ZMQ_FD")
	w.copies = append(w.copies, file)
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	go conn.Read(func(uintptr) (done bool) {
		flag.Store(true)
		w.Wake()
		return false
	})
	return nil
}

func (w *netWaiter) Close() {
	for _, file := range w.copies {
		file.Close()
	}
}

// Wake ends the current Wait, or else the next one. Any goroutine may call it.
func (w *netWaiter) Wake() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Wait is like that of a pollWaiter.
func (w *netWaiter) Wait(deadline time.Time) error {
	events := zmq.State(0)
	if !w.socket.drained {
		var err error
		if events, err = w.socket.GetEvents(); err != nil {
			return fmt.Errorf("wait for a ZeroMQ socket: %w", err)
		}
	}
	switch {
	case events&zmq.POLLIN != 0:
	case deadline.IsZero():
		<-w.wake
	default:
		w.timer.Reset(time.Until(deadline))
		select {
		case <-w.wake:
		case <-w.timer.C:
		}
	}
	w.socket.readable = w.readable.Swap(false) || events&zmq.POLLIN != 0
	w.socket.monitored = w.monitored.Swap(false)
	return nil
}

// earlier returns the earlier of two times, of which a zero one is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// openPipe returns the end to read of a pipe, and that to write. os.Pipe would start Go's poller, which costs a
// request time for nothing.
func openPipe() (ends []int, err error) {
	return openUninherited(func() ([]int, error) {
		ends := make([]int, 2)
		return ends, syscall.Pipe(ends)
	})
}

// openUninherited returns the descriptors that open opens, so that no command inherits them.
func openUninherited(open func() ([]int, error)) ([]int, error) {
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
