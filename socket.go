package main

// Sockets of ZeroMQ, as the three tools use them.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

func newSocket(kind zmq.Type) (*zmq.Socket, error) {
	socket, err := zmq.NewSocket(kind)
	if err != nil {
		return nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	return socket, nil
}

// setTransport sets what both ends of a connection want.
func setTransport(socket *zmq.Socket, endpoint string) error {
	return errors.Join(
		// Hosts vanish without a word; keepalive finds out within two minutes.
		socket.SetTcpKeepalive(1),
		socket.SetTcpKeepaliveIdle(60),
		socket.SetTcpKeepaliveIntvl(10),
		socket.SetTcpKeepaliveCnt(6),
		// Not by default: names would resolve to IPv6 addresses first.
		socket.SetIpv6(strings.Contains(endpoint, "[")),
	)
}

// lookUp puts an address in the place of a host's name. ZeroMQ would do so where it
// connects, but by glibc's means, which a static binary has not; and it would not tell
// of a name that there is not.
func lookUp(ctx context.Context, endpoint string) (string, error) {
	hostPort, isTCP := strings.CutPrefix(endpoint, "tcp://")
	host, port, err := net.SplitHostPort(hostPort)
	// What is malformed, or has a source address, is ZeroMQ's to judge.
	if !isTCP || err != nil || net.ParseIP(host) != nil || strings.ContainsAny(host, ";*%") {
		return endpoint, nil
	}
	addresses, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if dns := (*net.DNSError)(nil); errors.As(err, &dns) {
		return "", &failure{status: exitUnavailable, err: fmt.Errorf("look up %s: %w", host, noHost(dns.Err)), hint: "is that the name of the broker's host?"}
	}
	if err != nil {
		return "", err
	}
	// IPv4 first, as the broker listens unless it is told otherwise.
	address := addresses[max(0, slices.IndexFunc(addresses, func(a net.IPAddr) bool { return a.IP.To4() != nil }))]
	return "tcp://" + net.JoinHostPort(address.String(), port), nil
}

// noHost is why a name has no address, for now at least.
type noHost string

func (n noHost) Error() string { return string(n) }

// errWouldBlock is what send returns when nothing was sent, for want of a peer that is
// connected and has read enough of what it got before.
var errWouldBlock = errors.New("it takes no messages")

// send sends a message, without waiting.
func send(socket *zmq.Socket, frames [][]byte) error {
	for i, frame := range frames {
		flags := zmq.DONTWAIT
		if i < len(frames)-1 {
			flags |= zmq.SNDMORE
		}
		_, err := socket.SendBytes(frame, flags)
		switch {
		case i == 0 && wouldBlock(err):
			return errWouldBlock
		case err != nil:
			// In the midst of a message this is a lost connection. ZeroMQ now drops
			// frames up to the next end of a message: the socket is of no more use.
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// receive returns the next message, or nil when there is none yet.
func receive(socket *zmq.Socket) ([][]byte, error) {
	frames, err := socket.RecvMessageBytes(zmq.DONTWAIT)
	if wouldBlock(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return frames, nil
}

// wouldBlock tells whether a call with DONTWAIT failed since it could not wait.
func wouldBlock(err error) bool {
	return zmq.AsErrno(err) == zmq.Errno(syscall.EAGAIN)
}

// A monitor tells what happens to the connections of a socket.
type monitor struct {
	*zmq.Socket
	of      *zmq.Socket
	rang    atomic.Bool
	unwatch func()
}

// newMonitor rings the bell when there is something to tell.
func newMonitor(of *zmq.Socket, events zmq.Event, bell *bell) (*monitor, error) {
	address := fmt.Sprintf("inproc://monitor.%016x", rand.Uint64())
	socket, err := newSocket(zmq.PAIR)
	if err != nil {
		return nil, err
	}
	m := &monitor{Socket: socket, of: of}
	err = errors.Join(of.Monitor(address, events), socket.Connect(address), socket.SetLinger(0))
	if err == nil {
		m.unwatch, err = watch(socket, func() {
			m.rang.Store(true)
			bell.Ring()
		})
	}
	if err != nil {
		of.Monitor("", 0)
		socket.Close()
		return nil, err
	}
	return m, nil
}

// next returns the next event, or 0 when there is none yet.
func (m *monitor) next() (zmq.Event, error) {
	event, _, _, err := m.RecvEvent(zmq.DONTWAIT)
	if wouldBlock(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("monitor the connections: %w", err)
	}
	return event, nil
}

// news tells, once, whether the bell was rung for it: cheaper than next, and a little later.
func (m *monitor) news() bool { return m.rang.Swap(false) }

// Close must come before the monitored socket is closed, and stops the events first:
// ZeroMQ's I/O thread would wait for ever to tell a monitor that is gone (libzmq#3575).
func (m *monitor) Close() {
	m.of.Monitor("", 0)
	m.unwatch()
	m.Socket.Close()
}

// A bell lets the goroutine that owns a socket wait for it, its monitor, a deadline and
// other goroutines at once, by Go's means: the descriptor that ZeroMQ offers for that
// (ZMQ_FD) becomes readable when there is news, which is to be asked for then.
type bell struct {
	rings chan struct{}
	timer *time.Timer
}

func newBell() *bell {
	return &bell{rings: make(chan struct{}, 1), timer: time.NewTimer(0)}
}

// watch calls ring whenever there is news of the socket, until stop is called, which
// must be before the socket is closed.
func watch(socket *zmq.Socket, ring func()) (stop func(), err error) {
	fd, err := socket.GetFd()
	if err != nil {
		return nil, fmt.Errorf("watch a ZeroMQ socket: %w", err)
	}
	// A copy, since the original is ZeroMQ's to close, and one that no command inherits.
	syscall.ForkLock.RLock()
	fd, err = syscall.Dup(fd)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, fmt.Errorf("watch a ZeroMQ socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "ZMQ_FD")
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("watch a ZeroMQ socket: %w", err)
	}
	go conn.Read(func(uintptr) (done bool) {
		ring()
		return false
	})
	return func() { file.Close() }, nil
}

// Ring ends the current Wait, or else the next. Any goroutine may call it.
func (b *bell) Ring() {
	select {
	case b.rings <- struct{}{}:
	default:
	}
}

// Wait returns true when the socket has a message to receive, or else false, after a Rest.
func (b *bell) Wait(socket *zmq.Socket, deadline time.Time) (readable bool, err error) {
	// The descriptor does not tell of what was there before, nor of what came to light
	// when something was sent.
	events, err := socket.GetEvents()
	if err != nil {
		return false, fmt.Errorf("look at a ZeroMQ socket: %w", err)
	}
	if events&zmq.POLLIN != 0 {
		return true, nil
	}
	b.Rest(deadline)
	return false, nil
}

// Rest waits for a Ring or for the deadline, unless that is zero.
func (b *bell) Rest(deadline time.Time) {
	if deadline.IsZero() {
		<-b.rings
		return
	}
	b.timer.Reset(time.Until(deadline))
	select {
	case <-b.rings:
	case <-b.timer.C:
	}
}
