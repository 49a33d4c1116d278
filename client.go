package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
)

const requestUsage = `brequest calls a service and prints its reply.

Usage: brequest [FLAGS] NAME [ARG...]
       brequest --each [FLAGS] NAME [ARG...] <LINES
       brequest --list [FLAGS]

The ARGs are the arguments of the request. Without any, each line of standard input is
one, up to 2 MiB, unless standard input is a terminal. Put flags before the first ARG,
and -- before an ARG that looks like a flag.

  -t, --timeout DURATION  give up after this long; 0 is never (30s; 0 with --each)
  -n, --no-input          do not read standard input
  -0, --null              use NUL bytes instead of newlines: after the lines of standard
                          input, and after the frames or replies on standard output
      --stdin             send all of standard input, as it is, as one last argument
      --stream            print output as it comes; --timeout is the longest silence
      --retries N         after 69, 75 or 124, try again up to N times (0)
      --no-wait           end with 69 at once if nobody serves NAME
      --list              print the services of the broker
      --host HOST         host of the broker (127.0.0.1)
  -p, --port PORT         port of the broker (5555)
  -b, --broker ENDPOINT   use this broker instead: tcp://HOST:PORT[#KEY] or ipc:///PATH;
                          of several, the first that is there and has NAME served
      --broker-key KEY    public key of the broker, for one that takes keys
      --key FILE          your secret key; the broker must know its public key
  -q, --quiet             print errors only
  -v, --verbose           print a message for each request and reply
  -h, --help
      --version
  -e, --each              make a request of each line, which takes the place of an ARG
                          {}, or else follows the ARGs; end with 123 if any failed
  -j, --jobs N            have up to N requests in flight (16)
      --unordered         print replies as they come, not in the order of the lines
      --fail-fast         begin no more requests after one that failed
      --joblog FILE       write a line to FILE for each request that ended
      --resume            skip the lines that FILE shows as done with status 0

A duration has a unit, or is in seconds: 500ms, 2.5, 1m. BACKBONE_HOST, BACKBONE_PORT,
BACKBONE_BROKER, BACKBONE_KEY and BACKBONE_BROKER_KEY set the defaults of their flags.

What the service's command prints goes to standard output, byte for byte, and its error
messages to standard error. A reply of several frames is printed with one on each line.

Exit status: that of the service's command (126: it cannot be run; 127: it was not
found; 128+N: signal N ended it), or that of brequest and the broker:
  0         the service replied
  64        wrong usage
  69        no broker could be reached, no worker came, or one of them was lost
  74        standard input or standard output failed
  75        the broker refuses for now; try again later
  76        the answer is not that of an MDP broker
  77        not allowed: the key, or the permissions of the broker's socket, forbid it
  123       some requests of --each failed
  124       no reply within the timeout
  130, 143  ended by SIGINT or SIGTERM (129, 131: SIGHUP, SIGQUIT); a request that has
            not begun is taken back

Examples:
  $ ls | brequest ls-service
  $ brequest ls-service -- -l /tmp
  $ brequest --stdin resize 800x600 <in.jpg >out.png
  $ brequest --stream make all || echo "exit status $?"
  $ find . -name '*.jpg' -print0 | brequest -0 --each --joblog thumbs thumb
`

type requestTool struct {
	clientFlags
	Timeout  *time.Duration `short:"t"`
	NoInput  bool           `short:"n" xor:"input"`
	Null     bool           `short:"0"`
	AllInput bool           `name:"stdin" xor:"input"`
	Stream   bool
	Retries  int `default:"0"`
	NoWait   bool
	List     bool
	eachFlags
	Name string   `arg:"" optional:""`
	Args operands `arg:"" optional:"" passthrough:"partial"`
}

// parsePlain fills in the arguments of a request without flags, whose defaults are all zero. It returns false
// if there may be flags: they stand before the first ARG, so only two arguments have to be looked at.
func (t *requestTool) parsePlain(args []string) bool {
	isFlag := func(arg string) bool { return strings.HasPrefix(arg, "-") }
	if len(args) == 0 || slices.ContainsFunc(args[:min(2, len(args))], isFlag) {
		return false
	}
	t.Name, t.Args = args[0], args[1:]
	return true
}

