package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
)

const requestUsage = `brequest asks a service and prints its reply.

Usage: brequest [FLAGS] NAME [ARG...]
       brequest --each [FLAGS] NAME [ARG...] <LINES
       brequest --list [FLAGS]

The ARGs are the arguments of the request. Without any, each line of standard input is
one, unless a terminal is there to type it. Flags go before the first ARG; an ARG that
looks like a flag goes after --.

  -t, --timeout DURATION  give up after so long; 0 waits for ever (30s)
  -n, --no-input          do not read standard input
  -0, --null              NUL bytes, not newlines, end the lines of standard input, and
                          the frames or replies on standard output
      --stdin             send all of standard input, as it is, as one last argument
      --retries N         after 69, 75 or 124, try again so many times (0)
      --no-wait           end with 69 at once when nobody serves NAME
      --list              print the services of the broker
      --host HOST, --port PORT
                          where the broker is (127.0.0.1, 5555)
      --broker ENDPOINT   the broker instead, tcp://HOST:PORT or ipc:///PATH
  -q, --quiet             say nothing but errors
  -v, --verbose           say each message
  -h, --help
      --version

  -e, --each              a request for each line, which is put after the ARGs, or where
                          one of them is {}; 123 when any failed
  -j, --jobs N            so many at a time (16); 1 for brokers that mix replies up
      --unordered         print replies as they come, not in the order of the lines
      --fail-fast         begin no more after one that failed
      --joblog FILE       write there a line for each request that ended
      --resume            skip the lines that FILE shows as done with status 0

Durations have a unit or are seconds: 500ms, 2.5, 1m. BACKBONE_HOST, BACKBONE_PORT and
BACKBONE_BROKER are as their flags.

What the service's command prints goes to standard output, byte for byte, and what it
says to standard error. A reply of several frames is printed one a line.

Exit status: that of the service's command (126, 127: cannot be run, not found; 128+N:
ended by signal N), and of brequest and the broker:
  0         the service replied
  64        wrong usage
  69        no broker was reachable, no worker came, or one of them was lost
  74        standard input or standard output failed
  75        the broker refuses for now; try again later
  76        the answer is not that of an MDP broker
  123       some of the requests of --each failed
  124       no reply within the timeout
  130, 143  SIGINT or SIGTERM ended the wait; a request that waited too is taken back

Examples:
  $ ls | brequest ls-service
  $ brequest ls-service -- -l /tmp
  $ brequest --stdin resize 800x600 <in.jpg >out.png
  $ brequest --timeout 2 slow-service || echo "exit status $?"
  $ find . -name '*.jpg' -print0 | brequest -0 --each --joblog thumbs thumb
`

type requestTool struct {
	commonFlags
	Timeout  duration `short:"t" default:"30s"`
	NoInput  bool     `short:"n" xor:"input"`
	Null     bool     `short:"0"`
	AllInput bool     `name:"stdin" xor:"input"`
	Retries  int
	NoWait   bool
	List     bool
	eachFlags
	Name string   `arg:"" optional:""`
	Args operands `arg:"" optional:"" passthrough:"partial"`
}

func (t *requestTool) Run() error {
	endpoint, err := t.endpoint()
	if err != nil {
		return err
	}
	if err := t.check(); err != nil {
		return err
	}
	if t.NoWait {
		if err := t.requireService(endpoint); err != nil {
			return err
		}
	}
	switch {
	case t.List:
		return t.list(endpoint)
	case t.Each:
		return t.each(endpoint)
	}
	return t.once(endpoint)
}

// check tells of flags and arguments that make no sense together.
func (t *requestTool) check() error {
	switch {
	case t.List && (t.Each || t.Name != ""):
		return misuse("brequest --list", "--list takes no service name")
	case t.Name == "" && !t.List:
		return misuse("brequest ls-service", "no service name")
	case t.Retries < 0:
		return misuse("0 or more", "--retries %d", t.Retries)
	}
	return t.eachFlags.check()
}

