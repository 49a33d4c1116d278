package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// commandFlags say how a command runs and what happens to its output.
type commandFlags struct {
	Stdin     bool           // the last frame of a request is the standard input of its command
	Timeout   *time.Duration // nil or 0 for none
	KillAfter time.Duration  `default:"2s"`
	MaxOutput size           `default:"64M" unbounded:""`
	StderrTo  string         `name:"stderr" enum:"log,reply,merge" default:"log"`
	Cwd       string
	Env       []string `sep:"none"`
}

func (f *commandFlags) Validate() error {
	for _, variable := range f.Env {
		if strings.Index(variable, "=") < 1 {
			return fmt.Errorf("--env must be NAME=VALUE, not %q", variable)
		}
	}
	if f.Cwd == "" {
		return nil
	}
	info, err := os.Stat(f.Cwd)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a directory", f.Cwd)
	}
	if err != nil {
		return fmt.Errorf("--cwd: %w", err)
	}
	return nil
}

// CmdService answers each request by running a command. Any number of goroutines may use it
// at the same time.
type CmdService struct {
	Name    string
	Command operands        // {} stands for the frames of the request, else they follow at the end
	Abort   context.Context // when done, running commands are ended
	commandFlags

	// Stderr is where the standard error of commands goes, line by line. LabelStderr tells which request a
	// line belongs to.
	Stderr      io.Writer
	LabelStderr bool

	copyBuffers sync.Pool // of *copyBuffer
}

// find looks the command up, so that a service that cannot work fails before its first
// request.
func (c *CmdService) find() error {
	path := c.Command[0]
	if c.Cwd != "" && strings.Contains(path, "/") && !filepath.IsAbs(path) {
		path = c.Cwd + "/" + path
	}
	found, err := exec.LookPath(path)
	if err == nil {
		err = checkInterpreter(found)
	}
	if err == nil {
		return nil
	}
	f := cannotRun(err)
	if f.status == exitNotFound {
		f.hint = "COMMAND is a program in $PATH, or its path"
		word, _, several := strings.Cut(path, " ")
		if several && len(c.Command) == 1 && !strings.Contains(word, "/") {
			f.hint = "give the words without quotes, or run a shell: sh -c " + shellQuoted(path)
		}
	}
	return f
}

// checkInterpreter returns an error if a file is a script whose interpreter does not exist: to execve(2)
// the script itself would not exist.
func checkInterpreter(path string) error {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	script, err := os.Open(path)
	if err != nil {
		return nil // A program need not be readable.
	}
	defer script.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(script, head)
	line, isScript := strings.CutPrefix(string(head[:n]), "#!")
	line, _, complete := strings.Cut(line, "\n")
	interpreter := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })
	complete = complete || n < len(head)
	if !isScript || !complete || len(interpreter) == 0 || !filepath.IsAbs(interpreter[0]) {
		return nil
	}
	if _, err := os.Stat(interpreter[0]); errors.Is(err, fs.ErrNotExist) {
		return &failure{status: exitCannotRun, err: fmt.Errorf("%s: its interpreter %q does not exist", path, interpreter[0])}
	}
	return nil
}

// shellQuoted returns text as one word of a shell.
func shellQuoted(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// Handle runs the command with the frames of the body as arguments.
func (c *CmdService) Handle(r Request) Reply {
	body, stdin := r.Body, []byte(nil)
	if last := len(body) - 1; c.Stdin && last >= 0 {
		body, stdin = body[:last], body[last]
	}
	argv, err := c.argv(body)
	if err != nil {
		return c.refusal(cannotRun(err))
	}
	p := c.prepare(argv, "BACKBONE_ENDPOINT="+r.Broker.endpoint, "BACKBONE_REQUEST="+r.Token, "BACKBONE_USER="+r.Broker.userOf(r.Token))
	defer p.end(nil)
	defer p.endWith(r.Context)()
	if len(stdin) > 0 {
		p.Stdin = bytes.NewReader(stdin)
	}
	if r.Stream != nil {
		c.redirect(p, r.Stream.stdout(), r.Stream.stderr())
		defer context.AfterFunc(p.ctx, func() { c.closeLate(p, r.Stream) })()
	} else {
		c.redirect(p, new(buffer), new(buffer))
	}
	p.log.Begin(c.label(r.Token))
	if err := c.start(p); err != nil {
		return c.refusal(cannotRun(err))
	}
	defer c.limitTime(p, "")()
	status, reason := c.wait(p)
	return c.result(p, status, reason)
}

// argv returns the command with the frames of a request in their place.
func (c *CmdService) argv(body [][]byte) ([]string, error) {
	arguments := make([]string, len(body))
	for i, frame := range body {
		if bytes.IndexByte(frame, 0) >= 0 {
			return nil, fmt.Errorf("frame %d contains a NUL byte, which no argument can hold", i+1)
		}
		arguments[i] = string(frame)
	}
	return slices.Concat(c.Command[:1], c.Command[1:].with(arguments...)), nil
}

// cannotRun returns the failure of a command that did not start.
func cannotRun(err error) *failure {
	if f := (*failure)(nil); errors.As(err, &f) {
		return f
	}
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
	case errors.Is(err, context.Canceled):
		status, err = exitTemporary, errors.New("the service is stopping")
	}
	return &failure{status: status, err: err}
}