func (t *requestTool) Run() error {
	brokers, err := t.addresses()
	if err != nil {
		return err
	}
	if err := t.check(); err != nil {
		return err
	}
	if t.NoWait {
		if err := t.requireService(brokers); err != nil {
			return err
		}
	}
	switch {
	case t.List:
		return t.list(brokers)
	case t.Each:
		return t.each(brokers)
	}
	return t.once(brokers)
}

// defaultTimeout is the default of --timeout, but for the requests of a batch: they may wait behind
// each other.
const defaultTimeout = 30 * time.Second

func (t *requestTool) timeout() time.Duration {
	switch {
	case t.Timeout != nil:
		return *t.Timeout
	case t.Each:
		return 0
	}
	return defaultTimeout
}

// check rejects flags and arguments that make no sense together.
func (t *requestTool) check() error {
	switch {
	case t.List && (t.Each || t.NoWait || t.Name != ""):
		return misuse("brequest --list", "--list takes no service name, no --each and no --no-wait")
	case t.Name == "" && !t.List:
		return misuse("brequest ls-service", "no service name")
	case t.Stream && (t.Each || t.List):
		return misuse("brequest --stream NAME", "--stream can't be used with --each or --list: it prints the output of one request")
	case t.Retries < 0:
		return misuse("--retries 3", "--retries must be 0 or more, not %d", t.Retries)
	}
	return t.eachFlags.check()
}

// client returns a Client whose waiting ends with a signal, so that it can take back what it
// asked for. A second signal, or one after restore, ends the process at once.
func (t *requestTool) client(brokers []brokerAddress) (client *Client, restore func()) {
	stop, restore := interruptible()
	client = newClient(stop, brokers)
	client.service = t.Name
	return client, restore
}

// interruptible returns a context that a signal ends.
func interruptible() (stop context.Context, restore func()) {
	stop, interrupt := context.WithCancelCause(context.Background())
	return stop, onSignals(stopSignals, func(s syscall.Signal) { interrupt(signalled(s)) })
}

// once makes a single request.
func (t *requestTool) once(brokers []brokerAddress) error {
	c := t.console("brequest")
	client, restore := t.client(brokers)
	defer restore()
	body, err := t.readBody(client.stop, os.Stdin, c)
	if err != nil {
		return err
	}
	c.debugf("%s: sending %d frames to %s", t.Name, len(body), client.Endpoint())

	client.retrying = func(request *call, pause time.Duration) {
		c.debugf("%s: status %d; trying again in %v", t.Name, request.status(), pause)
	}
	request := &call{service: t.Name, body: body, timeout: t.timeout(), retries: t.Retries}
	status := newStatusLine(c, patience)
	report := waitReport{client: client, service: t.Name, begin: time.Now()}
	waits := func() (due time.Time) {
		if report.changed() {
			status.refresh()
		}
		return status.show(time.Second, report.text)
	}
	if t.Stream && !isManagement(t.Name) { // The broker itself answers in one piece.
		return t.stream(client, request, status, waits)
	}
	err = client.do(request, waits)
	status.hide()
	restore()
	switch {
	case err != nil:
		return err
	case request.err != nil:
		return t.explain(client, request.err)
	}
	reply := request.reply
	c.debugf("%s: received a reply of %d frames", t.Name, len(reply.Output))
	if err := outputFailure(t.print(os.Stdout, reply.Output)); err != nil {
		return err
	}
	os.Stderr.Write(reply.Stderr)
	return failureIn(reply)
}

// failureIn returns the failure that a reply reports, or nil. What its error messages say is printed
// already.
func failureIn(reply Reply) error {
	switch {
	case reply.Status == 0:
		return nil
	case reply.FromBroker && reply.Status == exitNotAllowed:
		return &failure{status: reply.Status, hint: mayCallHint}
	}
	return &failure{status: reply.Status}
}