// client makes a Client of which a signal ends the waiting, so that it can take back what
// it asked for. A second signal, or one after restore, ends the process at once.
func (t *requestTool) client(endpoint string) (client *Client, restore func()) {
	stop, interrupt := context.WithCancelCause(context.Background())
	restore = onSignals(func(s os.Signal) { interrupt(signalled(s)) })
	context.AfterFunc(stop, restore)
	return NewClient(stop, endpoint), restore
}

// once is a single request.
func (t *requestTool) once(endpoint string) error {
	body, err := t.body(os.Stdin)
	if err != nil {
		return &failure{status: exitIO, err: err}
	}
	v := t.voice("brequest")
	v.detail("%s: asking at %s with %d frames", t.Name, endpoint, len(body))

	client, restore := t.client(endpoint)
	hide := t.watch(client)
	a := t.ask(client, body)
	hide()
	restore()
	switch {
	case a.err != nil && client.stop.Err() != nil:
		return context.Cause(client.stop)
	case a.err != nil:
		return t.explain(client, a)
	}
	v.detail("%s: a reply of %d frames", t.Name, len(a.output))
	if err := t.print(os.Stdout, a.output); err != nil {
		return outputFailure(err)
	}
	os.Stderr.Write(a.stderr)
	if a.status != 0 {
		return &failure{status: a.status}
	}
	return nil
}

// watch shows, where somebody looks and it takes long, what a Client waits for.
func (t *requestTool) watch(client *Client) (hide func()) {
	line := newStatusLine(t.voice("brequest"), 2*time.Second)
	begin := time.Now()
	client.Meanwhile = func() time.Time {
		return line.show(time.Second, func() string {
			waiting := "waiting for a reply"
			if !client.connected() {
				waiting = "waiting for a broker at " + client.Endpoint()
			}
			return fmt.Sprintf("brequest: %s: %s, %v", t.Name, waiting, time.Since(begin).Round(time.Second))
		})
	}
	return func() {
		client.Meanwhile = nil
		line.hide()
	}
}

// ask sends a request, and again as often as --retries allows where that may help.
func (t *requestTool) ask(client *Client, body [][]byte) answer {
	for tries := 1; tries <= t.Retries; tries++ {
		a := answerOf(client.Send(t.Name, body, time.Duration(t.Timeout)))
		if !a.temporary() {
			return a
		}
		pause := pauseAfter(tries)
		t.voice("brequest").detail("%s: status %d; trying again in %v", t.Name, a.status, pause)
		select {
		case <-time.After(pause):
		case <-client.stop.Done():
		}
	}
	return answerOf(client.Send(t.Name, body, time.Duration(t.Timeout)))
}

// body makes the frames of the request from the arguments, or else from stdin.
func (t *requestTool) body(stdin *os.File) ([][]byte, error) {
	body := framesOf(t.Args)
	switch {
	case t.AllInput:
		all, err := readAll(stdin)
		return append(body, all), err
	case t.NoInput, len(body) > 0, isatty.IsTerminal(stdin.Fd()):
		return body, nil
	}
	all, err := readAll(stdin)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return bytes.Split(bytes.TrimSuffix(all, t.separator()), t.separator()), nil
}

// separator ends each line of standard input, and each frame of a longer reply.
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

// An answer is what came of a request, in the terms of a command.
type answer struct {
	output [][]byte // one frame is a command's standard output
	stderr []byte
	status int
	err    error // why there is no reply
}

// answerOf makes an answer of what Client.Send returns.
func answerOf(reply [][]byte, err error) answer {
	stdout, stderr, status, ok := parseStatusReply(reply)
	switch {
	case ok:
		return answer{[][]byte{stdout}, stderr, status, nil}
	case err == nil:
		return answer{output: reply}
	case errors.Is(err, errNoBroker), errors.Is(err, errLost):
		return answer{status: exitUnavailable, err: err}
	case errors.Is(err, errTimeout):
		return answer{status: exitTimeout, err: err}
	case errors.Is(err, errProtocol):
		return answer{status: exitProtocol, err: err}
	}
	return answer{status: failureOf(err).status, err: err}
}