// refusal returns the reply to a request for which no command ran.
func (c *CmdService) refusal(f *failure) Reply {
	return Reply{Stderr: c.message(f), Status: f.status, Reason: f}
}

// message returns what bservice itself tells the client.
func (c *CmdService) message(err error) []byte {
	return fmt.Appendf(nil, "bservice: %s: %v\n", c.Name, err)
}

// A process is a running command. It leads a process group of its own: Ctrl-C at our
// terminal does not reach it, and what it starts can be ended with it.
type process struct {
	*exec.Cmd
	stdout, stderr output
	log            *tailBuffer             // of its standard error
	ctx            context.Context         // done when the process has to end
	end            context.CancelCauseFunc // cancels ctx; a failure as its cause becomes the reply
	pipes          []outputPipe
	exited         chan struct{} // closed when it has ended
	ended          chan struct{} // closed when its output was read, too
	cut            atomic.Bool   // nobody read all of the output
}

// prepare returns a process that is yet to start. When it has to end, its group gets SIGTERM, and
// SIGKILL once the process has ended, at the latest after --kill-after.
func (c *CmdService) prepare(argv []string, env ...string) *process {
	p := &process{exited: make(chan struct{}), ended: make(chan struct{})}
	p.ctx, p.end = context.WithCancelCause(c.Abort)
	p.Cmd = exec.CommandContext(p.ctx, argv[0], argv[1:]...)
	p.Cancel = func() error { return p.signalGroup(syscall.SIGTERM) }
	p.WaitDelay = max(c.KillAfter, 1) // To exec, 0 is no limit.
	p.Dir = c.Cwd
	p.Env = slices.Concat(os.Environ(), c.Env,
		[]string{"BACKBONE_SERVICE=" + c.Name}, env)
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return p
}

func (p *process) signalGroup(s syscall.Signal) error {
	return syscall.Kill(-p.Process.Pid, s)
}

// closeLate closes the stream of a process that has to end. A client that does not read keeps it no longer than
// SIGTERM that is ignored, and when the service stops, no longer than the process itself.
func (c *CmdService) closeLate(p *process, s *stream) {
	var exited chan struct{}
	if c.Abort.Err() != nil {
		exited = p.exited
	}
	select {
	case <-exited:
	case <-time.After(c.KillAfter):
	}
	s.close()
}

// endRest ends what is left of the group if the process had to end: exec ends the leader only, and the others
// may ignore SIGTERM.
func (p *process) endRest() {
	if p.ctx.Err() != nil {
		p.signalGroup(syscall.SIGKILL)
	}
}

// endWith ends the process when nobody wants it any more, unless stop is called before.
func (p *process) endWith(wanted context.Context) (stop func() bool) {
	return context.AfterFunc(wanted, func() { p.end(context.Cause(wanted)) })
}

// redirect sends what the process prints where --stderr wants it. The outputs are for the reply.
func (c *CmdService) redirect(p *process, stdout, stderr output) {
	p.log = &tailBuffer{log: lineWriter{log: c.Stderr}}
	p.stdout, p.stderr = newLimitedOutput(stdout, c.MaxOutput, p.end), p.log
	if c.StderrTo == "reply" {
		p.stderr = newLimitedOutput(stderr, c.MaxOutput, p.end)
	}
}

// label returns what stands before the lines that a command prints for a request to standard error.
func (c *CmdService) label(token string) string {
	if !c.LabelStderr {
		return ""
	}
	return token + ": "
}

