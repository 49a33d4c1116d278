package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	zmq "github.com/pebbe/zmq4"
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

// eachFlags are those of a batch.
type eachFlags struct {
	Each      bool `short:"e" xor:"input"`
	Jobs      *int `short:"j"`
	Unordered bool
	FailFast  bool
	Joblog    string
	Resume    bool
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

func framesOf(texts []string) [][]byte {
	var frames [][]byte
	for _, text := range texts {
		frames = append(frames, []byte(text))
	}
	return frames
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

// outputFailure is that of standard output. A reader that has seen enough is none to
// speak of: we end as other tools do.
func outputFailure(err error) *failure {
	if errors.Is(err, syscall.EPIPE) {
		return signalled(syscall.SIGPIPE)
	}
	return &failure{status: exitIO, err: err}
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

// readAll is io.ReadAll for input that may take most of the memory.
func readAll(file *os.File) ([]byte, error) {
	var all chunks
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() {
		all.list = [][]byte{make([]byte, 0, info.Size()+1)} // it ends in there
	}
	for {
		n, err := file.Read(all.room(4 << 10))
		all.take(n)
		if err == io.EOF {
			return all.Bytes(), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// From here on: a request for each line.

const (
	defaultJobs = 16
	maxFlying   = 10000

	// window is how many requests, for each in flight, may wait with their reply for one
	// that is to be printed before them.
	window = 8
)

func (f *eachFlags) check() error {
	for _, flag := range []struct {
		name  string
		given bool
	}{
		{"--jobs", f.Jobs != nil}, {"--unordered", f.Unordered}, {"--fail-fast", f.FailFast},
		{"--joblog", f.Joblog != ""}, {"--resume", f.Resume},
	} {
		if flag.given && !f.Each {
			return misuse("--each makes a request of each line", "%s without --each", flag.name)
		}
	}
	switch {
	case f.Jobs != nil && (*f.Jobs < 1 || *f.Jobs > maxFlying):
		return misuse(fmt.Sprintf("1 to %d", maxFlying), "--jobs %d", *f.Jobs)
	case f.Resume && f.Joblog == "":
		return misuse("it tells what need not be done again", "--resume without --joblog FILE")
	}
	return nil
}

// each makes a batch of standard input.
func (t *requestTool) each(endpoint string) error {
	log, err := openJoblog(t.Joblog, t.Resume)
	if err != nil {
		return err
	}
	defer log.close()
	client, restore := t.client(endpoint)
	defer restore()
	jobs := defaultJobs
	if t.Jobs != nil {
		jobs = *t.Jobs
	}
	client.plain = jobs == 1
	// A reader that goes away must not end us before we took back what is for nobody.
	signal.Ignore(syscall.SIGPIPE)
	// Each request leaves some garbage; more of them are not to take more memory.
	debug.SetGCPercent(25)

	stdin, total := readLines(client.stop, os.Stdin, t.separator()[0], client.bell.Ring)
	status := newStatusLine(t.voice("brequest"), time.Second/2)
	b := &batch{
		requestTool: t,
		voice:       t.voice("brequest"),
		client:      client,
		jobs:        jobs,
		stdin:       stdin,
		total:       total,
		stdout:      bufio.NewWriterSize(status.above(os.Stdout), 64<<10),
		status:      status,
		log:         log,
		flying:      map[*call]*job{},
		begin:       time.Now(),
	}
	defer status.hide()
	return b.run()
}

// A batch is a request for each line of input.
type batch struct {
	*requestTool
	voice
	client *Client
	jobs   int           // at a time
	stdin  <-chan line   // nil once no more is to be read
	total  *atomic.Int64 // lines of it, once it has ended
	stdout *bufio.Writer
	status *statusLine
	log    *joblog

	flying  map[*call]*job
	pausing []*job // until their next try
	held    []*job // in the order of the input, to be printed; none with --unordered

	begin        time.Time
	read         int // lines
	skipped      int // of them, since they were done before
	done, failed int // requests that ended, and those of them that failed
	lastFailure  answer
	stopping     bool  // after one that failed
	unreadable   error // why the rest of stdin cannot be read
}

// A job is a line of input on its way to being done.
type job struct {
	number int
	line   []byte
	begin  time.Time
	tries  int
	due    time.Time // of the next try
	over   bool      // it is to be printed, or there is nothing to print
	output [][]byte
}

func (b *batch) run() error {
	for {
		b.retry()
		b.take()
		if b.stdin == nil && len(b.flying)+len(b.pausing) == 0 {
			break
		}
		if err := b.flush(); err != nil {
			b.abandon()
			return err
		}
		ended, err := b.client.Await(earlier(b.nextTry(), b.status.show(time.Second/5, b.progress)))
		for _, r := range ended {
			b.end(r)
		}
		if b.client.stop.Err() != nil {
			b.abandon()
			b.flush()
			b.status.hide()
			b.note("%s: %s, %d given up", b.Name, b.tally(), b.read-b.skipped-b.done)
			return context.Cause(b.client.stop)
		}
		if err != nil {
			return err
		}
	}
	b.client.Abandon() // nothing but what was not answered about those given up
	if err := b.flush(); err != nil {
		return err
	}
	switch {
	case b.unreadable != nil:
		return &failure{status: exitIO, err: b.unreadable}
	case b.failed > 0:
		f := &failure{status: exitSome, err: fmt.Errorf("%s: %s", b.Name, b.tally())}
		if b.lastFailure.err != nil {
			f.hint = b.explain(b.client, b.lastFailure).hint
		}
		return f
	}
	return nil
}

// take begins a request for each line that has come, as long as there is room for it.
func (b *batch) take() {
	for len(b.flying)+len(b.pausing) < b.jobs && len(b.held) < window*b.jobs {
		select {
		case l, more := <-b.stdin:
			if !more || l.err != nil {
				b.stdin, b.unreadable = nil, l.err
				return
			}
			b.read++
			if b.log.skip(l.text) {
				b.skipped++
				continue
			}
			j := &job{number: b.read, line: l.text, begin: time.Now()}
			if !b.Unordered {
				b.held = append(b.held, j)
			}
			b.submit(j)
		default:
			return
		}
	}
}

// submit sends the request, for the first time or again.
func (b *batch) submit(j *job) {
	j.tries++
	r := &call{service: b.Name, body: framesOf(b.Args.with(string(j.line))), timeout: time.Duration(b.Timeout)}
	b.flying[r] = j
	b.client.Begin(r)
}

// end is the end of a try, and of the job unless another one follows.
func (b *batch) end(r *call) {
	j := b.flying[r]
	delete(b.flying, r)
	switch a := answerOf(r.reply, r.err); {
	case errors.Is(r.err, errCancelled):
		j.over = true
	case a.temporary() && j.tries <= b.Retries && !b.stopping:
		j.due = time.Now().Add(pauseAfter(j.tries))
		b.pausing = append(b.pausing, j)
	default:
		b.finish(j, a)
	}
	for len(b.held) > 0 && b.held[0].over {
		b.print(b.held[0])
		b.held = b.held[1:]
	}
}

func (b *batch) finish(j *job, a answer) {
	j.over, j.output = true, a.output
	b.done++
	b.log.add(j, a)
	b.detail("%s: status %d after %v", j.subject(), a.status, time.Since(j.begin).Round(time.Millisecond))
	b.complain(j, a)
	if b.Unordered {
		b.print(j)
	}
	if a.status != 0 {
		b.failed++
		b.lastFailure = a
		if b.FailFast && !b.stopping {
			b.halt()
		}
	}
}

// halt takes no more input, and cancels what waits. What runs already may end.
func (b *batch) halt() {
	b.stopping, b.stdin = true, nil
	for _, j := range b.pausing {
		j.over = true
	}
	b.pausing = nil
	for r := range b.flying {
		b.client.Cancel(r)
	}
}

// abandon gives up what has not ended, and prints what waits for its turn.
func (b *batch) abandon() {
	for _, r := range b.client.Abandon() {
		b.end(r)
	}
	for _, j := range b.held {
		b.print(j)
	}
}

// retry sends again what has had its pause.
func (b *batch) retry() {
	now := time.Now()
	b.pausing = slices.DeleteFunc(b.pausing, func(j *job) bool {
		if now.Before(j.due) {
			return false
		}
		b.submit(j)
		return true
	})
}

func (b *batch) nextTry() (due time.Time) {
	for _, j := range b.pausing {
		due = earlier(due, j.due)
	}
	return due
}

// print prints a reply with an end, and several frames as a single request does.
func (b *batch) print(j *job) {
	for _, frame := range j.output {
		b.stdout.Write(frame)
		ended := bytes.HasSuffix(frame, []byte("\n")) || len(frame) == 0
		if b.Null || !ended || len(j.output) > 1 {
			b.stdout.Write(b.separator())
		}
	}
	j.output = nil
}

// flush writes out what has been printed, and then what is thus done.
func (b *batch) flush() error {
	if err := b.stdout.Flush(); err != nil {
		return outputFailure(err)
	}
	if err := b.log.flush(); err != nil {
		return &failure{status: exitIO, err: err}
	}
	return nil
}

// complain tells the person what a service says on standard error, and of a failure.
func (b *batch) complain(j *job, a answer) {
	if a.status != 0 || len(a.stderr) > 0 {
		b.status.hide()
	}
	subject := j.subject()
	switch {
	case a.err != nil:
		b.say("%s: %v", subject, a.err)
	case a.status != 0 && len(a.stderr) == 0:
		b.say("%s: exit status %d", subject, a.status)
	}
	var said strings.Builder
	for line := range bytes.Lines(a.stderr) {
		fmt.Fprintf(&said, "%s: %s\n", subject, bytes.TrimSuffix(line, []byte("\n")))
	}
	os.Stderr.WriteString(said.String())
	if b.FailFast && a.status != 0 && !b.stopping {
		b.say("%s: exit status %d is the first that failed; beginning no more", subject, a.status)
	}
}

// subject is the line of a job as far as a message can have it.
func (j *job) subject() string {
	const length = 60
	text := printable(string(j.line))
	if len(text) > length {
		text = strings.ToValidUTF8(text[:length], "") + "..."
	}
	return text
}

// progress is what a status line tells.
func (b *batch) progress() string {
	elapsed := time.Since(b.begin)
	rate := float64(b.done) / elapsed.Seconds()
	text := fmt.Sprintf("brequest: %s, %d in flight, %.0f/s", b.tally(), len(b.flying), rate)
	if left := int(b.total.Load()) - b.skipped - b.done; left > 0 && rate > 0 {
		seconds := time.Duration(float64(left) / rate * float64(time.Second))
		text += fmt.Sprintf(", %v left", seconds.Round(time.Second))
	}
	return text
}

func (b *batch) tally() string {
	text := strconv.Itoa(b.done)
	if total := int(b.total.Load()); total > 0 {
		text += fmt.Sprintf(" of %d", total-b.skipped)
	}
	text += " done"
	if b.failed > 0 {
		text += fmt.Sprintf(", %d failed", b.failed)
	}
	return text
}

// A line of standard input, or the reason why there is none.
type line struct {
	text []byte
	err  error
}

// readLines reads somewhat ahead, and rings for each line and for the end. Then total is
// how many there were.
func readLines(stop context.Context, file io.Reader, end byte, ring func()) (lines chan line, total *atomic.Int64) {
	lines, total = make(chan line, 64), new(atomic.Int64)
	go func() {
		count := int64(0)
		defer ring()
		defer close(lines)
		defer func() { total.Store(count) }()
		reader := bufio.NewReaderSize(file, 64<<10)
		for {
			text, err := reader.ReadBytes(end)
			if err == io.EOF && len(text) == 0 {
				return
			}
			l := line{text: bytes.TrimSuffix(text, []byte{end})}
			if err != nil && err != io.EOF {
				l = line{err: err}
			}
			select {
			case lines <- l:
				count++
				ring()
			case <-stop.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return lines, total
}

// A joblog is a file with a line for each request that ended: what ended with status 0
// need not be done again. A nil one logs nothing.
type joblog struct {
	file *os.File
	*bufio.Writer
	done map[string]int // lines to skip, and how often they were done
}

const joblogHeader = "number\tstart\tseconds\tstatus\tbytes\tinput\n"

// joblogEscaper keeps a line of input on one line, and in one field.
var joblogEscaper = strings.NewReplacer("\\", "\\\\", "\t", "\\t", "\n", "\\n")

// openJoblog begins a new log, or goes on with the one that is there. A file that is no
// log is left alone.
func openJoblog(path string, resume bool) (*joblog, error) {
	if path == "" {
		return nil, nil
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, misuse("a file that can be written", "--joblog: %w", err)
	}
	l := &joblog{file: file, Writer: bufio.NewWriter(file), done: map[string]int{}}
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		l.WriteString(joblogHeader)
		return l, err
	}
	length, err := l.load(resume)
	if err != nil {
		return nil, fmt.Errorf("--joblog: %w", err)
	}
	if length == 0 {
		l.WriteString(joblogHeader)
	}
	_, err = file.Seek(length, io.SeekStart)
	return l, errors.Join(file.Truncate(length), err)
}

// load reads what is done, and returns the length of what is to be kept. A line that was
// cut off in the midst is not.
func (l *joblog) load(resume bool) (length int64, err error) {
	r := bufio.NewReader(l.file)
	header, err := r.ReadString('\n')
	switch {
	case err == io.EOF && strings.HasPrefix(joblogHeader, header):
		return 0, nil
	case err != nil && err != io.EOF:
		return 0, err
	case header != joblogHeader:
		return 0, misuse("another FILE", "%s is there and no job log", l.file.Name())
	case !resume:
		return 0, nil
	}
	length = int64(len(header))
	for {
		text, err := r.ReadString('\n')
		if err == io.EOF {
			return length, nil
		}
		if err != nil {
			return 0, err
		}
		length += int64(len(text))
		fields := strings.SplitN(strings.TrimSuffix(text, "\n"), "\t", 6)
		if len(fields) == 6 && fields[3] == "0" {
			l.done[fields[5]]++
		}
	}
}

// skip tells whether a line need not be done again, for each time that it was done.
func (l *joblog) skip(line []byte) bool {
	if l == nil || len(l.done) == 0 {
		return false
	}
	input := joblogEscaper.Replace(string(line))
	if l.done[input] == 0 {
		return false
	}
	l.done[input]--
	return true
}

func (l *joblog) add(j *job, a answer) {
	if l == nil {
		return
	}
	fmt.Fprintf(l, "%d\t%.3f\t%.3f\t%d\t%d\t%s\n", j.number, float64(j.begin.UnixMicro())/1e6,
		time.Since(j.begin).Seconds(), a.status, sizeOf(a.output), joblogEscaper.Replace(string(j.line)))
}

func (l *joblog) close() {
	if l != nil {
		l.file.Close()
	}
}

func (l *joblog) flush() error {
	if l == nil {
		return nil
	}
	return l.Writer.Flush()
}

// From here on: what a person at a terminal sees meanwhile.

// A statusLine tells a person at a terminal what goes on, and vanishes.
type statusLine struct {
	watched bool
	shown   bool
	due     time.Time // when to show what is new
}

func newStatusLine(v voice, after time.Duration) *statusLine {
	watched := !v.quiet && !v.verbose && isatty.IsTerminal(os.Stderr.Fd()) && os.Getenv("TERM") != "dumb"
	return &statusLine{watched: watched, due: time.Now().Add(after)}
}

// show shows a text where that is due, and returns when it will be due again: never, as
// a zero time, where nobody watches.
func (s *statusLine) show(every time.Duration, text func() string) (due time.Time) {
	if !s.watched {
		return due
	}
	if now := time.Now(); !now.Before(s.due) {
		// What does not fit is cut off by the terminal, else it could not be erased.
		fmt.Fprintf(os.Stderr, "\r\x1b[?7l%s\x1b[K\x1b[?7h", text())
		s.shown, s.due = true, now.Add(every)
	}
	return s.due
}

// hide makes room for something else.
func (s *statusLine) hide() {
	if s.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
		s.shown, s.due = false, time.Time{}
	}
}

// above is for what is printed while a line is shown.
func (s *statusLine) above(file *os.File) io.Writer {
	if s.watched && isatty.IsTerminal(file.Fd()) {
		return &printedAbove{file, s}
	}
	return file
}

type printedAbove struct {
	io.Writer
	line *statusLine
}

func (p *printedAbove) Write(data []byte) (int, error) {
	p.line.hide()
	return p.Writer.Write(data)
}

// From here on: the way to the broker and back.

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
