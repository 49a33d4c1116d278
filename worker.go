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
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

const serviceUsage = `bservice serves a command under a name.

Usage: bservice [FLAGS] NAME COMMAND [ARG...]

For each request it runs COMMAND with the ARGs and then the arguments of the request,
without a shell, and replies with what the command prints. An ARG that is just {}
stands for the arguments of the request. When the command fails, the reply carries its
output, its standard error and its exit status.

  -j, --jobs N           serve N requests at a time (1); 0 is one per core
      --stdin            the last argument of a request is the standard input instead
      --timeout DURATION
                         end a command that takes longer, with status 124 (none; 30s
                         with --coproc)
      --kill-after DURATION
                         a command that must end gets SIGTERM, and SIGKILL after (2s)
      --max-output SIZE  end a command that prints more (64M)
      --stderr WHERE     where the standard error of a command goes: log, that of
                         bservice; reply; or merge, into its output (log)
      --coproc           run COMMAND once per job: each request is a line of its input,
                         with tabs between arguments, each line of its output a reply
  -0, --null             with --coproc: NUL bytes end requests and replies, not newlines
      --cwd DIR          run COMMAND in DIR
      --env NAME=VALUE   set a variable for COMMAND; may be given several times
      --grace DURATION   when stopped, let commands run for so long (10s)
      --host HOST        host of the broker (127.0.0.1)
      --port PORT        port of the broker (5555)
      --broker ENDPOINT  the broker instead, tcp://HOST:PORT or ipc:///PATH
      --heartbeat DURATION, --liveness N
                         how often to send a heartbeat (1s), and how many missed ones
                         of the broker mean that it is gone (5)
  -q, --quiet            say nothing but errors
  -v, --verbose          log each request
  -h, --help
      --version

Durations have a unit or are seconds: 500ms, 2.5, 1m. Sizes are bytes: 1000, 64K, 1G.
Flags go before COMMAND; what follows it is the command's, which also finds
BACKBONE_SERVICE, BACKBONE_ENDPOINT and BACKBONE_REQUEST in its environment.

SIGTERM or SIGINT lets the commands end and their replies go out; a second one ends
the commands. BACKBONE_HOST, BACKBONE_PORT and BACKBONE_BROKER are as their flags.

Exit status:
  0         stopped by SIGTERM or SIGINT
  64        wrong usage
  126, 127  COMMAND cannot be run; it was not found
  130, 143  a second SIGINT or SIGTERM ended the commands

Examples:
  $ bservice ls-service ls &
  $ bservice -j 0 --stdin resize convert - -resize {} png:- &
  $ bservice --broker tcp://build:5555 --timeout 1h make make -C /srv/app &
  $ bservice greet sh -c 'echo "hello, $1"' sh &
  $ bservice --coproc calc bc -l &
`

type serviceTool struct {
	commonFlags
	heartbeatFlags
	commandRules
	Jobs    int `short:"j" default:"1"`
	Coproc  bool
	Null    bool     `short:"0"`
	Grace   duration `default:"10s"`
	Name    string   `arg:"" optional:""`
	Command operands `arg:"" optional:"" passthrough:"partial"`
}

// Validate checks the flags of both groups, which each have too much to say for a tag.
func (t *serviceTool) Validate() error {
	return cmp.Or(t.heartbeatFlags.Validate(), t.commandRules.Validate())
}

const (
	// maxJobs keeps to the sockets and threads that a process may well have.
	maxJobs = 1000

	// coprocTimeout is for coprocesses where nothing else is said: one that answers a
	// request with nothing would else keep its job waiting for ever.
	coprocTimeout = duration(30 * time.Second)
)