// start starts the process and reads its output.
func (c *CmdService) start(p *process) (err error) {
	defer func() {
		for _, pipe := range p.pipes {
			pipe.end.Close()
			if err != nil {
				pipe.Close()
			}
		}
	}()
	if p.Stdout, err = p.pipeTo(p.stdout); err != nil {
		return err
	}
	if p.Stderr = p.Stdout; c.StderrTo != "merge" {
		if p.Stderr, err = p.pipeTo(p.stderr); err != nil {
			return err
		}
	}
	err = p.Start()
	if errors.Is(err, fs.ErrNotExist) {
		path := p.Path
		if !filepath.IsAbs(path) {
			path = filepath.Join(c.Cwd, path)
		}
		err = cmp.Or(checkInterpreter(path), err)
	}
	if err != nil && c.Cwd != "" {
		err = fmt.Errorf("%w, in %s", err, c.Cwd)
	}
	if err != nil {
		return err
	}
	var copies sync.WaitGroup
	for _, pipe := range p.pipes {
		copies.Go(func() { c.copyOutput(p, pipe) })
	}
	go func() {
		p.Wait()
		for _, pipe := range p.pipes {
			pipe.SetReadDeadline(time.Now()) // ends a read
		}
		close(p.exited)
		p.endRest() // It may hold the output open.
		copies.Wait()
		p.log.End()
		p.endRest()
		close(p.ended)
	}()
	return nil
}

// limitTime ends the process after --timeout, unless it ended or stop was called before. The reason ends in
// the detail.
func (c *CmdService) limitTime(p *process, detail string) (stop func()) {
	if c.Timeout == nil || *c.Timeout == 0 {
		return func() {}
	}
	timer := time.AfterFunc(*c.Timeout, func() {
		select {
		case <-p.exited: // It may take time until all its output was read.
		default:
			p.end(&failure{status: exitTimeout, err: fmt.Errorf("ended after --timeout %v%s", *c.Timeout, detail)})
		}
	})
	return func() { timer.Stop() }
}

// wait waits for the end of the process. It returns the exit status to report and, if we
// ended the process, the reason.
func (c *CmdService) wait(p *process) (status int, reason error) {
	<-p.ended
	status = exitStatus(p.ProcessState)
	cause, f := context.Cause(p.ctx), (*failure)(nil)
	switch {
	case cause == nil, cause == context.Cause(c.Abort) && status == 0 && !p.cut.Load():
	case cause == context.Cause(c.Abort):
		status, reason = cmp.Or(status, exitIO), errors.New("ended because the service is stopping")
	case errors.As(cause, &f):
		status, reason = f.status, f
	default:
		reason = cause
	}
	return status, reason
}

// result returns the reply of a process that has ended.
func (c *CmdService) result(p *process, status int, reason error) Reply {
	reply := Reply{Output: [][]byte{p.stdout.Bytes()}, Status: status, Reason: reason}
	if status != 0 || c.StderrTo == "reply" {
		reply.Stderr = p.stderr.Bytes()
	}
	if reason != nil {
		if len(reply.Stderr) > 0 && !bytes.HasSuffix(reply.Stderr, []byte("\n")) {
			reply.Stderr = append(reply.Stderr, '\n')
		}
		reply.Stderr = append(reply.Stderr, c.message(reason)...)
	}
	return reply
}

// exitStatus returns the status of an ended command as a shell would have it.
func exitStatus(state *os.ProcessState) int {
	if status := state.Sys().(syscall.WaitStatus); status.Signaled() {
		return exitSignal + int(status.Signal())
	}
	return state.ExitCode()
}

// A coprocess answers requests, one at a time, with a command that keeps running: each
// request is a line of its input, and each line of its output is a reply.
type coprocess struct {
	*CmdService
	endpoints  string // of all brokers
	log        *slog.Logger
	terminator byte // ends lines: a newline or NUL
	skipLines  int  // that each process prints before it is ready

	running  *process // nil before the first one, and after one was reaped
	stdin    io.WriteCloser
	output   *lineOutput
	fault    *failure // of the last process, if it would be the same with the next one
	restarts restartLimit
}

// quietStart is how long a process has to be silent before it gets its first request: what it prints
// by itself must not be taken for a reply.
const quietStart = 100 * time.Millisecond