// readBody returns the frames of the request: the arguments, or else standard input. It tells a person at a
// terminal that standard input is still being read: once, because the terminal may belong to whoever writes it.
func (t *requestTool) readBody(stop context.Context, stdin *os.File, c console) (body [][]byte, err error) {
	if !t.AllInput && (t.NoInput || len(t.Args) > 0 || isatty.IsTerminal(stdin.Fd())) {
		return framesOf(t.Args), nil
	}
	done := make(chan struct{})
	var read [][]byte
	var readError error
	go func() {
		defer close(done)
		read, readError = t.readInput(stdin)
	}()
	var late <-chan time.Time
	if isWatched(c) && !isatty.IsTerminal(stdin.Fd()) {
		late = time.After(patience)
	}
	for {
		select {
		case <-done:
			return read, readError
		case <-stop.Done():
			return nil, context.Cause(stop)
		case <-late:
			c.infof("%s: reading standard input", t.Name)
		}
	}
}

// patience is how long a person waits before a request tells what it waits for.
const patience = 2 * time.Second

// maxLines limits what standard input may hold as arguments, in bytes. It is the ARG_MAX of Linux, above
// which no command can be run, and as frames more input would need far more memory.
const maxLines = 2 << 20

// readInput returns the frames of a request that has standard input.
func (t *requestTool) readInput(stdin *os.File) ([][]byte, error) {
	if t.AllInput {
		input, err := readAll(stdin)
		return append(framesOf(t.Args), input), inputFailure(err)
	}
	input, err := io.ReadAll(io.LimitReader(stdin, maxLines+1))
	switch {
	case len(input) > maxLines:
		return nil, misuse("--each makes a request of each line, and --stdin sends all of it as one argument",
			"standard input is longer than 2 MiB, too long for arguments")
	case err != nil || len(input) == 0:
		return nil, inputFailure(err)
	}
	return bytes.Split(bytes.TrimSuffix(input, t.separator()), t.separator()), nil
}

// separator ends each line of standard input, and each frame of a reply of several.
func (t *requestTool) separator() []byte {
	if t.Null {
		return []byte{0}
	}
	return []byte{'\n'}
}

// An outputWriter writes replies to standard output: a single frame as it is, and several with a
// separator after each. A terminal gets a final newline.
type outputWriter struct {
	*bufio.Writer
	file       *os.File
	separator  []byte
	unfinished bool // the last byte was no newline
}

func (t *requestTool) outputTo(stdout *os.File) *outputWriter {
	return &outputWriter{Writer: bufio.NewWriter(stdout), file: stdout, separator: t.separator()}
}

func (w *outputWriter) write(frames [][]byte) {
	if len(frames) == 1 {
		w.Write(frames[0])
		if len(frames[0]) > 0 {
			w.unfinished = !bytes.HasSuffix(frames[0], []byte("\n"))
		}
		return
	}
	for _, frame := range frames {
		w.Write(frame)
		w.Write(w.separator)
		w.unfinished = false
	}
}

func (w *outputWriter) finish() error {
	if w.unfinished && isatty.IsTerminal(w.file.Fd()) {
		w.WriteByte('\n')
	}
	return w.Flush()
}

func (t *requestTool) print(stdout *os.File, frames [][]byte) error {
	w := t.outputTo(stdout)
	w.write(frames)
	return w.finish()
}

// explain adds the name of the service to the error of a request. After a timeout it also asks the
// broker whether anybody serves the name; not before, because a request may wait for a service that
// is still to come.
func (t *requestTool) explain(client *Client, err error) error {
	if !errors.Is(err, errTimeout) {
		return fmt.Errorf("%s: %w", t.Name, err)
	}
	var why, hint string
	switch code, _ := t.lookUpService(client); code {
	case mmiFound:
		why, hint = "it is served, but busy or slow", "a longer --timeout, or 0 to wait for ever"
	case mmiNotFound:
		why, hint = "nobody serves it", t.serveHint()
	default:
		why, hint = "the broker does not tell whether anybody serves it", "is the broker still there?"
	}
	return &failure{status: exitTimeout, err: fmt.Errorf("%s: %w; %s", t.Name, err, why), hint: hint}
}

// lookUpPatience is how long the broker may take to tell whether anybody serves a name. Some brokers do
// not answer.
const lookUpPatience = time.Second

