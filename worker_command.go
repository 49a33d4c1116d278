package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// commandRules are how a command is run, and what becomes of what it prints.
type commandRules struct {
	Stdin     bool      // the last frame of a request is its standard input
	Timeout   *duration // nil or 0 for none
	KillAfter duration  `default:"2s"`
	MaxOutput size      `default:"64M"`
	Stderr    string    `enum:"log,reply,merge" default:"log"`
	Cwd       string
	Env       []string `sep:"none"`
}

func (r *commandRules) Validate() error {
	for _, variable := range r.Env {
		if strings.Index(variable, "=") < 1 {
			return fmt.Errorf("--env %s: expected NAME=VALUE", variable)
		}
	}
	if r.Cwd == "" {
		return nil
	}
	info, err := os.Stat(r.Cwd)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is no directory", r.Cwd)
	}
	if err != nil {
		return fmt.Errorf("--cwd: %w", err)
	}
	return nil
}

// CmdService answers requests by running a command for each, as many at a time as ask.
type CmdService struct {
	Name     string
	Endpoint string
	Command  []string        // with {} where the request's frames go, else at the end
	Now      context.Context // when done, commands that run are ended
	commandRules
}

// find looks for the command, for a service that cannot serve to be known before its
// first request.
func (c *CmdService) find() error {
	path := c.Command[0]
	if c.Cwd != "" && strings.Contains(path, "/") && !filepath.IsAbs(path) {
		path = c.Cwd + "/" + path
	}
	_, err := exec.LookPath(path)
	if err == nil {
		return nil
	}
	f := cannotRun(err)
	if f.status == exitNotFound {
		f.hint = "COMMAND is a program in $PATH, or its path"
	}
	return f
}

// Handle runs the command with the frames of the body as arguments. Its reply is what
// the command printed, or a status reply when it failed or could not be run.
func (c *CmdService) Handle(token string, body [][]byte) [][]byte {
	var stdin []byte
	if last := len(body) - 1; c.Stdin && last >= 0 {
		body, stdin = body[:last], body[last]
	}
	argv, err := c.argv(body)
	if err != nil {
		return c.refuse(cannotRun(err))
	}
	p := c.prepare(argv, "BACKBONE_REQUEST="+token)
	defer p.end(nil)
	if len(stdin) > 0 {
		p.Stdin = bytes.NewReader(stdin)
	}
	c.direct(p, newBounded(c.MaxOutput, p.end))
	if err := c.start(p); err != nil {
		return c.refuse(cannotRun(err))
	}
	defer c.limit(p)()
	status, why := c.finish(p)
	if status == 0 && c.Stderr != "reply" {
		return [][]byte{p.stdout.Bytes()}
	}
	return c.report(p, status, why)
}

// argv is the command with the frames of a request in their place.
func (c *CmdService) argv(body [][]byte) ([]string, error) {
	frames := make([]string, len(body))
	for i, frame := range body {
		if bytes.IndexByte(frame, 0) >= 0 {
			return nil, fmt.Errorf("frame %d holds a NUL byte, which no argument can", i+1)
		}
		frames[i] = string(frame)
	}
	return slices.Concat(c.Command[:1], operands(c.Command[1:]).with(frames...)), nil
}

// cannotRun is the failure of a command that did not even start.
func cannotRun(err error) *failure {
	status := exitCannotRun
	if lookup := (*exec.Error)(nil); errors.As(err, &lookup) {
		err = fmt.Errorf("%s: %w", lookup.Name, lookup.Err)
	}
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		status = exitNotFound
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM),
		errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		status = exitTemporary
	}
	return &failure{status: status, err: err}
}

// refuse is the status reply to a request that no command did.
func (c *CmdService) refuse(f *failure) [][]byte {
	return statusReply(nil, c.complaint(f), f.status)
}

// report is the status reply of a command that ran, with why it was ended if it was.
func (c *CmdService) report(p *process, status int, why error) [][]byte {
	stderr := p.stderr.Bytes()
	if why != nil {
		if len(stderr) > 0 && !bytes.HasSuffix(stderr, []byte("\n")) {
			stderr = append(stderr, '\n')
		}
		stderr = append(stderr, c.complaint(why)...)
	}
	return statusReply(p.stdout.Bytes(), stderr, status)
}

// complaint is what bservice itself says to the client.
func (c *CmdService) complaint(why error) []byte {
	return fmt.Appendf(nil, "bservice: %s: %v\n", c.Name, why)
}

// A process is a command that runs, at the head of a process group of its own: Ctrl-C
// at our terminal does not reach it, and what it starts can be ended with it.
type process struct {
	*exec.Cmd
	stdout, stderr sink
	due            context.Context         // done when it must end
	end            context.CancelCauseFunc // makes it so, for a reason or when all is over
	ended          chan struct{}           // closed when it has ended, its output read
}

// A sink takes what a process prints, and has what is of interest afterwards.
type sink interface {
	io.Writer
	Bytes() []byte
}

