package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
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