// bufferingHint says what is most likely wrong with a process that printed no line in time.
func (c *coprocess) bufferingHint() string {
	if c.terminator == 0 {
		return " without a NUL byte in its output; if it buffers its output, run it with stdbuf -o0"
	}
	return " without a line of output; if it buffers its output, run it with stdbuf -oL" +
		" or a flag such as sed -u, grep --line-buffered, python3 -u or mawk -W interactive"
}

// Handle writes a line to the process and waits for one.
func (c *coprocess) Handle(r Request) Reply {
	line, err := c.line(r.Body)
	if err != nil {
		return c.refusal(cannotRun(err))
	}
	if refused := c.ensureRunning(nil); refused != nil {
		return *refused
	}
	c.running.log.Begin(c.label(r.Token)) // What it printed before is about earlier requests.
	defer c.limitTime(c.running, c.bufferingHint())()
	defer c.running.endWith(r.Context)()
	c.output.await()
	// The process may print while it reads: a long line does not fit into the pipe.
	go func(stdin io.Writer) { stdin.Write(line) }(c.stdin)
	var output []byte
	select {
	case output = <-c.output.lines:
	case <-c.running.ctx.Done():
		output = c.output.last()
	case <-c.running.ended:
		output = c.output.last()
	}
	if output == nil {
		return c.reap()
	}
	c.restarts = restartLimit{}
	return Reply{Output: [][]byte{output}}
}

// line returns a request as the process reads it.
func (c *coprocess) line(body [][]byte) ([]byte, error) {
	name := "newline"
	if c.terminator == 0 {
		name = "NUL byte"
	}
	for i, frame := range body {
		switch {
		case bytes.IndexByte(frame, c.terminator) >= 0:
			return nil, fmt.Errorf("frame %d contains a %s, which ends a request", i+1, name)
		case bytes.IndexByte(frame, '\t') >= 0:
			return nil, fmt.Errorf("frame %d contains a tab, which separates arguments", i+1)
		}
	}
	return append(bytes.Join(body, []byte{'\t'}), c.terminator), nil
}

// open starts the process before the first request needs it, unless stop is done.
func (c *coprocess) open(stop context.Context) { c.ensureRunning(stop.Done()) }

// ensureRunning starts a process unless one is running that can take a request. It returns the reply to
// a request if there is none, and waits for one no longer than until stop is closed.
func (c *coprocess) ensureRunning(stop <-chan struct{}) (refused *Reply) {
	refuse := func(f *failure) *Reply {
		reply := c.refusal(f)
		return &reply
	}
	if c.running != nil {
		if !c.over() {
			return nil
		}
		if c.reap(); c.fault != nil {
			return refuse(c.fault) // It may have been out of step for longer.
		}
	}
	if pause := time.Until(c.restarts.next); pause > 0 {
		err := fmt.Errorf("%s ends again and again; it is started again in %v", c.Command[0], pause.Round(time.Millisecond))
		return refuse(cmp.Or(c.fault, &failure{status: exitTemporary, err: err}))
	}
	if err := c.launch(); err != nil {
		c.fault = cannotRun(err)
		c.log.Error("coprocess did not start", "why", c.fault)
		c.restarts.failed(time.Now())
		return refuse(c.fault)
	}
	if !c.becomesReady(stop) {
		reply := c.reap()
		return &reply
	}
	return nil
}

// launch starts a process.
func (c *coprocess) launch() error {
	p := c.prepare(c.Command, "BACKBONE_ENDPOINT="+c.endpoints, "BACKBONE_USER=") // It works for many callers.
	output := newLineOutput(newLimitedOutput(new(buffer), c.MaxOutput, p.end), c.terminator, c.skipLines)
	c.redirect(p, output, nil)
	p.stdout = output // which limits each line
	stdin, err := p.StdinPipe()
	if err == nil {
		err = c.start(p)
	}
	if err != nil {
		p.end(nil)
		return err
	}
	c.running, c.stdin, c.output = p, stdin, output
	return nil
}

// over tells whether the process has ended or has to.
func (c *coprocess) over() bool {
	select {
	case <-c.running.ctx.Done():
	case <-c.running.ended:
	default:
		return false
	}
	return true
}

