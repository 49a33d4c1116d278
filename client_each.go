package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// eachFlags are the flags of a batch.
type eachFlags struct {
	Each      bool `short:"e" xor:"input"`
	Jobs      *int `short:"j"`
	Unordered bool
	FailFast  bool
	Joblog    string
	Resume    bool
}

const (
	defaultJobs  = 16
	maxBatchJobs = 10000

	// maxUnprinted limits the replies that wait for an earlier one to be printed, for each job, and
	// maxUnprintedSize the bytes of all of them.
	maxUnprinted     = 8
	maxUnprintedSize = 64 << 20

	// reachLimit is how long a batch waits for a broker without --timeout.
	reachLimit = 30 * time.Second

	// probeTimeout is how long a broker may take to tell whether it knows address stacks, and
	// probeRetries is how often it is asked if the connection breaks.
	probeTimeout = time.Second
	probeRetries = 3

	// maxLanes limits the connections to a broker that does not. Each takes some descriptors and three
	// of ZeroMQ's 1023 sockets, and those that were closed count for a while.
	maxLanes = 128
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
			return misuse("--each makes a request of each line", "%s needs --each", flag.name)
		}
	}
	switch {
	case f.Jobs != nil && (*f.Jobs < 1 || *f.Jobs > maxBatchJobs):
		return misuse("--jobs 16", "--jobs must be 1 to %d, not %d", maxBatchJobs, *f.Jobs)
	case f.Resume && f.Joblog == "":
		return misuse("FILE shows which lines are done", "--resume needs --joblog FILE")
	}
	return nil
}

// each makes a batch of standard input.
func (t *requestTool) each(brokers []brokerAddress) error {
	log, err := openJobLog(t.Joblog, t.Name, t.Resume)
	if err != nil {
		return err
	}
	defer log.file.Close()
	client, restore := t.client(brokers)
	defer restore()
	jobs := defaultJobs
	if t.Jobs != nil {
		jobs = *t.Jobs
	}
	// If the reader of standard output exits, do not die of SIGPIPE before the requests that have not
	// begun are taken back.
	signal.Ignore(syscall.SIGPIPE)
	// Collect garbage more often: memory must not grow with the number of lines.
	debug.SetGCPercent(25)

	stdin, total := readLines(client.stop, os.Stdin, t.separator()[0], client.waiter.Wake)
	status := newStatusLine(t.console("brequest"), time.Second/2)
	b := &batch{
		requestTool: t,
		console:     t.console("brequest"),
		client:      client,
		jobs:        jobs,
		stdin:       stdin,
		total:       total,
		stdout:      bufio.NewWriterSize(status.above(os.Stdout), 64<<10),
		status:      status,
		log:         log,
		begun:       map[*call]*item{},
		begin:       time.Now(),
	}
	defer status.hide()
	if err := b.probe(); err != nil {
		return err
	}
	return b.run()
}

// probe finds out whether the broker knows address stacks, so that one connection is enough for all
// requests in flight. Its list of services tells that it is one of ours, and each broker survives being
// asked for it: some die of an address stack.
func (b *batch) probe() error {
	if b.timeout() == 0 { // Otherwise each request has its own.
		b.client.reachLimit = reachLimit
	}
	var request *call
	for range probeRetries {
		request = &call{service: mmiServices, body: emptyBody, timeout: b.timeout(), retries: b.Retries}
		if err := b.await(request); err != nil {
			return err
		}
		if !errors.Is(request.err, errLost) {
			break
		}
	}
	if errors.Is(request.err, errNoBroker) {
		return request.err
	}
	if output := request.reply.Output; len(output) == 1 && bytes.HasPrefix(output[0], []byte(servicesHeader)) {
		b.client.Correlate()
		return nil
	}
	b.client.Disconnect()
	b.jobs = min(b.jobs, maxLanes)
	return nil
}

// await waits for the end of a request, but not for long once the broker is there.
func (b *batch) await(request *call) error {
	b.client.Begin(request)
	var until time.Time // zero before the broker is there
	for !request.ended && (until.IsZero() || time.Now().Before(until)) {
		if _, err := b.client.Await(until); err != nil {
			return err
		}
		if until.IsZero() && b.client.connected() {
			until = time.Now().Add(probeTimeout)
		}
	}
	return nil
}

