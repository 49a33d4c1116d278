package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

const serviceUsage = `bservice serves a command under a name.

Usage: bservice [FLAGS] NAME COMMAND [ARG...]

For each request, bservice runs COMMAND with the ARGs and then the arguments of the
request, without a shell, and replies with its output. An ARG {} stands for the
arguments of the request. If the command fails, the reply also has its standard error
and its exit status.

  -j, --jobs N           serve up to N requests at a time in all (1); 0 is one per core
      --stdin            use the last argument of a request as standard input instead
      --timeout DURATION
                         end a command that takes longer (none; with --coproc: 30s)
      --cancel           end commands whose client is gone; those of streams always end
      --kill-after DURATION
                         send SIGTERM to a command that has to end, and SIGKILL when it
                         has ended to what is left of it, or this much later (2s)
      --max-output SIZE  end a command that prints more (64M); 0 is no limit
      --stderr WHERE     send the standard error of commands to: log, that of bservice;
                         reply; or merge, into the output (log)
      --coproc           run COMMAND once per job: each request is a line of its input,
                         with tabs between arguments; each line of its output, a reply
  -0, --null             with --coproc: NUL bytes end requests and replies, not newlines
      --skip-lines N     with --coproc: skip the first N lines that COMMAND prints (0)
      --cwd DIR          run COMMAND in DIR
      --env NAME=VALUE   set a variable for COMMAND; may be repeated
      --grace DURATION   when stopped, let commands run this much longer (10s)
      --host HOST        host of the broker (127.0.0.1)
  -p, --port PORT        port of the broker (5555)
  -b, --broker ENDPOINT  use this broker instead: tcp://HOST:PORT[#KEY] or ipc:///PATH;
                         may be repeated. Several must be bbrokers: while all jobs are
                         busy, a request is handed back, which others would forget
      --broker-key KEY   public key of the broker, for one that takes keys
      --key FILE         secret key of the service; the broker must know its public key
      --heartbeat DURATION
                         send a heartbeat this often (1s)
      --liveness N       reconnect when the broker was silent for N heartbeats (5)
  -q, --quiet            print errors only
  -v, --verbose          log each request
  -h, --help
      --version

A duration has a unit, or is in seconds: 500ms, 2.5, 1m. A size is in bytes, or has K, M
or G for powers of 1024. BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER, BACKBONE_KEY and
BACKBONE_BROKER_KEY set the defaults of their flags. Put flags before COMMAND; what
follows belongs to it. COMMAND finds BACKBONE_SERVICE, BACKBONE_ENDPOINT,
BACKBONE_REQUEST and BACKBONE_USER, the name of the caller's key, in its environment.

After SIGTERM, SIGINT, SIGHUP or SIGQUIT, commands finish and their replies go out; a
second signal ends the commands.

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
  $ bservice --coproc upper perl -pe '$| = 1; $_ = uc' &
`

type serviceTool struct {
	clientFlags
	heartbeatFlags
	commandFlags
	Jobs      int `short:"j" default:"1"`
	Cancel    bool
	Coproc    bool
	Null      bool          `short:"0"`
	SkipLines int           `default:"0"`
	Grace     time.Duration `default:"10s"`
	Name      string        `arg:"" optional:""`
	Command   operands      `arg:"" optional:"" passthrough:"partial"`
}

// Validate checks the flags of both groups: each has its own Validate.
func (t *serviceTool) Validate() error {
	return cmp.Or(t.heartbeatFlags.Validate(), t.commandFlags.Validate())
}

const (
	// maxServiceJobs keeps to the sockets and threads that a process is likely to have.
	maxServiceJobs = 1000

	// coprocTimeout is the default of --timeout for coprocesses: one that does not answer a
	// request would otherwise block its job for ever.
	coprocTimeout = 30 * time.Second
)