// becomesReady waits until the process has printed the lines to skip and was then silent. It returns
// false if the process is over, as it is when stop is closed before.
func (c *coprocess) becomesReady(stop <-chan struct{}) bool {
	unlimited := c.limitTime(c.running, " before it printed the lines to skip")
	select {
	case <-c.output.skipped:
	case <-stop:
		c.running.end(&failure{status: exitTemporary, err: errors.New("ended because the service is stopping")})
	case <-c.running.ctx.Done():
	case <-c.running.ended:
	}
	unlimited()
	select {
	case <-time.After(quietStart):
	case <-c.running.ctx.Done():
	case <-c.running.ended:
	}
	return !c.over()
}

// reap waits for the end of the process and returns the reply to its last request.
func (c *coprocess) reap() Reply {
	p := c.running
	defer p.end(nil)
	status, reason := c.wait(p)
	if status == 0 {
		status, reason = exitUnavailable, errors.New("ended without a reply")
	}
	c.log.Warn("coprocess ended", "pid", p.Process.Pid, "why", cmp.Or(reason, errors.New(p.ProcessState.String())))
	if !c.output.answered {
		c.restarts.failed(time.Now())
	}
	c.running, c.fault = nil, nil
	if f := (*failure)(nil); errors.As(reason, &f) && f.status == exitProtocol {
		c.fault = f
	}
	return c.result(p, status, reason)
}

// close lets the process end by itself at the end of its input, and otherwise ends it.
func (c *coprocess) close() {
	p := c.running
	if p == nil {
		return
	}
	c.stdin.Close()
	select {
	case <-p.ended:
	case <-p.ctx.Done():
	case <-time.After(c.KillAfter):
	}
	p.end(nil)
	<-p.ended
}

// A restartLimit slows down the restarts of processes that end, one after the other, before
// they have answered anything. The first restart is at once: the request may be to blame.
type restartLimit struct {
	failures int
	next     time.Time // no restart before
}

func (l *restartLimit) failed(now time.Time) {
	if l.failures++; l.failures > 1 {
		l.next = now.Add(backoff(l.failures - 1))
	}
}

// A lineOutput is the output of a coprocess, cut into replies. Output that no request asked for ends
// the process.
type lineOutput struct {
	*limitedOutput // the line that has begun
	terminator     byte
	skipped        chan struct{} // closed when there are no more lines to skip
	lines          chan []byte   // has room for the line that is awaited, with its newline

	mu       sync.Mutex
	skip     int  // lines
	awaited  bool // the next line is a reply
	answered bool // there was a reply
}

func newLineOutput(line *limitedOutput, terminator byte, skip int) *lineOutput {
	o := &lineOutput{limitedOutput: line, terminator: terminator, skip: skip, skipped: make(chan struct{}), lines: make(chan []byte, 1)}
	if skip == 0 {
		close(o.skipped)
	}
	return o
}

// await makes the next line a reply.
func (o *lineOutput) await() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.awaited = true
}

// last returns the reply that came right before the end of the process, or nil.
func (o *lineOutput) last() []byte {
	select {
	case line := <-o.lines:
		return line
	default:
		return nil
	}
}

func (o *lineOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	line, rest, complete := bytes.Cut(p, []byte{o.terminator})
	for ; o.skip > 0; line, rest, complete = bytes.Cut(rest, []byte{o.terminator}) {
		if !complete {
			return len(p), nil
		}
		if o.skip--; o.skip == 0 {
			close(o.skipped)
		}
	}
	switch {
	case len(line) == 0 && !complete:
		return len(p), nil
	case !o.awaited:
		return 0, o.refuse(line)
	case complete && o.terminator == '\n':
		line = line[:len(line)+1]
	}
	if _, err := o.limitedOutput.Write(line); err != nil {
		return 0, err
	}
	switch {
	case !complete:
		return len(p), nil
	case len(rest) > 0:
		return 0, o.refuse(rest)
	}
	o.lines <- o.Bytes()
	o.limitedOutput = newLimitedOutput(new(buffer), o.limit, o.end)
	o.awaited, o.answered = false, true
	return len(p), nil
}

// refuse ends the process because of output that no request asked for.
func (o *lineOutput) refuse(output []byte) error {
	line, _, _ := bytes.Cut(output, []byte{o.terminator})
	err := fmt.Errorf("ended because it printed a line that no request asked for: %.60q", line)
	if !o.answered && !o.awaited {
		err = fmt.Errorf("%w; --skip-lines skips lines at the start", err)
	}
	f := &failure{status: exitProtocol, err: err}
	o.end(f)
	return f
}
