package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	zmq "github.com/pebbe/zmq4"
)

const requestUsage = `brequest asks a service and prints its reply.

Usage: brequest [FLAGS] NAME [ARG...]

The ARGs are the arguments of the request. Without any, each line of standard input is
one, unless a terminal is there to type it. Flags go before the first ARG; an ARG that
looks like a flag goes after --.

  -t, --timeout DURATION  give up after so long; 0 waits for ever (30s)
  -n, --no-input          do not read standard input
  -0, --null              NUL bytes end the arguments on standard input, and the frames
                          of a reply that has several, instead of newlines
      --stdin             send all of standard input, as it is, as one last argument
      --host HOST         host of the broker (127.0.0.1)
      --port PORT         port of the broker (5555)
      --broker ENDPOINT   the broker instead, tcp://HOST:PORT or ipc:///PATH
  -q, --quiet             say nothing but errors
  -v, --verbose           say each message
  -h, --help
      --version

Durations have a unit or are seconds: 500ms, 2.5, 1m.

What the service's command prints goes to standard output, byte for byte, and what it
says to standard error. A reply of several frames is printed one a line.

Environment, where no flag says otherwise:
  BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER    as --host, --port, --broker

Exit status:
  0         the service replied
  1-125     so ended the service's command
  126, 127  the command cannot be run; it was not found
  128+N     signal N ended the command
and of brequest and the broker:
  64        wrong usage
  69        no broker was reachable, no worker came, or one of them was lost
  74        standard input or standard output failed
  75        the broker refuses for now; try again later
  76        the answer is not that of an MDP broker
  124       no reply within the timeout
  130, 143  SIGINT or SIGTERM ended the wait; a request that waited too is taken back

Examples:
  $ brequest ls-service
  $ brequest ls-service -- -l /tmp
  $ ls | brequest ls-service
  $ find . -print0 | brequest -0 archive >archive.tar
  $ brequest --stdin resize 800x600 <in.jpg >out.jpg
  $ brequest --timeout 2 slow-service || echo "exit status $?"
`

type requestTool struct {
	commonFlags
	Timeout  duration `short:"t" default:"30s"`
	NoInput  bool     `short:"n" xor:"input"`
	Null     bool     `short:"0"`
	AllInput bool     `name:"stdin" xor:"input"`
	Name     string   `arg:"" optional:""`
	Args     operands `arg:"" optional:"" passthrough:"partial"`
}

func (t *requestTool) Run() error {
	endpoint, err := t.endpoint()
	if err != nil {
		return err
	}
	if t.Name == "" {
		return misuse("brequest ls-service", "no service name")
	}
	body, err := t.body(os.Stdin)
	if err != nil {
		return &failure{status: exitIO, err: err}
	}

	// A signal lets Send take the request back; a second one, or one after Send, ends the
	// process at once.
	stop, interrupt := context.WithCancelCause(context.Background())
	restore := onSignals(func(s os.Signal) { interrupt(signalled(s)) })
	context.AfterFunc(stop, restore)

	v := t.voice("brequest")
	client := NewClient(stop, endpoint)
	v.detail("%s: asking at %s with %d frames", t.Name, endpoint, len(body))
	reply, err := client.Send(t.Name, body, time.Duration(t.Timeout))
	restore()
	if err != nil {
		return t.explain(client, err)
	}
	v.detail("%s: a reply of %d frames", t.Name, len(reply))

	stdout, stderr, status, ok := parseStatusReply(reply)
	if ok {
		reply = [][]byte{stdout}
	}
	if err := t.print(os.Stdout, reply); err != nil {
		return &failure{status: exitIO, err: err}
	}
	if ok {
		os.Stderr.Write(stderr)
	}
	if status != 0 {
		return &failure{status: status}
	}
	return nil
}

// body makes the frames of the request from the arguments, or else from stdin.
func (t *requestTool) body(stdin *os.File) ([][]byte, error) {
	var body [][]byte
	for _, arg := range t.Args {
		body = append(body, []byte(arg))
	}
	switch {
	case t.AllInput:
		all, err := io.ReadAll(stdin)
		return append(body, all), err
	case t.NoInput, len(body) > 0, isatty.IsTerminal(stdin.Fd()):
		return body, nil
	}
	all, err := io.ReadAll(stdin)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return bytes.Split(bytes.TrimSuffix(all, t.separator()), t.separator()), nil
}