func (t *serviceTool) Run() error {
	endpoint, err := t.endpoint()
	if err != nil {
		return err
	}
	const example = "bservice ls-service ls"
	switch {
	case t.Name == "":
		return misuse(example, "no service name")
	case len(t.Command) == 0:
		return misuse(example, "no command for %s", t.Name)
	case strings.HasPrefix(t.Name, mmiPrefix):
		return misuse(example, "%s: names in %s are the broker's own", t.Name, mmiPrefix)
	case t.Jobs < 0 || t.Jobs > maxJobs:
		return misuse(fmt.Sprintf("0 to %d; 0 is one per core", maxJobs), "--jobs %d", t.Jobs)
	case t.Null && !t.Coproc:
		return misuse("NUL bytes end the requests of a coprocess", "--null without --coproc")
	case t.Coproc && t.Stdin:
		return misuse("a request is a line of its input", "--coproc and --stdin do not go together")
	case t.Coproc && t.Stderr == "reply":
		return misuse("log or merge", "--stderr reply: a coprocess does not tell which request it is about")
	}

	if t.Coproc && t.Timeout == nil {
		timeout := coprocTimeout
		t.Timeout = &timeout
	}

	// The signals and the grace ask the same of the commands: first to end soon, then now.
	stop, endSoon := context.WithCancel(context.Background())
	now, endNow := context.WithCancelCause(context.Background())
	defer onSignals(
		func(os.Signal) {
			endSoon()
			time.AfterFunc(time.Duration(t.Grace), func() { endNow(nil) })
		},
		func(again os.Signal) { endNow(signalled(again)) },
	)()

	command := &CmdService{Name: t.Name, Endpoint: endpoint, Command: t.Command, Now: now, commandRules: t.commandRules}
	if err := command.find(); err != nil {
		return err
	}
	if t.Jobs == 0 {
		t.Jobs = runtime.GOMAXPROCS(0)
	}
	// Each job has its own, and some that go with it.
	if err := zmq.SetMaxSockets(10 + 8*t.Jobs); err != nil {
		return fmt.Errorf("allow for %d jobs: %w", t.Jobs, err)
	}
	defer zmq.Term() // once the last reply and the DISCONNECT have left

	v := t.voice("bservice")
	v.note("%s runs %s", t.Name, strings.Join(t.Command, " "))
	ended := make(chan error)
	for range t.Jobs {
		service := &Service{Name: t.Name, Endpoint: endpoint, heartbeatFlags: t.heartbeatFlags, voice: v}
		v.quiet = true // one that tells of the broker is enough
		go func() { ended <- t.work(stop, service, command) }()
	}
	for range t.Jobs {
		if failed := <-ended; failed != nil {
			err = failed
			endSoon()
		}
	}
	if signal := (*failure)(nil); err == nil && errors.As(context.Cause(now), &signal) {
		return signal
	}
	return err
}

// work is one of the jobs: a worker and, where there are any, its coprocess.
func (t *serviceTool) work(stop context.Context, service *Service, command *CmdService) error {
	service.Handle = command.Handle
	if t.Coproc {
		coprocess := &coprocess{CmdService: command, voice: t.voice("bservice"), terminator: '\n'}
		if t.Null {
			coprocess.terminator = 0
		}
		coprocess.open()
		defer coprocess.close()
		service.Handle = coprocess.Handle
	}
	return service.Connect(stop)
}

// Handle answers one request: a body for a body. The token names the request in logs, on
// the side of the broker too. Service calls it for one request at a time.
type Handle func(token string, body [][]byte) [][]byte

// Service serves requests for one name through a broker.
type Service struct {
	Name     string
	Endpoint string
	Handle   Handle
	heartbeatFlags
	voice

	missing time.Time // when to say that no broker is there; zero while one is
}

