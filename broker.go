package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

const brokerUsage = `bbroker passes requests to services and replies back to those who asked.

Usage: bbroker [FLAGS] [start] [HOST] [PORT]

It listens on tcp://127.0.0.1:5555, prints the endpoint that it listens on once it
does, and runs until SIGTERM or SIGINT. Whoever reaches the endpoint can serve and
ask: open it to hosts that you trust.

  --host HOST            address or interface to listen on, * for all (127.0.0.1)
  --port PORT            0 takes any free port (5555)
  --broker ENDPOINT      listen here instead, tcp://HOST:PORT or ipc:///PATH; repeatable
  --heartbeat DURATION   send workers a heartbeat this often (1s)
  --liveness N           a worker silent for this many heartbeats is dead (5)
  --queue-ttl DURATION   how long a request waits for a service that nobody serves;
                         0 is for ever (1m)
  --max-queue N          how many requests wait for one service (100000)
  --max-memory SIZE      how many bytes of requests are held at a time (1G)
  --max-message SIZE     the longest frame that is taken (256M)
  --redeliver N          give the request of a worker that is lost to another, so many
                         times; commands may run twice (0)
  --grace DURATION       when stopped, wait so long for replies (5s)
  -q, --quiet            log errors only
  -v, --verbose          log each message
  -h, --help
  --version

Durations have a unit or are seconds: 500ms, 2.5, 1m. Sizes are bytes, or K, M or G of
1024. A second signal ends it at once.

Environment, where no flag says otherwise:
  BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER    as --host, --port, --broker

Exit status:
  0      stopped by SIGTERM or SIGINT
  64     wrong usage
  69     it cannot listen there; the port is in use, perhaps
  74     the endpoint could not be printed

It answers these names itself:
  mmi.service NAME       200 when somebody serves the name, 404 when nobody does
  mmi.services           a table of the services
  mmi.metrics            what happened so far, as Prometheus reads it
  mmi.cancel             drops the requests of the same client that still wait

Examples:
  $ bbroker &
  $ bbroker --host 0.0.0.0 --port 6000
  $ bbroker --broker ipc:///run/backbone.sock --broker tcp://127.0.0.1:5555
  $ bbroker --port 0 >endpoint &
  $ brequest -n mmi.services
`

type brokerTool struct {
	commonFlags
	brokerRules
	MaxMessage size     `default:"256M"`
	Grace      duration `default:"5s"`
	Where      []string `arg:"" optional:""`
}

// AfterApply takes HOST and PORT where Dispatchr Backbone took them, after the word
// that its broker was started with.
func (t *brokerTool) AfterApply() error {
	where := t.Where
	if len(where) > 0 && where[0] == "start" {
		where = where[1:]
	}
	for _, flag := range []*string{&t.Host, &t.Port} {
		if len(where) > 0 {
			if *flag != "" {
				return fmt.Errorf("both %s and %s given", *flag, where[0])
			}
			*flag, where = where[0], where[1:]
		}
	}
	if len(where) > 0 {
		return fmt.Errorf("unexpected argument %s", where[0])
	}
	return nil
}

func (t *brokerTool) Run() error {
	endpoints, err := t.endpoints()
	if err != nil {
		return err
	}
	level := slog.LevelInfo
	switch {
	case t.Quiet:
		level = slog.LevelError
	case t.Verbose:
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))

	// Replies and DISCONNECTs to those who read them are on their way in less than a
	// second; those who do not read cannot hold up the end.
	defer zmq.Term()
	socket, bound, err := listen(endpoints, t.MaxMessage)
	if err != nil {
		return err
	}
	defer removeSockets(bound)
	defer socket.Close()
	if err := output(strings.Join(bound, "\n") + "\n"); err != nil {
		return err
	}

	stop, cancel := context.WithCancel(context.Background())
	restore := onSignals(func(os.Signal) { cancel() })
	context.AfterFunc(stop, restore) // a second signal ends the process at once
	return serve(stop, socket, t.brokerRules, time.Duration(t.Grace), log)
}