// temporary tells whether the same request may well have another answer next time.
func (a answer) temporary() bool {
	return a.status == exitUnavailable || a.status == exitTemporary || a.status == exitTimeout
}

// pauseAfter is the pause before another try. Those who failed together do not come back
// together.
func pauseAfter(tries int) time.Duration {
	pause := backoff(tries)
	return pause/2 + rand.N(pause/2)
}

// explain makes of an answer without a reply what a person can use.
func (t *requestTool) explain(client *Client, a answer) *failure {
	var f *failure
	if errors.As(a.err, &f) {
		return f // which says all
	}
	f = &failure{status: a.status, err: fmt.Errorf("%s: %w", t.Name, a.err)}
	switch {
	case errors.Is(a.err, errNoBroker):
		f.hint = "start one with bbroker, or tell where it is with --broker, --host or --port"
	case errors.Is(a.err, errLost):
		f.hint = "the request may have been done, or it is longer than bbroker --max-message"
	case errors.Is(a.err, errProtocol):
		f.hint = "is that an MDP/0.1 broker?"
	case errors.Is(a.err, errTimeout):
		// Only now does it matter whether anybody serves the name: requests for a service
		// that is still to come wait at the broker.
		switch code, _ := t.served(client); code {
		case mmiFound:
			f.err = fmt.Errorf("%w; it is served, but busy or slow", f.err)
			f.hint = "a longer --timeout, or 0 to wait for ever"
		case mmiNotFound:
			f.err = fmt.Errorf("%w; nobody serves it", f.err)
			f.hint = t.serveHint()
		default:
			f.err = fmt.Errorf("%w; the broker does not tell whether anybody serves it", f.err)
			f.hint = "is the broker still there?"
			if t.Each && !client.plain {
				f.hint += " one that knows no address stacks wants --jobs 1"
			}
		}
	}
	return f
}

// served asks the broker whether anybody serves the name. Some brokers do not know.
func (t *requestTool) served(client *Client) (code string, err error) {
	reply, err := client.Send(mmiService, framesOf([]string{t.Name}), time.Second)
	if len(reply) == 1 {
		code = string(reply[0])
	}
	return code, err
}

func (t *requestTool) serveHint() string {
	return fmt.Sprintf("start it with bservice %s COMMAND, or look at the name", t.Name)
}

// requireService fails where nobody serves the name, as far as the broker can tell.
func (t *requestTool) requireService(endpoint string) error {
	client, restore := t.client(endpoint)
	defer restore()
	defer client.Disconnect()
	code, err := t.served(client)
	switch {
	case client.stop.Err() != nil:
		return context.Cause(client.stop)
	case errors.Is(err, errNoBroker):
		return t.explain(client, answerOf(nil, err))
	case code == mmiNotFound:
		return &failure{status: exitUnavailable, err: fmt.Errorf("%s: nobody serves it", t.Name), hint: t.serveHint()}
	}
	return nil
}

// list prints the services of the broker: as it tells them, or in columns for a person.
func (t *requestTool) list(endpoint string) error {
	client, restore := t.client(endpoint)
	defer restore()
	defer client.Disconnect()
	reply, err := client.Send(mmiServices, nil, min(time.Duration(t.Timeout), 5*time.Second))
	a := answerOf(reply, err)
	unlisted := len(a.output) != 1 || string(a.output[0]) == mmiNotImplemented
	switch {
	case client.stop.Err() != nil:
		return context.Cause(client.stop)
	case a.err != nil && a.status != exitTimeout:
		return &failure{status: a.status, err: a.err}
	case unlisted:
		return &failure{status: cmp.Or(a.status, exitUnavailable), err: fmt.Errorf("the broker at %s does not tell its services", endpoint),
			hint: "bbroker does; one that is not ours may know nothing of " + mmiServices}
	case !isatty.IsTerminal(os.Stdout.Fd()):
		err = t.print(os.Stdout, a.output)
	default:
		columns := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		columns.Write(a.output[0])
		err = columns.Flush()
	}
	if err != nil {
		return outputFailure(err)
	}
	return nil
}

