package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A link is a connection to a broker. ZeroMQ reconnects by itself; connected and broken record what
// happened. It belongs to one goroutine.
type link struct {
	*socket
	address    brokerAddress // the endpoint has an address in place of a name
	connected  bool          // the broker is there
	broken     bool          // it was, and the connection broke
	source     int           // the descriptor of the connection, or -1
	retried    bool          // an attempt to connect failed, and ZeroMQ tries again
	failed     int           // handshakes in a row
	suspicions int           // times in a row that they failed while the broker kept another connection
	mayProbe   bool          // once at a time
	refused    *failure      // why no connection will come about; nil if one may
}

// dial connects a tool to a broker. When ctx is done, it stops looking up the name of the host.
func dial(ctx context.Context, name string, address brokerAddress, options ...func(*socket) error) (*link, error) {
	endpoint, err := lookUp(ctx, address.endpoint)
	if err == nil {
		err = checkAccess(endpoint)
	}
	if err != nil {
		return nil, err
	}
	s, err := newSocket(zmq.DEALER)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		s.SetIdentity(newIdentity(name)),
		// What a socket still holds when it is closed is for nobody.
		s.SetLinger(0),
		// A broker that comes back is found within a second, without hammering it.
		s.SetReconnectIvl(20*time.Millisecond),
		s.SetReconnectIvlMax(time.Second),
		setTransport(s, endpoint),
		s.watch(zmq.EVENT_CONNECTED|zmq.EVENT_CONNECT_RETRIED|zmq.EVENT_DISCONNECTED|zmq.EVENT_HANDSHAKE_SUCCEEDED|
			zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL|zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL|zmq.EVENT_HANDSHAKE_FAILED_AUTH),
	)
	if address.keys != nil {
		err = errors.Join(err, address.keys.set(s))
	}
	// The high-water marks stay at 1000 messages, far from what a request at a time and some
	// heartbeats need.
	for _, option := range options {
		err = errors.Join(err, option(s))
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	if err := s.Connect(endpoint); err != nil {
		s.Close()
		return nil, misuse("an endpoint is "+endpointForm, "connect %s: %w", endpoint, err)
	}
	return &link{socket: s, address: brokerAddress{endpoint, address.keys}, source: -1}, nil
}

// newIdentity returns an identity that is never used again, and that nobody can guess. It is printable
// and tells who has it.
func newIdentity(name string) string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s.%.200s.%d.%016x", name, host, os.Getpid(), rand.Uint64())
}

// setTransport sets what both ends of a connection need.
func setTransport(s *socket, endpoint string) error {
	return errors.Join(
		// A host may vanish without a word. Keepalive notices within two minutes, but only while no
		// data is unacknowledged; TCP_MAXRT limits how long that may be.
		s.SetTcpKeepalive(1),
		s.SetTcpKeepaliveIdle(60),
		s.SetTcpKeepaliveIntvl(10),
		s.SetTcpKeepaliveCnt(6),
		s.SetTcpMaxrt(2*time.Minute),
		// The kernel waits longer and longer for an answer to SYN. A connection that is begun anew
		// every two seconds finds a network that is back.
		s.SetConnectTimeout(2*time.Second),
		// Only for literal addresses: with IPv6, names would resolve to IPv6 addresses first.
		s.SetIpv6(strings.Contains(endpoint, "[")),
	)
}

// send sends a message as socket.send does, and notes when the connection broke.
func (l *link) send(frames [][]byte) error {
	err := l.socket.send(frames)
	if err != nil && err != errWouldBlock {
		l.broken = true
	}
	return err
}

// receive returns the next message as socket.receive does. A message shows that the broker is
// there, which the monitor does not report of peers that speak ZMTP 2.
func (l *link) receive() ([][]byte, error) {
	frames, err := l.socket.receive()
	l.connected = l.connected || frames != nil
	return frames, err
}

// update reads what happened to the connection. Messages that came before it broke can still be
// received.
func (l *link) update() error {
	for l.mayProbe = true; ; {
		event, value, err := l.event()
		switch {
		case err != nil || event == 0:
			return err
		case event == zmq.EVENT_CONNECTED:
			l.source = value
		case event == zmq.EVENT_CONNECT_RETRIED:
			l.retried = true
		case event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
			l.connected, l.failed, l.suspicions = true, 0, 0
		case event == zmq.EVENT_DISCONNECTED:
			l.connected, l.broken, l.source = false, l.broken || l.connected, -1
		default:
			l.failed++
			if l.refused == nil {
				l.refused = l.refusal(event, value)
			}
		}
	}
}

// refusal returns what a failed handshake reveals about the keys, or nil.
func (l *link) refusal(event zmq.Event, value int) *failure {
	keys, mechanism := l.address.keys, "" // of the broker, as far as it is known
	mismatch := event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL && value == noCommonMechanism
	if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL && l.failed >= maxFailed && l.mayProbe {
		l.failed, l.mayProbe = 0, false // Meanwhile, more handshakes may fail.
		mechanism = l.probe()
	}
	forbidden := event == zmq.EVENT_HANDSHAKE_FAILED_AUTH && value == 400
	switch {
	case forbidden && keys == nil:
		return errNotAdmitted
	case forbidden && keys.own == nil:
		return errKnownKeyWanted
	case forbidden:
		return unknownKey(keys.own)
	case keys == nil && (mismatch || mechanism == "CURVE"):
		return errKeyWanted
	case keys != nil && (mismatch || mechanism == "NULL"):
		return errNoKeyWanted
	case keys != nil && mechanism == "CURVE" && l.suspicions == maxSuspicions:
		return errOtherBroker
	}
	return nil
}