// separator ends each argument on standard input and each frame of a longer reply.
func (t *requestTool) separator() []byte {
	if t.Null {
		return []byte{0}
	}
	return []byte{'\n'}
}

// print writes one frame as it is, and several each with its end.
func (t *requestTool) print(stdout *os.File, body [][]byte) error {
	w := bufio.NewWriter(stdout)
	if len(body) == 1 {
		w.Write(body[0])
		unfinished := len(body[0]) > 0 && !bytes.HasSuffix(body[0], []byte("\n"))
		if unfinished && isatty.IsTerminal(stdout.Fd()) {
			w.WriteByte('\n')
		}
		return w.Flush()
	}
	for _, frame := range body {
		w.Write(frame)
		w.Write(t.separator())
	}
	return w.Flush()
}

// explain makes of an error of Client.Send what a person can use.
func (t *requestTool) explain(client *Client, err error) error {
	if client.stop.Err() != nil {
		return context.Cause(client.stop)
	}
	err = fmt.Errorf("%s: %w", t.Name, err)
	switch {
	case errors.Is(err, errNoBroker):
		return &failure{status: exitUnavailable, err: err, hint: "start one with bbroker, or tell where it is with --broker, --host or --port"}
	case errors.Is(err, errLost):
		return &failure{status: exitUnavailable, err: err, hint: "the request may have been done, or it is longer than bbroker --max-message"}
	case errors.Is(err, errProtocol):
		return &failure{status: exitProtocol, err: err, hint: "is that an MDP/0.1 broker?"}
	case !errors.Is(err, errTimeout):
		return err
	}
	// Only now does it matter whether anybody serves the name: requests for a service
	// that is still to come wait at the broker.
	reply, _ := client.Send(mmiService, [][]byte{[]byte(t.Name)}, time.Second)
	var code string
	if len(reply) == 1 {
		code = string(reply[0])
	}
	f := &failure{status: exitTimeout}
	switch code {
	case mmiFound:
		f.err = fmt.Errorf("%w; it is served, but busy or slow", err)
		f.hint = "a longer --timeout, or 0 to wait for ever"
	case mmiNotFound:
		f.err = fmt.Errorf("%w; nobody serves it", err)
		f.hint = fmt.Sprintf("start it with bservice %s COMMAND, or look at the name", t.Name)
	default:
		f.err = fmt.Errorf("%w; the broker does not tell whether anybody serves it", err)
		f.hint = "is the broker still there?"
	}
	return f
}

// Client asks services through a broker, one request at a time. It belongs to one
// goroutine.
type Client struct {
	endpoint string
	stop     context.Context
	link     *link // nil when not connected
}

var (
	errNoBroker = errors.New("no broker")
	errLost     = errors.New("lost the broker")
	errTimeout  = errors.New("no reply")
	errProtocol = errors.New("bad reply")
)

// NewClient makes a client whose Send ends when stop is done.
func NewClient(stop context.Context, endpoint string) *Client {
	return &Client{endpoint: endpoint, stop: stop}
}

// Connect makes a connection to the broker, which need not be there yet. Send does
// so too where there is none.
func (c *Client) Connect() error {
	if c.link != nil {
		return nil
	}
	link, err := dial("brequest", c.endpoint)
	c.link = link
	return err
}

// Disconnect forgets the connection and what may still come over it.
func (c *Client) Disconnect() {
	if c.link != nil {
		c.link.Close()
		c.link = nil
	}
}

func (c *Client) Endpoint() string { return c.endpoint }

// Send asks a service and returns the body of its reply, which may be a status reply.
// A timeout of 0 is none. It fails with errNoBroker when none took the request, with
// errLost when the connection broke before the reply, with errTimeout when no reply
// came, with errProtocol when something else came, and with the error of stop.
//
// A request that it gives up is taken back if it has not begun. After any failure the
// client is not connected any more, so that a late reply cannot be taken for the next.
func (c *Client) Send(service string, body [][]byte, timeout time.Duration) ([][]byte, error) {
	if err := c.Connect(); err != nil {
		return nil, err
	}
	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	reply, err := c.exchange(service, body, deadline)
	if err == nil {
		return reply, nil
	}
	if c.link.connected && !strings.HasPrefix(service, mmiPrefix) {
		c.cancel()
	}
	c.Disconnect()
	switch err {
	case errNoBroker:
		err = fmt.Errorf("%w at %s within %v", err, c.endpoint, timeout)
	case errLost:
		err = fmt.Errorf("%w at %s before its reply", err, c.endpoint)
	case errTimeout:
		err = fmt.Errorf("%w from %s within %v", err, c.endpoint, timeout)
	}
	return nil, err
}