// Client asks services through a broker, one at a time with Send or many at once with
// Begin and Await. It belongs to one goroutine.
type Client struct {
	endpoint string
	stop     context.Context
	bell     *threadBell

	// Meanwhile, unless nil, is called before each wait of Send, and ends it at a time.
	Meanwhile func() time.Time

	// A plain client has one request in flight, as RFC 7 spells it. Another puts a frame
	// of its own at the head of the address, which a broker that knows address stacks
	// gives back, and so can tell the replies apart.
	plain bool

	link    *link            // nil when not connected
	waiting []*call          // begun and not yet sent
	flying  map[string]*call // sent, by correlation
	ended   []*call          // since the last Await
	due     time.Time        // not later than the first timeout; zero for none
	begun   int              // so far
	cancels int              // which the broker has not answered
}

// A call is a request and, once it has ended, what became of it: a reply, the body of
// which may be a status reply, or an error.
type call struct {
	service string
	body    [][]byte
	timeout time.Duration // 0 for none

	number      int    // in the order of Begin
	correlation string // empty when it is sent without
	due         time.Time
	ended       bool
	reply       [][]byte
	err         error
}

// mayWait tells whether a broker may keep it for later: its own services answer at once.
func (r *call) mayWait() bool { return !strings.HasPrefix(r.service, mmiPrefix) }

var (
	errNoBroker  = errors.New("no broker")
	errLost      = errors.New("lost the broker")
	errTimeout   = errors.New("no reply")
	errProtocol  = errors.New("bad reply")
	errCancelled = errors.New("cancelled")
)

// NewClient makes a client for one request at a time, whose waiting ends when stop is
// done.
func NewClient(stop context.Context, endpoint string) *Client {
	c := &Client{endpoint: endpoint, stop: stop, bell: newThreadBell(), plain: true, flying: map[string]*call{}}
	context.AfterFunc(stop, c.bell.Ring)
	return c
}

// Connect makes a connection to the broker, which need not be there yet. Requests do
// so too where there is none.
func (c *Client) Connect() error {
	if c.link != nil {
		return nil
	}
	stop := c.stop
	if !c.due.IsZero() {
		var cancel context.CancelFunc
		stop, cancel = context.WithDeadline(stop, c.due)
		defer cancel()
	}
	link, err := dial(stop, "brequest", c.endpoint)
	c.link = link
	return err
}

// Disconnect forgets the connection and what may still come over it.
func (c *Client) Disconnect() {
	if c.link != nil {
		c.link.Close()
		c.link, c.cancels = nil, 0
	}
}

func (c *Client) Endpoint() string { return c.endpoint }

// connected tells whether a broker is there.
func (c *Client) connected() bool { return c.link != nil && c.link.connected }

// Send asks a service and returns the body of its reply, which may be a status reply.
// A timeout of 0 is none. It fails with errNoBroker when none took the request, with
// errLost when the connection broke before the reply, with errTimeout when no reply
// came, with errProtocol when something else came, and with the error of stop.
//
// A request that it gives up is taken back if it has not begun. After any failure the
// client is not connected any more, so that a late reply cannot be taken for the next.
func (c *Client) Send(service string, body [][]byte, timeout time.Duration) ([][]byte, error) {
	r := &call{service: service, body: body, timeout: timeout}
	for c.Begin(r); !r.ended; {
		if err := c.stop.Err(); err != nil {
			c.Abandon()
			return nil, err
		}
		var until time.Time
		if c.Meanwhile != nil {
			until = c.Meanwhile()
		}
		if _, err := c.Await(until); err != nil {
			return nil, err
		}
	}
	return r.reply, r.err
}