// within returns a patience, or --timeout if that is shorter.
func (t *requestTool) within(patience time.Duration) time.Duration {
	if limit := t.timeout(); limit > 0 {
		return min(patience, limit)
	}
	return patience
}

// lookUpService asks the broker whether anybody serves the name.
func (t *requestTool) lookUpService(client *Client) (code string, err error) {
	reply, err := client.Send(mmiService, framesOf([]string{t.Name}), t.within(lookUpPatience))
	return serviceCode(reply), err
}

// serviceCode returns the answer of mmi.service, or an empty text if the reply is none.
func serviceCode(reply Reply) string {
	if len(reply.Output) != 1 {
		return ""
	}
	return string(reply.Output[0])
}

func (t *requestTool) serveHint() string {
	return fmt.Sprintf("start it with bservice %s COMMAND, or check the name", t.Name)
}

// requireService fails if nobody serves the name, as far as the broker can tell.
func (t *requestTool) requireService(brokers []brokerAddress) error {
	client, restore := t.client(brokers)
	defer restore()
	defer client.Disconnect()
	code, err := t.lookUpService(client)
	switch {
	case code == mmiNotFound:
		return &failure{status: exitUnavailable, err: fmt.Errorf("%s: nobody serves it", t.Name), hint: t.serveHint()}
	case err == nil, errors.Is(err, errTimeout):
		return nil
	}
	return t.explain(client, err)
}

// Client calls services through a broker, one at a time with Send, or many at once with Begin
// and Await. It is the loop around its callers: it owns their sockets and the clock. It belongs to
// one goroutine.
type Client struct {
	brokers  []brokerAddress      // in the order of preference
	first    int                  // of the brokers, for the next search
	resting  map[string]time.Time // until when brokers that stop are not tried, by their endpoint
	service  string               // that decides between brokers; empty for none
	seeker   *seeker              // looks for one of several brokers, nil if that is not needed
	stop     context.Context
	waiter   *pollWaiter
	retrying func(c *call, pause time.Duration) // told of each retry; may be nil
	options  []func(*socket) error              // of connections

	// A broker that knows address stacks takes all calls over the one connection of the first lane.
	// Otherwise there is a lane for each call in flight.
	correlated bool
	lanes      []*lane

	// reachLimit is how long calls wait for a broker in vain before the client fails; 0 for ever.
	reachLimit       time.Duration
	unreachableSince time.Time // zero while the broker is there, or there are no calls
}

// A lane is a caller and its connection, nil when not connected.
type lane struct {
	caller
	link *link
}

// NewClient returns a client for the broker at an endpoint. When stop is done, its waiting ends.
func NewClient(stop context.Context, endpoint string) *Client {
	return newClient(stop, []brokerAddress{{endpoint: endpoint}})
}

// newClient returns a client for one of several brokers, in the order of preference.
func newClient(stop context.Context, brokers []brokerAddress) *Client {
	c := &Client{brokers: brokers, resting: map[string]time.Time{}, stop: stop, waiter: newPollWaiter()}
	context.AfterFunc(stop, c.waiter.Wake)
	return c
}

// Correlate tells the client that the broker knows address stacks.
func (c *Client) Correlate() {
	c.correlated = true
	for _, l := range c.lanes {
		l.correlated = true
	}
}

// freeLane returns a lane that can take another call, a new one if there is none.
func (c *Client) freeLane() *lane {
	for _, l := range c.lanes {
		if !c.correlated && !l.busy() && !l.conn.takesCalls(false) {
			l.conn = nil // The next call gets a new connection.
			l.closeDropped()
		}
		if (c.correlated || !l.busy()) && !l.avoided(time.Now()) {
			return l
		}
	}
	l := &lane{caller: caller{endpoint: c.Endpoint(), several: len(c.brokers) > 1, correlated: c.correlated, retrying: c.retrying}}
	c.lanes = append(c.lanes, l)
	return l
}