// Connect registers with the broker and serves until stop is done: then it finishes
// the request in hand, replies, and takes its leave. It waits for a broker that is not
// there, and registers anew with one that was restarted or fell silent.
func (s *Service) Connect(stop context.Context) error {
	bell := newBell()
	defer context.AfterFunc(stop, bell.Ring)()
	for stop.Err() == nil {
		begin := time.Now()
		why, err := s.serve(stop, bell)
		unknown := errors.As(err, new(noHost))
		switch {
		case err != nil && !unknown:
			return err
		case stop.Err() != nil:
			return nil
		case unknown:
			s.miss(begin) // the network may know it soon
		case why != errMissing:
			s.note("%s: %v; connecting to %s again", s.Name, why, s.Endpoint)
		}
		// A broker that turns us away at once must not be asked again at once.
		pause := min(time.Duration(s.Heartbeat), time.Second)
		select {
		case <-time.After(time.Until(begin.Add(pause))):
		case <-stop.Done():
		}
	}
	return nil
}

// serve is the loop around one session, on a socket of its own: one that is used
// again could bring back what an earlier session left in it. It returns why the
// session ended, or nil when stop is done.
func (s *Service) serve(stop context.Context, bell *bell) (over, err error) {
	// Only a broker that is there gets messages: heartbeats to one that is not would
	// wait for it, and READY would come too late to be true.
	immediate := func(socket *socket) error { return socket.SetImmediate(true) }
	link, err := dial(stop, "bservice", s.Endpoint, immediate, bell.hear)
	if err != nil {
		return nil, err
	}
	defer link.Close()

	replies := make(chan [][]byte, 1)
	session := &session{
		Service: s,
		send:    link.send,
		start: func(token string, body [][]byte) {
			go func() {
				replies <- s.answer(token, body)
				bell.Ring()
			}()
		},
	}
	for {
		message, news, err := bell.Wait(link.socket, session.Tick(time.Now()))
		if err != nil {
			return nil, err
		}
		if news {
			if err := link.Look(); err != nil {
				return nil, err
			}
		}
		if session.unsent() {
			session.Flush()
		}
		for message {
			frames, err := link.receive()
			if err != nil {
				return nil, err
			}
			if frames == nil {
				break
			}
			session.Receive(frames)
		}
		if link.lost {
			session.Lose()
			link.lost = false
		}
		select {
		case reply := <-replies:
			length := sizeOf(reply)
			session.Finish(reply)
			freeIfLarge(length) // its room may be wanted for the next
		default:
		}

		switch {
		case session.working:
			// A session that is over waits for its command nevertheless: one at a time.
		case session.over != nil:
			return session.over, nil
		case stop.Err() != nil:
			session.Leave()
			return nil, link.SetLinger(time.Second)
		}
	}
}

// answer handles a request and logs it where that is asked for.
func (s *Service) answer(token string, body [][]byte) [][]byte {
	begin := time.Now()
	reply := s.Handle(token, body)
	if s.verbose {
		_, _, status, _ := parseStatusReply(reply)
		s.detail("service=%s request=%s status=%d ms=%d in=%d out=%d",
			s.Name, token, status, time.Since(begin).Milliseconds(), sizeOf(body), sizeOf(reply))
	}
	return reply
}

// tokenOf makes a printable word of the address that a broker gave a request.
func tokenOf(address [][]byte) string {
	quoted := strconv.QuoteToASCII(string(bytes.Join(address, []byte{'/'})))
	return quoted[1 : len(quoted)-1]
}

// A session is one registration with a broker, from READY to DISCONNECT, as a state
// machine: it knows no socket, no clock and no command.
type session struct {
	*Service
	send  func(frames [][]byte) error
	start func(token string, body [][]byte) // begins to work on a request; Finish ends it

	over       error // why the session ended, nil while it lasts
	registered bool
	working    bool
	client     [][]byte // whose request is in hand
	reply      *Message // finished and not yet sent
	due        time.Time
	silence    int // heartbeats since the broker was last heard
	accused    bool
}

// unsent tells whether Flush has something to do, once the broker can be reached.
func (s *session) unsent() bool {
	return s.over == nil && (!s.registered || s.reply != nil)
}