func (c *CmdService) prepare(argv []string, env ...string) *process {
	p := &process{Cmd: exec.Command(argv[0], argv[1:]...), ended: make(chan struct{})}
	p.due, p.end = context.WithCancelCause(c.Now)
	p.Dir = c.Cwd
	p.Env = slices.Concat(os.Environ(), c.Env,
		[]string{"BACKBONE_SERVICE=" + c.Name, "BACKBONE_ENDPOINT=" + c.Endpoint}, env)
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// What it leaves running may keep its output open, but not hold back the reply.
	p.WaitDelay = time.Duration(c.KillAfter)
	return p
}

// direct tells where what the process prints goes.
func (c *CmdService) direct(p *process, stdout sink) {
	p.stdout, p.stderr = stdout, &tail{log: os.Stderr}
	if c.Stderr == "reply" {
		p.stderr = newBounded(c.MaxOutput, p.end)
	}
	p.Stdout, p.Stderr = p.stdout, p.stderr
	if c.Stderr == "merge" {
		p.Stderr = p.stdout
	}
}

func (c *CmdService) start(p *process) error {
	err := p.Start()
	if err != nil && c.Cwd != "" {
		err = fmt.Errorf("%w, in %s", err, c.Cwd)
	}
	if err != nil {
		return err
	}
	go func() {
		p.Wait()
		close(p.ended)
	}()
	return nil
}

// limit makes the process end at the end of a request's time, unless stop is called
// before.
func (c *CmdService) limit(p *process) (stop func()) {
	if c.Timeout == nil || *c.Timeout == 0 {
		return func() {}
	}
	timeout := time.Duration(*c.Timeout)
	timer := time.AfterFunc(timeout, func() {
		p.end(&failure{status: exitTimeout, err: fmt.Errorf("ended after --timeout %v", timeout)})
	})
	return func() { timer.Stop() }
}

// ladder is how a process that must end is ended: a signal to its process group, and
// for how long to wait for what comes of it.
func (c *CmdService) ladder() []rung {
	return []rung{
		{syscall.SIGTERM, time.Duration(c.KillAfter)},
		{syscall.SIGKILL, 0},
	}
}

type rung struct {
	signal   syscall.Signal
	patience time.Duration
}

// finish waits for the process to end, and ends it when that is due. It returns the
// exit status to tell, and why the process was ended if it was.
func (c *CmdService) finish(p *process) (status int, why error) {
	select {
	case <-p.ended:
	case <-p.due.Done():
		// Each rung is climbed: what is left of the group may have no output to tell of it.
		for _, rung := range c.ladder() {
			syscall.Kill(-p.Process.Pid, rung.signal)
			select {
			case <-p.ended:
			case <-time.After(rung.patience):
			}
		}
		<-p.ended
	}
	status = exitStatus(p.ProcessState)
	var f *failure
	switch cause := context.Cause(p.due); {
	case cause == nil, c.Now.Err() != nil && status == 0:
	case c.Now.Err() != nil:
		why = errors.New("ended, since the service stops")
	case errors.As(cause, &f):
		status, why = f.status, f
	}
	return status, why
}

// exitStatus is the status of an ended command as a shell has it.
func exitStatus(state *os.ProcessState) int {
	if status := state.Sys().(syscall.WaitStatus); status.Signaled() {
		return exitSignal + int(status.Signal())
	}
	return state.ExitCode()
}

// A bounded sink takes so many bytes, and ends the process that prints more.
type bounded struct {
	chunks
	left int
	max  int
	end  context.CancelCauseFunc
}

func newBounded(max size, end context.CancelCauseFunc) *bounded {
	return &bounded{left: int(max), max: int(max), end: end}
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.chunks.Write(p[:n])
	if n < len(p) {
		err := tooLong(b.max)
		b.end(err)
		return n, err
	}
	return n, nil
}

func tooLong(max int) *failure {
	return &failure{status: exitIO, err: fmt.Errorf("ended, since it printed more than --max-output %d bytes", max)}
}

// A tail passes everything on to a log and keeps the end of it.
type tail struct {
	log io.Writer
	end []byte // tailLength bytes at least, where there were so many
}

const tailLength = 64 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.log.Write(p) // which may be gone; the command need not know
	t.end = append(t.end, p...)
	if n := len(t.end) - tailLength; n > tailLength {
		t.end = append(t.end[:0], t.end[n:]...)
	}
	return len(p), nil
}

func (t *tail) Bytes() []byte { return t.end }

// A coprocess answers requests, one at a time, by a command that goes on running: each
// request is a line for it to read, and each line that it prints is a reply.
type coprocess struct {
	*CmdService
	voice
	terminator byte // of lines: a newline or NUL

	running  *process // nil before the first, and after one was buried
	stdin    io.WriteCloser
	output   *lines
	answered bool // a request, and more perhaps
	pauses   pauses
}