// connectLane begins to connect to the broker, which need not be there yet.
func (c *Client) connectLane(l *lane) error {
	if l.link != nil {
		return nil // It was dropped and is still to be closed.
	}
	stop := c.stop
	if !l.due.IsZero() {
		var cancel context.CancelFunc
		stop, cancel = context.WithDeadline(stop, l.due)
		defer cancel()
	}
	address := c.brokers[0]
	if i := slices.IndexFunc(c.lanes, (*lane).usable); i >= 0 {
		address, l.endpoint = c.lanes[i].link.address, c.lanes[i].endpoint // whose name need not be looked up again
	}
	opened, err := dial(stop, "brequest", address, c.options...)
	if err != nil {
		return err
	}
	l.use(opened)
	return nil
}

// use lets calls go over a connection.
func (l *lane) use(link *link) {
	l.link = link
	l.open(link.send)
	l.conn.received = link.received
}

// Disconnect closes the connections, and forgets the calls in flight.
func (c *Client) Disconnect() {
	c.stopSeeking()
	for _, l := range c.lanes {
		l.conn = nil
		l.closeDropped()
	}
	c.lanes = nil
}

// closeDropped closes the socket of a connection that the caller has dropped.
func (l *lane) closeDropped() {
	if l.link != nil && l.conn == nil {
		l.link.Close()
		l.link = nil
	}
}

// Endpoint returns the endpoint of the broker, or those of all.
func (c *Client) Endpoint() string { return strings.ReplaceAll(endpointsOf(c.brokers), " ", ", ") }

// connected tells whether the broker is there.
func (c *Client) connected() bool { return slices.ContainsFunc(c.lanes, (*lane).connected) }

func (l *lane) connected() bool { return l.link != nil && l.link.connected }

// inFlight returns the number of calls that are not pausing.
func (c *Client) inFlight() (n int) {
	for _, l := range c.lanes {
		n += len(l.waiting)
		if l.conn != nil {
			n += len(l.conn.inFlight)
		}
	}
	return n
}

// Send calls a service and returns its reply. A timeout of 0 is none. Without a reply the error is
// errNoBroker if no broker took the request, errLost if the connection broke before the reply,
// errTimeout if no reply came in time, errProtocol if something else came, and the cause of stop.
//
// A request that is given up is taken back unless it has begun.
func (c *Client) Send(service string, body [][]byte, timeout time.Duration) (Reply, error) {
	request := &call{service: service, body: body, timeout: timeout}
	if err := c.do(request, func() time.Time { return time.Time{} }); err != nil {
		return Reply{}, err
	}
	return request.reply, request.err
}

// do makes a single call and waits for its end. Each wait ends at the time that beforeWait returns,
// if not before. An error is the cause of stop or that of a socket; the call has not ended then.
func (c *Client) do(request *call, beforeWait func() time.Time) error {
	for c.Begin(request); !request.ended; {
		if _, err := c.Await(beforeWait()); err != nil && !request.ended {
			c.Abandon()
			return err
		}
	}
	return nil
}

// Begin begins a call.
func (c *Client) Begin(request *call) { c.freeLane().begin(request, time.Now()) }

// Await waits until something happens, or a time unless that is zero, and returns the calls that
// ended. An error is final: the cause of stop, or that of a socket.
func (c *Client) Await(until time.Time) ([]*call, error) {
	for _, l := range c.lanes {
		if len(l.ended) > 0 {
			until = time.Now() // They were cancelled since the last time.
		}
	}
	var err error
	if c.stop.Err() == nil {
		err = c.step(until)
	}
	if c.stop.Err() != nil {
		err = context.Cause(c.stop)
	}
	return c.takeEnded(), err
}

func (c *Client) takeEnded() (ended []*call) {
	for _, l := range c.lanes {
		ended = append(ended, l.takeEnded()...)
	}
	return ended
}

// Cancel asks the broker to drop a call. If it has not begun, it ends with errCancelled, and
// otherwise as if nothing had been asked.
func (c *Client) Cancel(request *call) {
	for _, l := range c.lanes {
		if l.has(request) {
			l.cancel(request, time.Now())
		}
	}
}

// Written tells that parts of a call were written, so that the broker may send more. Their memory is used
// again.
func (c *Client) Written(request *call, parts []Reply) {
	for _, l := range c.lanes {
		if l.has(request) {
			l.written(request, parts, time.Now())
			for _, part := range parts {
				l.link.reuse(part.Output)
			}
		}
	}
}