// A batch makes a request of each line of input.
type batch struct {
	*requestTool
	console
	client *Client
	jobs   int              // at a time
	stdin  <-chan inputLine // nil when no more is to be read
	total  *atomic.Int64    // the number of lines, once the input has ended
	stdout *bufio.Writer
	status *statusLine
	log    *jobLog

	begun         map[*call]*item // not ended
	unprinted     []*item         // in the order of the input; none with --unordered
	unprintedSize size            // of their replies

	begin        time.Time
	read         int // lines
	skipped      int // of them, because they were done before
	done, failed int // requests that ended, and those of them that failed
	lastError    error
	stopping     bool  // after one that failed
	readError    error // why the rest of stdin cannot be read
}

// An item is a line of input and its request.
type item struct {
	number int
	line   []byte
	begin  time.Time
	ended  bool          // it is its turn to be printed, once those before have been
	call   *call         // nil if there is nothing to print
	took   time.Duration // from begin to the end of the call
}

func (b *batch) run() error {
	for {
		b.beginItems()
		if b.stdin == nil && len(b.begun) == 0 {
			break
		}
		if err := b.flush(); err != nil {
			b.abandon()
			return err
		}
		ended, err := b.client.Await(b.showProgress())
		for _, c := range ended {
			b.end(c)
		}
		if err != nil {
			b.abandon()
			b.flush()
			b.status.hide()
			b.infof("%s: %s, %d given up", b.Name, b.summary(), b.read-b.skipped-b.done)
			return err
		}
	}
	b.client.Abandon() // Only cancels are left that the broker has not confirmed.
	if err := b.flush(); err != nil {
		return err
	}
	switch {
	case b.readError != nil:
		return inputFailure(b.readError)
	case b.failed > 0:
		f := &failure{status: exitSome, err: fmt.Errorf("%s: %s", b.Name, b.summary())}
		if b.lastError != nil {
			f.hint = failureOf(b.explain(b.client, b.lastError)).hint
		}
		return f
	}
	return nil
}

// beginItems begins a request for each line that was read, as long as there is room for it.
func (b *batch) beginItems() {
	for len(b.begun) < b.jobs && len(b.unprinted) < maxUnprinted*b.jobs && b.unprintedSize < maxUnprintedSize {
		select {
		case line, more := <-b.stdin:
			if !more || line.err != nil {
				b.stdin, b.readError = nil, line.err
				return
			}
			b.read++
			if b.log.skip(line.text) {
				b.skipped++
				continue
			}
			it := &item{number: b.read, line: line.text, begin: time.Now()}
			if !b.Unordered {
				b.unprinted = append(b.unprinted, it)
			}
			request := &call{service: b.Name, body: framesOf(b.Args.with(string(it.line))), timeout: b.timeout(), retries: b.Retries, patient: true}
			b.begun[request] = it
			b.client.Begin(request)
		default:
			return
		}
	}
}

// end takes a call that ended, and prints what is next in the order of the input.
func (b *batch) end(c *call) {
	it := b.begun[c]
	delete(b.begun, c)
	it.ended = true
	if !errors.Is(c.err, errCancelled) {
		b.finish(it, c)
	}
	for len(b.unprinted) > 0 && b.unprinted[0].ended {
		b.printItem(b.unprinted[0])
		b.unprinted = b.unprinted[1:]
	}
}

// finish counts and logs a request that ended, and reports its failure.
func (b *batch) finish(it *item, c *call) {
	it.call, it.took = c, time.Since(it.begin)
	b.unprintedSize += sizeOf(c.reply.Output)
	b.done++
	b.debugf("%s: status %d after %v", it.subject(), c.status(), it.took.Round(time.Millisecond))
	b.complain(it, c)
	if b.Unordered {
		b.printItem(it)
	}
	if c.status() != 0 {
		b.failed++
		if c.err != nil {
			b.lastError = c.err
		}
		if b.FailFast && !b.stopping {
			b.stop()
		}
	}
}

// stop reads no more input, and cancels what has not begun. What already runs may end.
func (b *batch) stop() {
	b.stopping, b.stdin = true, nil
	for c := range b.begun {
		b.client.Cancel(c)
	}
}