// Begin puts a request on its way, and its timeout begins.
func (c *Client) Begin(r *call) {
	if r.timeout > 0 {
		r.due = time.Now().Add(r.timeout)
		c.due = earlier(c.due, r.due)
	}
	c.begun++
	r.number = c.begun
	if !c.plain {
		r.correlation = strconv.Itoa(r.number)
	}
	c.waiting = append(c.waiting, r)
}

// Await waits for something to happen, until a time unless that is zero, and returns the
// requests that ended. Where that of a plain client failed, it is taken back and the
// client not connected any more. An error is that of ZeroMQ, and final.
func (c *Client) Await(until time.Time) ([]*call, error) {
	if len(c.ended) > 0 {
		until = time.Now() // those were cancelled since the last time
	}
	if err := c.step(until); err != nil {
		return nil, err
	}
	ended := c.ended
	c.ended = nil
	if c.plain && len(ended) > 0 && ended[0].err != nil {
		c.Abandon()
	}
	return ended, nil
}

// Cancel asks the broker to drop a request. If it has not begun, it will end with
// errCancelled, and else as if nothing had been asked.
func (c *Client) Cancel(r *call) {
	if i := slices.Index(c.waiting, r); i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
		c.end(r, nil, errCancelled)
		return
	}
	c.cancel(r.correlation)
}

// Abandon asks the broker to drop all requests, and disconnects. It waits until the
// broker has answered, to be sure that it was asked, but not for long: brokers other
// than ours know nothing of that. It returns the requests that ended meanwhile.
func (c *Client) Abandon() []*call {
	c.waiting = nil
	if c.waitsAtBroker() {
		c.cancel("")
	}
	patience := time.Now().Add(time.Second / 2)
	for c.link != nil && c.cancels > 0 && time.Now().Before(patience) {
		if err := c.step(patience); err != nil {
			break
		}
	}
	c.Disconnect()
	clear(c.flying)
	ended := c.ended
	c.ended = nil
	return ended
}

// waitsAtBroker tells whether a request may wait at the broker.
func (c *Client) waitsAtBroker() bool {
	// The monitor may have more to tell than it has rung for.
	if c.link == nil || c.link.Look() != nil || !c.link.connected {
		return false
	}
	for _, r := range c.flying {
		if r.mayWait() {
			return true
		}
	}
	return false
}

// step waits, once, and does what there is to do then.
func (c *Client) step(until time.Time) error {
	if c.link == nil && len(c.waiting) == 0 {
		_, _, err := c.bell.Wait(nil, until)
		return err
	}
	if err := c.Connect(); err != nil {
		return err
	}
	freeIfLarge(c.flush())
	if c.link.lost {
		until = time.Now()
	}
	message, news, err := c.bell.Wait(c.link.socket, earlier(c.due, until))
	if err != nil {
		return err
	}
	now := time.Now()
	expired := !c.due.IsZero() && !now.Before(c.due)
	if expired || news {
		if err := c.link.Look(); err != nil {
			return err
		}
	}
	for c.link != nil && (message || c.link.lost) {
		frames, err := c.link.receive()
		if err != nil {
			return err
		}
		if frames == nil {
			break
		}
		c.take(frames)
	}
	if c.link != nil && c.link.lost {
		c.lose(fmt.Errorf("%w at %s before its reply", errLost, c.endpoint))
	}
	if expired {
		c.expire(now)
	}
	return nil
}

// flush sends the requests that wait, and returns how much of them is not needed any more.
//
// For the sake of their replies a client has no ZMQ_IMMEDIATE: with it, libzmq 4.3.4
// throws away what it has received but not yet handed out when the connection breaks, as
// it does right after the last words of a broker that stops.
func (c *Client) flush() (unneeded size) {
	for len(c.waiting) > 0 && !c.link.lost {
		r := c.waiting[0]
		err := c.send(r.service, r.body, r.correlation)
		if err == errWouldBlock {
			break
		}
		c.waiting = c.waiting[1:]
		c.flying[r.correlation] = r
		if c.plain {
			// Nothing sends it again, and the reply may need the room.
			unneeded += sizeOf(r.body)
			r.body = nil
		}
		c.link.lost = err != nil
	}
	return unneeded
}