func (t *serviceTool) Run() error {
	addresses, err := t.addresses()
	if err != nil {
		return err
	}
	if err := t.check(); err != nil {
		return err
	}
	if t.Coproc && t.Timeout == nil {
		timeout := coprocTimeout
		t.Timeout = &timeout
	}

	keepMemory()
	stderr := newLogWriter(os.Stderr)
	defer stderr.Close()
	log := newLog(stderr, &t.commonFlags).With("service", t.Name)

	// A signal asks the commands to end soon; a second one, or the end of the grace, now.
	stop, endSoon := context.WithCancel(context.Background())
	abort, endNow := context.WithCancelCause(context.Background())
	defer onSignals(stopSignals,
		func(syscall.Signal) {
			log.Info("service stopping", "grace", t.Grace)
			endSoon()
			time.AfterFunc(t.Grace, func() { endNow(nil) })
		},
		func(second syscall.Signal) { endNow(signalled(second)) },
	)()

	if t.Jobs == 0 {
		t.Jobs = runtime.GOMAXPROCS(0)
	}
	command := &CmdService{Name: t.Name, Command: t.Command, Abort: abort, Stderr: stderr, LabelStderr: t.Jobs > 1, commandFlags: t.commandFlags}
	if err := command.find(); err != nil {
		return err
	}
	// Each job has a session with each broker. A session has a socket, and some that go with it.
	sessions := t.Jobs * len(addresses)
	if err := zmq.SetMaxSockets(10 + 8*sessions); err != nil {
		return fmt.Errorf("allow for %d sessions: %w", sessions, err)
	}
	defer zmq.Term() // waits until the last reply and DISCONNECT have left

	endpoints := endpointsOf(addresses)
	log.Info("service started", "version", buildVersion(), "command", strings.Join(t.Command, " "), "jobs", t.Jobs, "broker", endpoints)
	free, ended, allEnded := newSlots(), make(chan error), make(chan struct{})
	var jobs sync.WaitGroup
	for i := range t.Jobs {
		jobs.Go(func() {
			slot, closeSlot := t.open(stop, command, endpoints, log)
			defer closeSlot()
			free.put(slot)
			for _, address := range addresses {
				job := &Service{Name: t.Name, Broker: address, Slots: free, Cancel: t.Cancel, heartbeatFlags: t.heartbeatFlags}
				job.logTo(log, i == 0, len(addresses) > 1)
				go func() { ended <- job.Serve(stop) }()
			}
			<-allEnded // Until then, sessions of other jobs may need the slot.
		})
	}
	for range sessions {
		if failed := <-ended; failed != nil {
			err = failed
			endSoon()
		}
	}
	close(allEnded)
	jobs.Wait()
	log.Info("service stopped")
	var second *failure
	if err == nil && errors.As(context.Cause(abort), &second) {
		return second
	}
	return err
}

// check rejects flags and arguments that make no sense together.
func (t *serviceTool) check() error {
	const example = "bservice ls-service ls"
	switch {
	case t.Name == "":
		return misuse(example, "no service name")
	case len(t.Command) == 0:
		return misuse(example, "no command for %s", t.Name)
	case isManagement(t.Name):
		return misuse(example, "%s: names that begin with %s are the broker's own", t.Name, mmiPrefix)
	case t.Jobs < 0 || t.Jobs > maxServiceJobs:
		return misuse("0 is one per core", "--jobs must be 0 to %d, not %d", maxServiceJobs, t.Jobs)
	case t.Null && !t.Coproc:
		return misuse("NUL bytes end the requests of a coprocess", "--null needs --coproc")
	case t.SkipLines < 0:
		return misuse("--skip-lines 1", "--skip-lines must be 0 or more, not %d", t.SkipLines)
	case t.SkipLines > 0 && !t.Coproc:
		return misuse("it is for the first lines of a coprocess", "--skip-lines needs --coproc")
	case t.Coproc && t.Stdin:
		return misuse("a request is a line of its input", "--coproc and --stdin can't be used together")
	case t.Coproc && t.StderrTo == "reply":
		return misuse("--stderr log or merge", "--stderr reply can't be used with --coproc, whose standard error belongs to no request")
	}
	return nil
}

// open returns the slot of a job, which has a process with --coproc, and what closes it.
func (t *serviceTool) open(stop context.Context, command *CmdService, endpoints string, log *slog.Logger) (slot Handler, closeSlot func()) {
	if !t.Coproc {
		return command.Handle, func() {}
	}
	process := &coprocess{CmdService: command, endpoints: endpoints, log: log, terminator: '\n', skipLines: t.SkipLines}
	if t.Null {
		process.terminator = 0
	}
	process.open(stop)
	return process.Handle, process.close
}

// A Handler answers one request of a broker. It is called for one request at a time.
type Handler func(Request) Reply

// A Request is what a broker wants to be done.
type Request struct {
	Broker  brokerAddress
	Token   string // names the request in logs, those of the broker included
	Body    [][]byte
	Stream  *stream         // takes output before the end; nil if the client takes none
	Context context.Context // done when nobody awaits the reply any more
}

// Service serves requests for a name through a broker, one at a time. It shares the slots in which
// commands run with others like it.
type Service struct {
	Name   string
	Broker brokerAddress
	Slots  *slots
	Cancel bool // end a command when nobody awaits the reply
	heartbeatFlags

	log        *slog.Logger // names the broker
	brokerLog  *slog.Logger // of the connection to the broker
	requestLog *slog.Logger

	nextNotice time.Time // when to say that no broker is there; zero while one is
}

// logTo sets where the service logs. What happens to a connection is for the first job of a broker to
// say: the others would say the same. Lines about requests name the broker if there are several.
func (s *Service) logTo(log *slog.Logger, first, several bool) {
	s.log = log.With("broker", s.Broker.endpoint)
	s.brokerLog, s.requestLog = slog.New(slog.DiscardHandler), log
	if first {
		s.brokerLog = s.log
	}
	if several {
		s.requestLog = s.log
	}
}