// maxFailed is how many handshakes in a row fail without a reason before the keys are to blame. A
// stopping broker can cause one such failure.
const maxFailed = 3

// maxSuspicions is how often that happens before a broker is another one than expected. One that has no
// room for more connections closes them, too.
const maxSuspicions = 2

// probe returns the security mechanism of the broker: CURVE if it takes keys, NULL if it takes none, or nothing
// if that cannot be told within a second. ZeroMQ often closes a connection before it has sent the name of its
// mechanism, if the peer has another one. To a peer that stops in the middle of its greeting (ZMTP 3.0,
// RFC 23), it sends the whole of its own, and waits for the rest.
func (l *link) probe() string {
	endpoint := l.address.endpoint
	address := endpoint[max(strings.LastIndexByte(endpoint, '/'), strings.LastIndexByte(endpoint, ';'))+1:]
	connection, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return ""
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(time.Second))
	connection.Write([]byte("\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03")) // signature and version
	var greeting [64]byte
	_, err = io.ReadFull(connection, greeting[:])
	mechanism := strings.TrimRight(string(greeting[12:32]), "\x00")
	if err == nil && mechanism == "CURVE" && l.address.keys != nil {
		connection.SetDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = connection.Read(greeting[:])
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		l.suspicions++
	case err != nil:
		l.suspicions = 0
		return ""
	}
	return mechanism
}

// Why a broker takes no connection, or allows nothing.
var (
	errNotAdmitted    = &failure{status: exitNotAllowed, err: errors.New("the broker refuses the connection")}
	errKnownKeyWanted = &failure{status: exitNotAllowed, err: errors.New("the broker admits only keys that it knows"),
		hint: "give --key FILE, with a key that the broker knows; backbone --keygen FILE makes one"}
	errKeyWanted = &failure{status: exitNotAllowed, err: errors.New("the broker wants a key"),
		hint: "give --broker-key KEY, the broker's public key, and --key FILE, your secret key (backbone --keygen FILE makes one)"}
	errNoKeyWanted = &failure{status: exitProtocol, err: errors.New("the broker takes no keys"),
		hint: "leave out --key and --broker-key, or start bbroker with --key and --authorized"}
	errOtherBroker = &failure{status: exitNotAllowed, err: errors.New("the broker has another key than expected"),
		hint: "compare --broker-key, or the key in the endpoint, with what backbone --pubkey prints for the broker's key"}
)

func unknownKey(own *secretKey) *failure {
	public, err := own.public()
	if err != nil {
		return errNoCurve
	}
	return &failure{status: exitNotAllowed, err: fmt.Errorf("the broker does not know the key %v", public),
		hint: "add it to the file of bbroker --authorized, and send bbroker SIGHUP"}
}

// What to look at if the broker knows a key, but does not allow something.
const (
	mayCallHint  = "check the name; the file of bbroker --authorized says what the key may call"
	mayServeHint = "check the name; the file of bbroker --authorized says what the key may serve"
)

// received returns the number of bytes that came over the connection, or 0 if that is unknown.
func (l *link) received() uint64 { return bytesReceived(l.source) }

// lookUp replaces the name of a host in an endpoint by its address. ZeroMQ would look it up by
// means of glibc, which a static binary lacks, and would not report a name that does not exist.
func lookUp(ctx context.Context, endpoint string) (string, error) {
	hostPort, ok := strings.CutPrefix(endpoint, "tcp://")
	host, port, err := net.SplitHostPort(hostPort)
	// ZeroMQ judges endpoints that are malformed or have a source address.
	if !ok || err != nil || net.ParseIP(host) != nil || strings.ContainsAny(host, ";*%") {
		return endpoint, nil
	}
	addresses, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if dns := (*net.DNSError)(nil); errors.As(err, &dns) {
		return "", &failure{status: exitUnavailable, err: fmt.Errorf("%w %s: %s", errLookUp, host, dns.Err), hint: "is that the name of the broker's host?"}
	}
	if err != nil {
		return "", err
	}
	// IPv4 first: the broker listens there unless it is told otherwise.
	address := addresses[max(0, slices.IndexFunc(addresses, func(a net.IPAddr) bool { return a.IP.To4() != nil }))]
	return "tcp://" + net.JoinHostPort(address.String(), port), nil
}

// checkAccess fails if the socket of an ipc:// endpoint may not be opened. ZeroMQ would wait for a
// broker in silence.
func checkAccess(endpoint string) error {
	const writable = 2 // W_OK; see access(2)
	path, ok := strings.CutPrefix(endpoint, "ipc://")
	if !ok || !errors.Is(syscall.Access(path, writable), fs.ErrPermission) {
		return nil
	}
	return &failure{status: exitNotAllowed, err: fmt.Errorf("connect %s: %w", endpoint, errPermission),
		hint: "the permissions of the socket and its directory say who may call and serve"}
}

// errPermission means that the permissions of a socket do not allow to connect, at least for now.
var errPermission = errors.New("permission denied")

// errLookUp means that a name has no address, at least for now.
var errLookUp = errors.New("look up")