// listen returns a ROUTER that is bound to the endpoints, and what it is bound to.
func listen(endpoints []string, maxMessage size) (*socket, []string, error) {
	socket, err := newSocket(zmq.ROUTER)
	if err != nil {
		return nil, nil, err
	}
	err = errors.Join(
		// A message to a peer that is gone fails, instead of vanishing.
		socket.SetRouterMandatory(1),
		// What a client has not read yet; it may have many requests in flight. Beyond
		// it the client loses its replies, and nobody waits for it.
		socket.SetSndhwm(10_000),
		// What one peer has sent that is not yet received; beyond it TCP slows it down.
		socket.SetRcvhwm(1000),
		// The connection of a peer that sends a longer frame is closed before the frame
		// takes memory.
		socket.SetMaxmsgsize(int64(maxMessage)),
		socket.SetBacklog(1024),
		socket.SetLinger(time.Second),
		socket.watch(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL|zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
	)
	if err != nil {
		socket.Close()
		return nil, nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	var bound []string
	for _, endpoint := range endpoints {
		actual, err := bind(socket, endpoint)
		if err != nil {
			socket.Close()
			removeSockets(bound)
			return nil, nil, err
		}
		bound = append(bound, actual)
	}
	return socket, bound, nil
}

// bind returns the endpoint that the socket is really bound to: port 0 has become
// a port.
func bind(socket *socket, endpoint string) (string, error) {
	if err := setTransport(socket, endpoint); err != nil {
		return "", fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	err := error(zmq.Errno(syscall.EADDRINUSE))
	if !ipcInUse(endpoint) {
		err = socket.Bind(endpoint)
	}
	if zmq.AsErrno(err) == zmq.Errno(syscall.ENODEV) {
		// ZeroMQ knows addresses and interfaces here, but no names.
		if address, e := lookUp(context.Background(), endpoint); e == nil {
			err = socket.Bind(address)
		}
	}
	if err == nil {
		return socket.GetLastEndpoint()
	}
	f := &failure{status: exitUnavailable, err: fmt.Errorf("listen on %s: %w", endpoint, err)}
	switch zmq.AsErrno(err) {
	case zmq.Errno(syscall.EADDRINUSE):
		f.hint = "another broker is there already, perhaps; --port 0 takes any free port"
	case zmq.Errno(syscall.ENODEV):
		f.status, f.hint = exitUsage, "an address, name or interface of this host, or * for all of them"
	case zmq.Errno(syscall.EINVAL):
		f.status, f.hint = exitUsage, endpointHint
	}
	return "", f
}

// ipcInUse tells whether somebody listens on an ipc:// endpoint: ZeroMQ would take
// the path away from under them without a word.
func ipcInUse(endpoint string) bool {
	path, ok := strings.CutPrefix(endpoint, "ipc://")
	if !ok {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// removeSockets takes away what ZeroMQ leaves behind of ipc:// endpoints.
func removeSockets(endpoints []string) {
	for _, endpoint := range endpoints {
		if path, ok := strings.CutPrefix(endpoint, "ipc://"); ok {
			os.Remove(path)
		}
	}
}

// serve is the loop around a Broker: it owns the socket and the clock. Once stop is
// done it drains the broker, for as long as grace at most, and returns nil.
func serve(stop context.Context, socket *socket, rules brokerRules, grace time.Duration, log *slog.Logger) error {
	bell := newThreadBell()
	defer context.AfterFunc(stop, bell.Ring)()

	broker := NewBroker(rules, time.Now(), socket.send, log)
	var end time.Time // of the grace, once it has begun
	for {
		now := time.Now()
		deadline := broker.Tick(now)
		if stop.Err() != nil && end.IsZero() {
			broker.Drain()
			end = now.Add(grace)
		}
		if !end.IsZero() {
			if broker.Drained() || !now.Before(end) {
				broker.Stop()
				return nil
			}
			if end.Before(deadline) {
				deadline = end
			}
		}
		message, news, err := bell.Wait(socket, deadline)
		if err != nil {
			return err
		}
		for news {
			event, err := socket.event()
			if err != nil {
				return err
			}
			if news = event != 0; news {
				broker.warn("handshake", "a connection that does not speak ZeroMQ, or gave up")
			}
		}
		// A flood of messages must not keep the heartbeats from going out.
		for n := 0; message && n < 1000; n++ {
			frames, err := socket.receive()
			if err != nil {
				return err
			}
			if frames == nil {
				break
			}
			length := sizeOf(frames)
			broker.Receive(frames, time.Now())
			freeIfLarge(length) // its room may be wanted for the next
		}
	}
}