// abandon gives up what has not ended, and prints what waited for its turn.
func (b *batch) abandon() {
	for _, c := range b.client.Abandon() {
		b.end(c)
	}
	for _, it := range b.unprinted {
		b.printItem(it)
	}
}

// printItem prints and logs a reply, with a separator at its end, or several frames as a single
// request does.
func (b *batch) printItem(it *item) {
	if it.call == nil {
		return
	}
	output := it.call.reply.Output
	for _, frame := range output {
		b.stdout.Write(frame)
		complete := bytes.HasSuffix(frame, []byte("\n")) || len(frame) == 0
		if b.Null || !complete || len(output) > 1 {
			b.stdout.Write(b.separator())
		}
	}
	b.log.add(it)
	b.unprintedSize -= sizeOf(output)
	it.call = nil
}

// flush writes what was printed, and then the log of what is thus done.
func (b *batch) flush() error {
	if err := b.stdout.Flush(); err != nil {
		return outputFailure(err)
	}
	return outputFailure(b.log.flush())
}

// complain prints the standard error of a service and the failure of a request, with its line.
func (b *batch) complain(it *item, c *call) {
	status, stderr := c.status(), c.reply.Stderr
	if status == 0 && len(stderr) == 0 {
		return
	}
	b.status.hide()
	subject := it.subject()
	switch {
	case c.err != nil:
		b.errorf("%s: %v", subject, c.err)
	case len(stderr) == 0:
		b.errorf("%s: exit status %d", subject, status)
	}
	var said strings.Builder
	for line := range bytes.Lines(stderr) {
		fmt.Fprintf(&said, "%s: %s\n", subject, bytes.TrimSuffix(line, []byte("\n")))
	}
	os.Stderr.WriteString(said.String())
	if b.FailFast && status != 0 && !b.stopping {
		b.errorf("%s: exit status %d is the first failure; no more requests are begun", subject, status)
	}
}

// subject returns as much of the line as fits into a message.
func (it *item) subject() string {
	const length = 60
	text := printable(string(it.line))
	if len(text) > length {
		text = strings.ToValidUTF8(text[:length], "") + "..."
	}
	return text
}

// showProgress shows the status line while requests are in flight, and returns when it is due again.
// While there is nothing to do, the terminal may belong to whoever writes standard input.
func (b *batch) showProgress() (due time.Time) {
	if len(b.begun) == 0 {
		b.status.hide()
		return due
	}
	return b.status.show(time.Second/5, b.progress)
}

// progress returns the text of the status line.
func (b *batch) progress() string {
	elapsed := time.Since(b.begin)
	rate := float64(b.done) / elapsed.Seconds()
	text := fmt.Sprintf("brequest: %s, %d in flight, %.0f/s", b.summary(), b.client.inFlight(), rate)
	if left := int(b.total.Load()) - b.skipped - b.done; left > 0 && rate > 0 {
		seconds := time.Duration(float64(left) / rate * float64(time.Second))
		text += fmt.Sprintf(", %v left", seconds.Round(time.Second))
	}
	return text
}

func (b *batch) summary() string {
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

// An inputLine is a line of standard input, or the reason why it cannot be read.
type inputLine struct {
	text []byte
	err  error
}

// readLines reads somewhat ahead, and calls wake for each line and at the end. Only when the input has
// ended, total is the number of lines.
func readLines(stop context.Context, file io.Reader, terminator byte, wake func()) (lines chan inputLine, total *atomic.Int64) {
	lines, total = make(chan inputLine, 64), new(atomic.Int64)
	go func() {
		defer wake()
		defer close(lines)
		reader := bufio.NewReaderSize(file, 64<<10)
		for count := int64(0); ; {
			text, err := reader.ReadBytes(terminator)
			line := inputLine{text: bytes.TrimSuffix(text, []byte{terminator})}
			if err == io.EOF {
				if len(text) == 0 {
					total.Store(count)
					return
				}
			} else if err != nil {
				line = inputLine{err: err}
			}
			select {
			case lines <- line:
				count++
				wake()
			case <-stop.Done():
				return
			}
			if line.err != nil {
				return
			}
		}
	}()
	return lines, total
}
