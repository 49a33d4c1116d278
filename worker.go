package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
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
output, its standard error and its exit status. The command has an empty standard
input, and the name in its environment as BACKBONE_SERVICE.

Flags go before COMMAND; what follows it is the command's.

  --host HOST            host of the broker (127.0.0.1)
  --port PORT            port of the broker (5555)
  --broker ENDPOINT      the broker instead, tcp://HOST:PORT or ipc:///PATH
  --heartbeat DURATION   send the broker a heartbeat this often (1s)
  --liveness N           a broker silent for this many heartbeats is gone (5)
  -q, --quiet            say nothing but errors
  -v, --verbose          say each message
  -h, --help
  --version

Durations have a unit or are seconds: 500ms, 2.5, 1m.

It waits for a broker that is not there, and finds one that was restarted. SIGTERM or
SIGINT lets the command end and its reply go out first; a second one kills it.

Environment, where no flag says otherwise:
  BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER    as --host, --port, --broker

Exit status:
  0         stopped by SIGTERM or SIGINT
  64        wrong usage
  130, 143  a second SIGINT or SIGTERM ended the command

Examples:
  $ bservice ls-service ls &
  $ bservice resize convert {} -resize 50% png:- &
  $ bservice --broker tcp://build:5555 make make -C /srv/app &
  $ bservice greet sh -c 'echo "hello, $1"' sh &
`

type serviceTool struct {
	commonFlags
	heartbeatFlags
	Name    string   `arg:"" optional:""`
	Command operands `arg:"" optional:"" passthrough:"partial"`
}

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
	}

	stop, endSoon := context.WithCancel(context.Background())
	now, endNow := context.WithCancelCause(context.Background())
	defer onSignals(
		func(os.Signal) { endSoon() },
		func(again os.Signal) { endNow(signalled(again)) },
	)()

	command := CmdService{Name: t.Name, Command: t.Command, Killed: now}
	service := Service{
		Name:           t.Name,
		Endpoint:       endpoint,
		Handle:         command.Handle,
		heartbeatFlags: t.heartbeatFlags,
		voice:          t.voice("bservice"),
	}
	service.note("%s runs %s", t.Name, strings.Join(t.Command, " "))
	defer zmq.Term() // once the last reply and the DISCONNECT have left
	if err := service.Connect(stop); err != nil {
		return err
	}
	return context.Cause(now)
}

// Handle answers one request: a body for a body. Service calls it for one request at
// a time.
type Handle func(body [][]byte) [][]byte

// Service serves requests for one name through a broker.
type Service struct {
	Name     string
	Endpoint string
	Handle   Handle
	heartbeatFlags
	voice
}

// Connect registers with the broker and serves until stop is done: then it finishes
// the request in hand, replies, and takes its leave. It waits for a broker that is not
// there, and registers anew with one that was restarted or fell silent.
func (s *Service) Connect(stop context.Context) error {
	for stop.Err() == nil {
		begin := time.Now()
		why, err := s.serve(stop)
		if err != nil {
			return err
		}
		if stop.Err() != nil {
			break
		}
		s.note("%s: %v; connecting to %s again", s.Name, why, s.Endpoint)
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
func (s *Service) serve(stop context.Context) (over, err error) {
	// Only a broker that is there gets messages: heartbeats to one that is not would
	// wait for it, and READY would come too late to be true.
	link, err := dial("bservice", s.Endpoint, func(socket *zmq.Socket) error { return socket.SetImmediate(true) })
	if err != nil {
		return nil, err
	}
	defer link.Close()
	defer context.AfterFunc(stop, link.bell.Ring)()

	replies := make(chan [][]byte, 1)
	session := &session{
		Service: s,
		send:    func(frames [][]byte) error { return send(link.Socket, frames) },
		start: func(body [][]byte) {
			go func() {
				replies <- s.Handle(body)
				link.bell.Ring()
			}()
		},
	}
	for {
		readable, err := link.bell.Wait(session.Tick(time.Now()))
		if err != nil {
			return nil, err
		}
		if link.monitor.news() {
			if err := link.Look(); err != nil {
				return nil, err
			}
		}
		if session.unsent() {
			session.Flush()
		}
		for readable {
			frames, err := receive(link.Socket)
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
			session.Finish(reply)
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

// A session is one registration with a broker, from READY to DISCONNECT, as a state
// machine: it knows no socket, no clock and no command.
type session struct {
	*Service
	send  func(frames [][]byte) error
	start func(body [][]byte) // begins to work on a request; Finish ends it

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
	s.detail("%v from %s", m.Kind, s.Endpoint)
	switch m.Kind {
	case KindRequest:
		s.client, s.working = m.Client, true
		s.start(m.Body)
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

// CmdService is the handler of requests that runs a command for each.
type CmdService struct {
	Name    string
	Command []string        // with {} where the request's frames go, else at the end
	Killed  context.Context // ends the running command at once
}

// Handle runs the command with the frames of the body as arguments. Its reply is what
// the command printed, or a status reply when it failed or could not be run.
func (c *CmdService) Handle(body [][]byte) [][]byte {
	argv, err := c.argv(body)
	if err != nil {
		return c.refuse(exitCannotRun, err)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(c.Killed, argv[0], argv[1:]...)
	cmd.Env = append(cmd.Environ(), "BACKBONE_SERVICE="+c.Name)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A group of its own, so that Ctrl-C at our terminal does not reach the command:
	// it may finish. Its children share its fate.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A grandchild that keeps the output open must not hold back the reply for ever.
	cmd.WaitDelay = 2 * time.Second

	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		os.Stderr.Write(stderr.Bytes())
		return [][]byte{stdout.Bytes()}
	case errors.As(err, &exit):
		return statusReply(stdout.Bytes(), stderr.Bytes(), exitStatus(exit.ProcessState))
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return c.refuse(exitNotFound, err)
	}
	return c.refuse(exitCannotRun, err)
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
	args := c.Command[1:]
	if !slices.Contains(args, "{}") {
		return slices.Concat(c.Command, frames), nil
	}
	argv := c.Command[:1:1]
	for _, arg := range args {
		if arg == "{}" {
			argv = append(argv, frames...)
		} else {
			argv = append(argv, arg)
		}
	}
	return argv, nil
}

// refuse is the status reply to a request for which the command did not run.
func (c *CmdService) refuse(status int, why error) [][]byte {
	return statusReply(nil, fmt.Appendf(nil, "bservice: %s: %v\n", c.Name, why), status)
}

// exitStatus is the status of an ended command as a shell has it.
func exitStatus(state *os.ProcessState) int {
	if status := state.Sys().(syscall.WaitStatus); status.Signaled() {
		return exitSignal + int(status.Signal())
	}
	return state.ExitCode()
}