// interruptible returns a function that ends the client's waiting with an error, as the end of stop does.
func (c *Client) interruptible() (interrupt context.CancelCauseFunc) {
	c.stop, interrupt = context.WithCancelCause(c.stop)
	context.AfterFunc(c.stop, c.waiter.Wake)
	return interrupt
}

// Abandon gives up all calls and disconnects. It waits a moment for the broker to confirm that it
// dropped the calls that were in a queue. It returns those that ended meanwhile.
func (c *Client) Abandon() []*call {
	for _, l := range c.lanes {
		if l.link != nil {
			l.update()
		}
		l.abandon(time.Now())
	}
	connected := func(l *lane) bool { return l.conn != nil }
	for slices.ContainsFunc(c.lanes, connected) {
		if err := c.step(time.Time{}); err != nil {
			break
		}
	}
	ended := c.takeEnded()
	c.Disconnect()
	return ended
}

// step waits once and handles what happened.
func (c *Client) step(until time.Time) error {
	deadline := until
	sockets, due := c.seek()
	deadline = earlier(deadline, due)
	busy := false
	for _, l := range c.lanes {
		if l.needsConnection() && c.seeker == nil {
			if err := c.connectLane(l); err != nil && !c.connected() {
				return err
			} else if err != nil { // The calls on other lanes can go on.
				l.refuse(err, time.Now())
				deadline = time.Now()
			}
		}
		blocked := l.flush(time.Now())
		deadline = earlier(deadline, l.deadline())
		if l.link != nil {
			l.link.blocked, l.link.paused = blocked, l.full()
			sockets = append(sockets, l.link.socket)
			if l.link.broken && !l.link.paused {
				deadline = time.Now()
			}
		}
		busy = busy || l.busy()
	}
	if unreachable := c.reachDeadline(busy); !unreachable.IsZero() {
		deadline = earlier(deadline, unreachable)
	}
	if err := c.waiter.Wait(deadline, sockets...); err != nil {
		return err
	}

	now := time.Now()
	for _, l := range c.lanes {
		if err := l.handle(now, !deadline.IsZero() && !now.Before(deadline)); err != nil {
			return err
		}
		c.moveOn(l, now)
	}
	if err := c.sought(now); err != nil {
		return err
	}
	if unreachable := c.reachDeadline(busy); !unreachable.IsZero() && !now.Before(unreachable) {
		return fmt.Errorf("%w at %s within %v", errNoBroker, c.Endpoint(), c.reachLimit)
	}
	return nil
}

// reachDeadline returns when the client fails unless a broker is there before; zero for never.
func (c *Client) reachDeadline(busy bool) time.Time {
	switch {
	case c.reachLimit == 0, !busy, c.connected():
		c.unreachableSince = time.Time{}
		return time.Time{}
	case c.unreachableSince.IsZero():
		c.unreachableSince = time.Now()
	}
	return c.unreachableSince.Add(c.reachLimit)
}

// handle handles what the last wait found, and what is due.
func (l *lane) handle(now time.Time, expired bool) error {
	if l.link == nil {
		l.tick(now)
		return nil
	}
	if l.link.monitored || expired {
		if err := l.update(); err != nil {
			return err
		}
	}
	for l.conn != nil && !l.full() && (l.link.readable || l.link.broken) {
		frames, err := l.link.receive()
		if err != nil {
			return err
		}
		if frames == nil {
			break
		}
		l.receive(frames, now)
	}
	if l.link.broken && !l.full() {
		l.link.broken = false // ZeroMQ connects again.
		l.lost(now)
	}
	l.tick(now)
	l.closeDropped()
	return nil
}

// update tells the caller what the monitor knows of the connection.
func (l *lane) update() error {
	err := l.link.update()
	if l.link.connected {
		l.setConnected()
	}
	if l.several && l.link.retried && !l.link.broken && l.conn != nil && !l.conn.connected {
		l.recall() // Nothing has left the socket.
		l.leave()
	}
	if l.link.refused != nil {
		l.refuse(fmt.Errorf("%w: %s", l.link.refused, l.endpoint), time.Now())
	}
	return err
}
