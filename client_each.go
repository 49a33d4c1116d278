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
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
)

// eachFlags are those of a batch.
type eachFlags struct {
	Each      bool `short:"e" xor:"input"`
	Jobs      *int `short:"j"`
	Unordered bool
	FailFast  bool
	Joblog    string
	Resume    bool
}

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