// exchange sends the request to the broker, or to the first that comes, and waits for
// the reply.
func (c *Client) exchange(service string, body [][]byte, deadline time.Time) ([][]byte, error) {
	request := Message{Kind: KindClient, Service: []byte(service), Body: body}
	if err := send(c.link.Socket, request.Frames()); err != nil {
		return nil, err
	}
	frames, err := c.next(c.stop, deadline)
	if err != nil {
		return nil, err
	}
	return c.open(frames, service)
}

// cancel takes back a request that has not begun. It waits for an answer, to be sure
// that the cancel left, but not for long: brokers other than ours know nothing of it.
// The answer may be the reply to the request, when the two crossed.
func (c *Client) cancel() {
	request := Message{Kind: KindClient, Service: []byte(mmiCancel)}
	if err := send(c.link.Socket, request.Frames()); err == nil {
		c.next(context.Background(), time.Now().Add(time.Second/2))
	}
}

// next waits for the next message.
//
// For its sake a client has no ZMQ_IMMEDIATE: with it, libzmq 4.3.4 throws away a reply
// that it has received but not yet handed out when the connection breaks, as it does
// right after the last words of a broker that stops.
func (c *Client) next(stop context.Context, deadline time.Time) ([][]byte, error) {
	defer context.AfterFunc(stop, c.link.bell.Ring)()
	for {
		readable, err := c.link.bell.Wait(deadline)
		if err != nil {
			return nil, err
		}
		if err := c.link.Look(); err != nil {
			return nil, err
		}
		if readable || c.link.lost {
			if frames, err := receive(c.link.Socket); err != nil || frames != nil {
				return frames, err
			}
		}
		switch {
		case c.link.lost:
			return nil, errLost
		case stop.Err() != nil:
			return nil, stop.Err()
		case deadline.IsZero() || time.Now().Before(deadline):
			continue
		case c.link.connected:
			return nil, errTimeout
		}
		return nil, errNoBroker
	}
}

// open takes the body out of the reply of a service.
func (c *Client) open(frames [][]byte, service string) ([][]byte, error) {
	m, err := Parse(frames)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w from %s: %w", errProtocol, c.endpoint, err)
	case m.Kind != KindClient || string(m.Service) != service:
		return nil, fmt.Errorf("%w from %s: an unexpected %v", errProtocol, c.endpoint, m.Kind)
	}
	return m.Body, nil
}

// A link is a connection to a broker, which ZeroMQ makes and makes again by itself,
// and what it tells of that. It belongs to one goroutine.
type link struct {
	*zmq.Socket
	monitor   *monitor
	bell      *bell
	connected bool // the broker is there
	lost      bool // it was, and the connection broke
}

// dial makes a link for the tool that it names in its identity: printable, telling a
// person who it is, and never used twice.
func dial(tool, endpoint string, options ...func(*zmq.Socket) error) (*link, error) {
	socket, err := newSocket(zmq.DEALER)
	if err != nil {
		return nil, err
	}
	l := &link{Socket: socket}

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
	)
	// The high-water marks stay at 1000: one request and some heartbeats at a time
	// are far from it.
	for _, option := range options {
		err = errors.Join(err, option(socket))
	}
	if err == nil {
		l.monitor, err = newMonitor(socket, zmq.EVENT_HANDSHAKE_SUCCEEDED|zmq.EVENT_DISCONNECTED)
	}
	if err == nil {
		l.bell, err = newBell(socket, l.monitor)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	if err := socket.Connect(endpoint); err != nil {
		l.Close()
		return nil, misuse(endpointHint, "connect %s: %w", endpoint, err)
	}
	return l, nil
}

// Look reads what happened to the connection. A message that came before it broke can
// still be received afterwards.
func (l *link) Look() error {
	for {
		event, err := l.monitor.next()
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

func (l *link) Close() {
	if l.bell != nil {
		l.bell.Close()
	}
	if l.monitor != nil {
		l.monitor.Close()
	}
	l.Socket.Close()
}
