package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A link is a connection to a broker, which ZeroMQ makes and makes again by itself,
// and what it tells of that. It belongs to one goroutine.
type link struct {
	*socket
	connected bool // the broker is there
	lost      bool // it was, and the connection broke
}

// dial makes a link for the tool that it names in its identity: printable, telling a
// person who it is, and never used twice. Looking up the host's name takes no longer than
// until stop is done.
func dial(stop context.Context, tool, endpoint string, options ...func(*socket) error) (*link, error) {
	endpoint, err := lookUp(stop, endpoint)
	if err != nil {
		return nil, err
	}
	socket, err := newSocket(zmq.DEALER)
	if err != nil {
		return nil, err
	}
	host, _ := os.Hostname()
	identity := fmt.Sprintf("%s.%.200s.%d.%08x", tool, host, os.Getpid(), rand.Uint32())
	err = errors.Join(
		socket.SetIdentity(identity),
		// What a socket still holds when it is closed is for nobody.
		socket.SetLinger(0),
		// A broker that comes back is found within a second, without hammering.
		socket.SetReconnectIvl(20*time.Millisecond),
		socket.SetReconnectIvlMax(time.Second),
		setTransport(socket, endpoint),
		socket.watch(zmq.EVENT_HANDSHAKE_SUCCEEDED|zmq.EVENT_DISCONNECTED),
	)
	// The high-water marks stay at 1000: one request and some heartbeats at a time
	// are far from it.
	for _, option := range options {
		err = errors.Join(err, option(socket))
	}
	if err != nil {
		socket.Close()
		return nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	if err := socket.Connect(endpoint); err != nil {
		socket.Close()
		return nil, misuse(endpointHint, "connect %s: %w", endpoint, err)
	}
	return &link{socket: socket}, nil
}

// Look reads what happened to the connection. A message that came before it broke can
// still be received afterwards.
func (l *link) Look() error {
	for {
		event, err := l.event()
		switch {
		case err != nil || event == 0:
			return err
		case event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
			l.connected = true
		case l.connected:
			l.connected, l.lost = false, true
		}
	}
}

// setTransport sets what both ends of a connection want.
func setTransport(socket *socket, endpoint string) error {
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