func (c *Client) send(service string, body [][]byte, correlation string) error {
	m := Message{Kind: KindClient, Service: []byte(service), Body: body}
	if correlation != "" {
		m.Address = [][]byte{[]byte(correlation)}
	}
	return c.link.send(m.Frames())
}

func (c *Client) cancel(correlation string) {
	if err := c.send(mmiCancel, nil, correlation); err == nil {
		c.cancels++
	}
}

// take takes a message of the broker's.
func (c *Client) take(frames [][]byte) {
	c.link.connected = true // peers that speak ZMTP 2 had no handshake that succeeded
	m, err := Parse(frames)
	correlation := ""
	switch {
	case err != nil:
	case m.Kind != KindClient:
		err = fmt.Errorf("an unexpected %v", m.Kind)
	case c.plain:
	case len(m.Address) == 1:
		correlation = string(m.Address[0])
	case string(m.Service) != mmiCancel:
		err = errNoCorrelation
	}
	if err != nil {
		c.lose(fmt.Errorf("%w from %s: %w", errProtocol, c.endpoint, err))
		return
	}

	r := c.flying[correlation]
	switch {
	case string(m.Service) == mmiCancel && (r == nil || r.service != mmiCancel):
		c.cancels--
		if r != nil && len(m.Body) == 1 && string(m.Body[0]) == mmiFound {
			c.end(r, nil, errCancelled)
		}
	case r == nil:
		// It comes too late.
	case string(m.Service) != r.service:
		c.end(r, nil, fmt.Errorf("%w from %s: one of %q", errProtocol, c.endpoint, m.Service))
	default:
		c.end(r, m.Body, nil)
	}
}

// errNoCorrelation is what a broker makes of a request that knows no address stacks.
var errNoCorrelation = errors.New("it does not tell which request it is for; such brokers want --jobs 1")

// end is the end of a request that may be in flight.
func (c *Client) end(r *call, reply [][]byte, err error) {
	delete(c.flying, r.correlation)
	r.ended, r.reply, r.err = true, reply, err
	c.ended = append(c.ended, r)
}

// lose ends the requests in flight, if there are any, and with them the connection.
func (c *Client) lose(err error) {
	c.link.lost = false // ZeroMQ makes another one
	if len(c.flying) == 0 {
		return
	}
	c.Disconnect()
	for _, r := range c.inOrder() {
		c.end(r, nil, err)
	}
}

// inOrder are the requests in flight in the order of Begin.
func (c *Client) inOrder() []*call {
	return slices.SortedFunc(maps.Values(c.flying), func(x, y *call) int { return cmp.Compare(x.number, y.number) })
}

// expire ends the requests whose time is over.
func (c *Client) expire(now time.Time) {
	// What was sent to nobody waits in the socket, and must not run one day for nobody.
	if c.link != nil && !c.link.connected {
		c.Disconnect()
		c.waiting = slices.Concat(c.inOrder(), c.waiting)
		clear(c.flying)
	}
	c.due = time.Time{}
	over := func(r *call) bool {
		if r.due.IsZero() || now.Before(r.due) {
			c.due = earlier(c.due, r.due)
			return false
		}
		err := fmt.Errorf("%w from %s within %v", errTimeout, c.endpoint, r.timeout)
		if c.link == nil {
			err = fmt.Errorf("%w at %s within %v", errNoBroker, c.endpoint, r.timeout)
		}
		c.end(r, nil, err)
		return true
	}
	c.waiting = slices.DeleteFunc(c.waiting, over)
	for _, r := range c.inOrder() {
		if over(r) && r.mayWait() {
			c.cancel(r.correlation)
		}
	}
}

// earlier is the earlier of two times, of which a zero one is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