// Flush sends what is due to the broker: READY first of all, and a reply.
func (s *session) Flush() {
	if !s.registered {
		s.registered = s.deliver(Message{Kind: KindReady, Service: []byte(s.Name)})
		if s.registered {
			s.missing = time.Time{}
			s.note("%s is ready at %s", s.Name, s.Endpoint)
		}
	}
	if s.registered && s.reply != nil && s.deliver(*s.reply) {
		s.reply = nil
	}
}

// deliver sends a message, tells whether it could, and ends the session where it
// never will.
func (s *session) deliver(m Message) bool {
	err := s.send(m.Frames())
	if err != nil && err != errWouldBlock {
		s.over = err
	}
	return err == nil
}

// Receive takes a message of the broker's.
func (s *session) Receive(frames [][]byte) {
	if s.over != nil {
		return
	}
	m, err := Parse(frames)
	if err == nil && m.Kind == KindRequest && s.busy() {
		err = errors.New("a REQUEST before the reply to the last")
	}
	if err == nil && (m.Kind == KindClient || m.Kind == KindReady || m.Kind == KindReply) {
		err = fmt.Errorf("an unexpected %v", m.Kind)
	}
	if err != nil {
		if !s.accused {
			s.accused = true
			s.say("bad message from %s: %v", s.Endpoint, err)
		}
		return
	}

	s.silence = 0
	switch m.Kind {
	case KindRequest:
		s.client, s.working = m.Client, true
		s.start(tokenOf(m.Client), m.Body)
	case KindDisconnect:
		s.over = errors.New("the broker said DISCONNECT")
	}
}

// Finish takes the reply to the request in hand.
func (s *session) Finish(body [][]byte) {
	s.working = false
	if s.over != nil {
		s.say("%s: a reply is lost: %v", s.Name, s.over)
		return
	}
	s.reply = &Message{Kind: KindReply, Client: s.client, Body: body}
	s.Flush()
}

// Tick sends the heartbeats and returns the time of the next call, zero for never.
func (s *session) Tick(now time.Time) time.Time {
	if s.over != nil {
		return time.Time{}
	}
	if now.Before(s.due) {
		return s.due
	}
	s.due = now.Add(time.Duration(s.Heartbeat))
	if !s.registered {
		if s.miss(now) {
			s.over = errMissing // its name may have another address by now
		}
		return s.due
	}
	s.deliver(Message{Kind: KindHeartbeat})
	if s.busy() {
		return s.due
	}
	if s.silence++; s.silence > s.Liveness {
		s.over = fmt.Errorf("the broker was silent for %d heartbeats", s.Liveness)
	}
	return s.due
}

// errMissing is why a session ends for which no broker was there for a while.
var errMissing = errors.New("no broker is there")

// miss says that no broker is there, once it is not for a heartbeat, and now and then. It
// returns whether it did.
func (s *Service) miss(now time.Time) bool {
	if s.missing.IsZero() {
		s.missing = now.Add(time.Duration(s.Heartbeat))
	}
	if now.Before(s.missing) {
		return false
	}
	s.missing = now.Add(30 * time.Second)
	s.note("%s waits for a broker at %s", s.Name, s.Endpoint)
	return true
}

// Lose tells that the connection broke. What was on its way is lost with it, in both
// directions: an idle worker might wait for a request that the broker has sent.
func (s *session) Lose() {
	if s.registered && !s.busy() {
		s.over = errors.New("the connection to the broker broke")
	}
}

// busy tells whether a request is in hand. As long as it is, neither silence nor a
// broken connection ends the session: some brokers send no heartbeats to a busy worker,
// and the reply can still go out over the next connection.
func (s *session) busy() bool {
	return s.working || s.reply != nil
}

// Leave says goodbye.
func (s *session) Leave() {
	if s.reply != nil {
		s.say("%s: a reply is lost: the broker is gone", s.Name)
	}
	if s.registered {
		s.deliver(Message{Kind: KindDisconnect})
	}
}

// From here on: the command.

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

// From here on: a command that runs for longer than a request.

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