// Serve registers with the broker and serves until stop is done: then it finishes the request in
// hand, replies, and says DISCONNECT. It waits for a broker that is not there, and registers anew
// with one that was restarted or fell silent.
func (s *Service) Serve(stop context.Context) error {
	for stop.Err() == nil {
		begin := time.Now()
		// A broker that turns us away at once must not be asked again at once.
		pause := min(s.Heartbeat, time.Second)
		over, err := s.serveSession(stop)
		unreachable := errors.Is(err, errLookUp) || errors.Is(err, errPermission) // It may be reachable soon.
		switch {
		case err != nil && !unreachable:
			return err
		case stop.Err() != nil:
			return nil
		case unreachable:
			s.noticeMissing(begin, err)
		case isRefusal(over):
			pause = refusedPause
			s.brokerLog.Error("refused", "why", over, "again_in", pause, "hint", failureOf(over).hint)
		case over == errUnwanted:
			pause = 0
		case over != errMissing:
			s.brokerLog.Warn("connecting again", "why", over)
		}
		select {
		case <-time.After(time.Until(begin.Add(pause))):
		case <-stop.Done():
		}
	}
	return nil
}

// refusedPause is how long a service waits that its broker refused: somebody has to change what it may.
const refusedPause = 30 * time.Second

// isRefusal tells whether a session is over because of the keys.
func isRefusal(over error) bool {
	var f *failure
	return errors.As(over, &f) && (f.status == exitNotAllowed || f.status == exitProtocol)
}

// noticeMissing says that no broker can be reached, after a heartbeat and then every half minute. It
// tells whether it did.
func (s *Service) noticeMissing(now time.Time, why error) bool {
	if s.nextNotice.IsZero() {
		s.nextNotice = now.Add(s.Heartbeat)
	}
	if now.Before(s.nextNotice) {
		return false
	}
	s.nextNotice = now.Add(30 * time.Second)
	s.brokerLog.Warn("waiting for a broker", "why", why)
	return true
}

// serveSession is the loop around one session, on a new socket: an old one could deliver messages of
// an earlier session. It returns why the session is over, or nil after stop.
func (s *Service) serveSession(stop context.Context) (over, err error) {
	// Queue messages only for a broker that is there: heartbeats would pile up, and READY would arrive
	// too late to be true.
	immediate := func(s *socket) error { return s.SetImmediate(true) }
	broker, err := dial(stop, "bservice", s.Broker, immediate)
	if err != nil {
		return nil, err
	}
	defer broker.Close()
	waiter, err := newNetWaiter(broker.socket)
	if err != nil {
		return nil, err
	}
	defer waiter.Close()
	defer context.AfterFunc(stop, waiter.Wake)()

	// One goroutine answers all requests. A new one for each would have to grow its stack each time.
	answers, replies := make(chan func() [][]byte), make(chan [][]byte, 1)
	defer close(answers)
	go func() {
		for answer := range answers {
			replies <- answer()
			waiter.Wake()
		}
	}()
	current := &session{
		Service:  s,
		send:     broker.send,
		received: broker.received,
		wake:     waiter.Wake,
		start:    func(slot Handler, r Request) { answers <- func() [][]byte { return s.answer(slot, r) } },
	}
	stopping := false
	for {
		if err := waiter.Wait(current.Tick(time.Now())); err != nil {
			return nil, err
		}
		if broker.monitored {
			if err := broker.update(); err != nil {
				return nil, err
			}
			if broker.refused != nil && current.over == nil {
				current.end(broker.refused)
			}
		}
		if current.unsent() {
			current.Flush()
		}
		for broker.readable {
			frames, err := broker.receive()
			if err != nil {
				return nil, err
			}
			if frames == nil {
				break
			}
			current.Receive(frames)
		}
		if broker.broken {
			broker.broken = false // ZeroMQ connects again.
			current.Lose()
		}
		current.Start(time.Now())
		current.Claim(time.Now())
		select {
		case body := <-replies:
			length := sizeOf(body)
			current.Finish(body)
			freeMemory(length) // for the next one
		default:
		}

		switch {
		case current.working:
			// Even if the session is over: there is one command at a time.
			if stop.Err() != nil && !stopping {
				stopping = true
				s.requestLog.Info("waiting for a command", "request", tokenOf(current.address))
			}
		case current.over != nil:
			return current.over, nil
		case stop.Err() != nil:
			current.Leave()
			return nil, broker.SetLinger(time.Second)
		}
	}
}

// answer handles a request in a slot, logs it if it failed, was cancelled or if that is asked for, and returns
// the body of the reply.
func (s *Service) answer(slot Handler, r Request) [][]byte {
	begin := time.Now()
	reply := slot(r)
	body := reply.Body()
	level, message := slog.LevelDebug, "request done"
	if unwanted := context.Cause(r.Context); unwanted != nil {
		level, message, reply.Reason = slog.LevelInfo, "request cancelled", unwanted
	} else if reply.Status != 0 {
		level, message = slog.LevelWarn, "request failed"
	}
	if s.requestLog.Enabled(context.Background(), level) {
		out := sizeOf(body)
		if r.Stream != nil {
			out += r.Stream.passed()
		}
		log := s.requestLog.With("request", r.Token, "status", reply.Status, "took", time.Since(begin).Round(time.Microsecond), "in", sizeOf(r.Body), "out", out)
		if reply.Reason != nil {
			log = log.With("why", reply.Reason)
		}
		log.Log(context.Background(), level, message)
	}
	return body
}