// Handle gives the process a line and waits for one.
func (c *coprocess) Handle(token string, body [][]byte) [][]byte {
	line, err := c.line(body)
	if err != nil {
		return c.refuse(cannotRun(err))
	}
	if err := c.revive(); err != nil {
		return c.refuse(err)
	}
	defer c.limit(c.running)()
	// It may print while it reads: a long line would not fit into the pipe between us.
	go func(stdin io.Writer) { stdin.Write(line) }(c.stdin)
	select {
	case reply := <-c.output.whole:
		return c.accept(reply)
	case <-c.running.due.Done():
	case <-c.running.ended:
		select {
		case reply := <-c.output.whole: // its last words
			return c.accept(reply)
		default:
		}
	}
	return c.bury()
}

func (c *coprocess) accept(reply []byte) [][]byte {
	c.answered, c.pauses = true, pauses{}
	return [][]byte{reply}
}

// line is a request as the process reads it.
func (c *coprocess) line(body [][]byte) ([]byte, error) {
	for i, frame := range body {
		switch {
		case bytes.IndexByte(frame, c.terminator) >= 0:
			return nil, fmt.Errorf("frame %d holds a %s, which ends a request", i+1, map[byte]string{0: "NUL byte", '\n': "newline"}[c.terminator])
		case bytes.IndexByte(frame, '\t') >= 0:
			return nil, fmt.Errorf("frame %d holds a tab, which separates arguments", i+1)
		}
	}
	return append(bytes.Join(body, []byte{'\t'}), c.terminator), nil
}

// open starts the process ahead of the first request, which then need not wait for it.
func (c *coprocess) open() {
	if err := c.revive(); err != nil {
		c.say("%s: %v", c.Name, err)
	}
}

// revive sees to it that there is a process to ask, a fresh one where need be.
func (c *coprocess) revive() *failure {
	if p := c.running; p != nil {
		select {
		case <-c.output.whole:
			p.end(&failure{status: exitProtocol, err: errors.New("ended, since it printed a line that no request asked for")})
		case <-p.due.Done():
		case <-p.ended:
		default:
			return nil
		}
		c.bury()
	}
	if pause := time.Until(c.pauses.until); pause > 0 {
		why := fmt.Errorf("%s ends again and again; it is given a pause of %v", c.Command[0], pause.Round(time.Millisecond))
		return &failure{status: exitTemporary, err: why}
	}
	p := c.prepare(c.Command)
	output := &lines{bounded: newBounded(c.MaxOutput, p.end), terminator: c.terminator, whole: make(chan []byte, 1)}
	c.direct(p, output)
	stdin, err := p.StdinPipe()
	if err == nil {
		err = c.start(p)
	}
	if err != nil {
		p.end(nil)
		return cannotRun(err)
	}
	c.running, c.stdin, c.output, c.answered = p, stdin, output, false
	return nil
}

// bury lets the process end, or helps it to. It returns the reply to the request in
// hand, if there is one.
func (c *coprocess) bury() [][]byte {
	p := c.running
	defer p.end(nil)
	status, why := c.finish(p)
	if status == 0 {
		status, why = exitUnavailable, errors.New("ended without a reply")
	}
	c.note("%s: %s came to an end: %v", c.Name, c.Command[0], cmp.Or(why, errors.New(p.ProcessState.String())))
	if !c.answered {
		c.pauses.grow(time.Now())
	}
	c.running = nil
	return c.report(p, status, why)
}

// close lets the process come to its end: that of its input, or else the ladder.
func (c *coprocess) close() {
	p := c.running
	if p == nil {
		return
	}
	c.stdin.Close()
	select {
	case <-p.ended:
	case <-p.due.Done():
	case <-time.After(time.Duration(c.KillAfter)):
	}
	p.end(nil)
	c.finish(p)
}

// pauses are for processes that end without having answered anything, one after the
// other. The first is followed by another at once: it may have been the request's fault.
type pauses struct {
	failures int
	until    time.Time
}

func (p *pauses) grow(now time.Time) {
	if p.failures++; p.failures > 1 {
		p.until = now.Add(backoff(p.failures - 1))
	}
}

// Lines are the sink of a coprocess: what it prints, cut into replies.
type lines struct {
	*bounded   // the line that has begun
	terminator byte
	whole      chan []byte // room for the one that is asked for, with its newline
}

func (l *lines) Write(p []byte) (int, error) {
	line, rest, whole := bytes.Cut(p, []byte{l.terminator})
	if whole && l.terminator == '\n' {
		line = p[:len(line)+1]
	}
	n, err := l.bounded.Write(line)
	if err != nil || !whole {
		return n, err
	}
	if len(rest) == 0 {
		select {
		case l.whole <- l.Bytes():
			l.bounded = newBounded(size(l.max), l.end)
			return len(p), nil
		default:
		}
	}
	err = &failure{status: exitProtocol, err: errors.New("ended, since it printed more than a line for a request")}
	l.end(err)
	return len(line), err
}
