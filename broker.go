package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

const brokerUsage = `bbroker passes requests to services, and their replies back to the clients.

Usage: bbroker [FLAGS] [start] [HOST] [PORT]

It listens on tcp://127.0.0.1:5555, prints the endpoint once it listens, and runs until
SIGTERM or SIGINT. Without --key, whoever can reach the endpoint can serve and call.

  --host HOST            address or interface to listen on, * for all (127.0.0.1)
  -p, --port PORT        port to listen on, 0 for any free one (5555)
  -b, --broker ENDPOINT  listen here instead, tcp://HOST:PORT or ipc:///PATH; may be
                         repeated
  --key FILE             secret key of the broker: tcp endpoints admit only known keys
  --authorized FILE      which keys are known, and what each may do
  --heartbeat DURATION   send workers a heartbeat this often (1s)
  --liveness N           give a worker up that has been silent for N heartbeat
                         intervals (5)
  --queue-ttl DURATION   let a request wait this long for a service that nobody serves;
                         0 waits for ever (1m)
  --max-queue N          let up to N requests wait for one service (100000)
  --max-memory SIZE      hold up to this many bytes of requests and unread replies (1G)
  --max-message SIZE     refuse frames that are longer (256M)
  --redeliver N          give the request of a lost worker to another one, up to N
                         times; its command may then run twice (0)
  --grace DURATION       when stopped, wait this long for replies (5s)
  -q, --quiet            log errors only
  -v, --verbose          log each message
  -h, --help
  --version

A duration has a unit, or is in seconds: 500ms, 2.5, 1m. A size is in bytes, or has K, M
or G for powers of 1024. BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER, BACKBONE_KEY and
BACKBONE_AUTHORIZED set the defaults of their flags. A second signal ends the broker.

A line of the file of --authorized is for a key, or * for everybody else; SIGHUP makes
the broker read it again. The names of services may be patterns:
  KEY NAME [call=SERVICE,...] [serve=SERVICE,...] [manage | all]

Exit status:
  0      stopped by SIGTERM or SIGINT
  64     wrong usage
  69     it cannot listen there; the port may be in use
  74     the endpoint could not be printed

The broker itself answers these names:
  mmi.service NAME       200 if somebody serves NAME, 404 if nobody does
  mmi.services           a table of the services
  mmi.metrics            what happened so far, in Prometheus' text format
  mmi.cancel             cancels the client's waiting requests and its running streams
  mmi.credit N           lets the client's stream send N more parts

Examples:
  $ bbroker &
  $ bbroker --host 0.0.0.0 --key broker.key --authorized authorized
  $ bbroker --broker ipc:///run/backbone.sock --broker tcp://127.0.0.1:5555
  $ bbroker --port 0 >endpoint &
  $ brequest -n mmi.services
`

type brokerTool struct {
	commonFlags
	brokerFlags
	MaxMessage size          `default:"256M"`
	Grace      time.Duration `default:"5s"`
	Authorized string
	Where      []string `arg:"" optional:""`
}

// AfterApply takes HOST and PORT as Dispatchr Backbone did, after the word "start".
func (t *brokerTool) AfterApply() error {
	where := t.Where
	if len(where) > 0 && where[0] == "start" {
		where = where[1:]
	}
	if len(where) > 0 && slices.Contains([]string{"stop", "restart", "reload", "status"}, where[0]) {
		return fmt.Errorf("%q is not a command: send the process SIGTERM to stop it; brequest --list shows what it serves", where[0])
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
	for _, endpoint := range endpoints {
		if endpoint, _, hasKey := strings.Cut(endpoint, "#"); hasKey && isTCP(endpoint) {
			return misuse("leave it out: --key FILE is the key of the broker", "an endpoint to listen on has no #KEY: %s", endpoint)
		}
	}
	stderr := newLogWriter(os.Stderr)
	defer stderr.Close()
	log := newLog(stderr, &t.commonFlags)

	// Closing waits up to a second, the linger, for replies and DISCONNECTs to leave.
	defer zmq.Term()
	guard, err := t.guard(endpoints, log)
	if err != nil {
		return err
	}
	stops := stopSignals
	if guard != nil {
		// SIGHUP reads the file of --authorized again, as soon as anybody knows that the broker listens.
		stops = slices.DeleteFunc(slices.Clone(stops), func(s syscall.Signal) bool { return s == syscall.SIGHUP })
		defer guard.onHangup()()
		defer guard.handler.Close()
	}
	router, bound, err := listen(endpoints, t.MaxMessage, guard)
	if err != nil {
		return err
	}
	defer removeSockets(bound)
	defer router.Close()
	if err := printOutput(strings.Join(bound, "\n") + "\n"); err != nil {
		return err
	}
	log.Info("broker started", "version", buildVersion(), "endpoints", strings.Join(bound, " "), "max_memory", t.MaxMemory,
		"max_message", t.MaxMessage, "max_queue", t.MaxQueue, "queue_ttl", t.QueueTTL, "open_files", openFiles())

	if guard == nil {
		warnOfStrangers(log, bound)
	}
	stop, cancel := context.WithCancel(context.Background())
	defer onSignals(stops, func(syscall.Signal) { cancel() })()
	return runBroker(stop, router, t.brokerFlags, t.Grace, guard, log)
}

// guard returns what decides who may connect to TCP endpoints, nil without keys.
func (t *brokerTool) guard(endpoints []string, log *slog.Logger) (*guard, error) {
	key, keySource, err := t.key()
	if err != nil {
		return nil, err
	}
	fileSource, file := setBy("--authorized", t.Authorized, "BACKBONE_AUTHORIZED")
	switch {
	case key == nil && file == "":
		return nil, nil
	case key == nil:
		return nil, misuse("backbone --keygen FILE makes a key", "%s needs --key FILE, the secret key of the broker", fileSource)
	case file == "":
		return nil, misuse("its lines are "+accessForm, "%s needs --authorized FILE, which says who may connect", keySource)
	case !slices.ContainsFunc(endpoints, isTCP):
		return nil, misuse("the permissions of the socket say who may connect", "%s needs a tcp:// endpoint: an ipc endpoint takes no keys", keySource)
	}
	return newGuard(key, file, log)
}

// warnOfStrangers logs a warning if hosts other than this one may reach a broker that takes no keys.
func warnOfStrangers(log *slog.Logger, bound []string) {
	for _, endpoint := range bound {
		host, _, _ := net.SplitHostPort(strings.TrimPrefix(endpoint, "tcp://"))
		if ip := net.ParseIP(host); ip != nil && !ip.IsLoopback() {
			log.Warn("whoever can reach this endpoint may call and serve: --key and --authorized limit that", "endpoint", endpoint)
			return
		}
	}
}

// listen returns a ROUTER that is bound to the endpoints, and what it is bound to. With a guard, which may
// be nil, TCP endpoints take keys only.
func listen(endpoints []string, maxMessage size, guard *guard) (*socket, []string, error) {
	router, err := newSocket(zmq.ROUTER)
	if err != nil {
		return nil, nil, err
	}
	router.lend()
	err = errors.Join(
		// A message to a peer that is gone fails, instead of vanishing.
		router.SetRouterMandatory(1),
		// Messages for one peer that it has not read; a client may have many requests in flight. A
		// client that lets more pile up loses its replies: the broker never waits for it.
		router.SetSndhwm(10_000),
		// Messages from one peer that are not yet received; beyond that, TCP slows it down.
		router.SetRcvhwm(1000),
		// The connection of a peer that sends a longer frame is closed before the frame takes
		// memory.
		router.SetMaxmsgsize(int64(maxMessage)),
		router.SetBacklog(spareFiles()),
		router.SetLinger(time.Second),
		router.watch(zmq.EVENT_ACCEPTED|zmq.EVENT_DISCONNECTED|zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL|zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
	)
	if err != nil {
		router.Close()
		return nil, nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	// An endpoint has the options that were set when it was bound: first those that take no keys.
	bound := make([]string, len(endpoints))
	bindAll := func(protocol string) (err error) {
		for i, endpoint := range endpoints {
			if err == nil && strings.HasPrefix(endpoint, protocol) {
				bound[i], err = bind(router, endpoint)
			}
		}
		return err
	}
	if guard != nil {
		err = router.admitBy(ipcDomain)
	}
	if err == nil {
		err = bindAll("ipc://")
	}
	if err == nil && guard != nil {
		err = errors.Join(router.admitBy(tcpDomain), router.useCurveServer(guard.key))
	}
	if err == nil {
		err = bindAll("tcp://")
	}
	if err != nil {
		router.Close()
		removeSockets(bound)
		return nil, nil, err
	}
	return router, bound, nil
}

// bind returns the endpoint that the socket is bound to, with the port that 0 has become.
func bind(router *socket, endpoint string) (string, error) {
	if err := setTransport(router, endpoint); err != nil {
		return "", fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	err := checkIPC(endpoint)
	if err == nil {
		err = router.Bind(endpoint)
	}
	if zmq.AsErrno(err) == zmq.Errno(syscall.ENODEV) {
		// ZeroMQ takes addresses and interfaces here, but no names.
		var address string
		if address, err = lookUp(context.Background(), endpoint); err == nil {
			err = setTransport(router, address)
		}
		if err == nil {
			err = router.Bind(address)
		}
	}
	if err == nil {
		return router.GetLastEndpoint()
	}
	// It may be possible later: a name may not be known yet, and an interface may not be there yet.
	f := &failure{status: exitUnavailable, err: fmt.Errorf("listen on %s: %w", endpoint, err)}
	switch {
	case errors.Is(err, errLookUp), zmq.AsErrno(err) == zmq.Errno(syscall.ENODEV), zmq.AsErrno(err) == zmq.Errno(syscall.EADDRNOTAVAIL):
		f.hint = "use an address, a name or an interface of this host, or * for all of them"
	case zmq.AsErrno(err) == zmq.Errno(syscall.EADDRINUSE):
		f.hint = "is another broker running? --port 0 takes any free port"
	case zmq.AsErrno(err) == zmq.Errno(syscall.EINVAL):
		f.status, f.hint = exitUsage, "an endpoint is "+endpointForm
	}
	return "", f
}

// checkIPC returns an error if the path of an ipc:// endpoint is in use: ZeroMQ would remove it in
// silence, another broker's socket and any other file alike.
func checkIPC(endpoint string) error {
	path, ok := strings.CutPrefix(endpoint, "ipc://")
	if !ok {
		return nil
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket == 0 {
		return errors.New("the file exists and is not a socket")
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		return zmq.Errno(syscall.EADDRINUSE)
	case errors.Is(err, fs.ErrPermission):
		return fs.ErrPermission
	}
	return nil
}

// removeSockets removes the files of ipc:// endpoints, which ZeroMQ leaves behind.
func removeSockets(endpoints []string) {
	for _, endpoint := range endpoints {
		if path, ok := strings.CutPrefix(endpoint, "ipc://"); ok {
			os.Remove(path)
		}
	}
}

// routerOutlet is the outlet of a broker that has a ROUTER.
type routerOutlet struct {
	*socket
	waker  *queueWaker
	update func() // tells the broker what happened to connections
}

func (r routerOutlet) send(frames [][]byte, queue peerQueue) error {
	counted, _ := queue.(*sendQueue)
	return r.sendCounted(frames, counted)
}

func (r routerOutlet) updateConnections()         { r.update() }
func (r routerOutlet) newQueue() peerQueue        { return newSendQueue(r.waker) }
func (r routerOutlet) queued() size               { return r.waker.queued() }
func (r routerOutlet) received(source int) uint64 { return bytesReceived(source) }

const (
	// maxTurn is how long the loop receives messages before it looks after heartbeats and signals.
	maxTurn = 5 * time.Millisecond

	// quietTime is how long a broker that stops waits for requests that are still on their way, so
	// that it refuses them, and none is lost.
	quietTime = 200 * time.Millisecond
)

// runBroker is the loop around a Broker: it owns the socket and the clock. When stop is done it drains
// the broker, for as long as grace at most, and returns nil.
func runBroker(stop context.Context, router *socket, flags brokerFlags, grace time.Duration, guard *guard, log *slog.Logger) error {
	waiter := newPollWaiter()
	defer context.AfterFunc(stop, waiter.Wake)()

	waker := newQueueWaker(waiter)
	defer waker.close()

	var broker *Broker
	var monitorErr error
	update := func() { monitorErr = errors.Join(monitorErr, reportConnections(router, broker)) }
	broker = NewBroker(flags, time.Now(), routerOutlet{router, waker, update}, log)
	guard.setWake(waiter.Wake)
	memory := newMemoryKeeper(flags.MaxMemory)
	sockets := []*socket{router}
	if guard != nil {
		sockets = append(sockets, guard.handler)
	}
	var graceEnd time.Time // zero until stop is done
	for {
		now := time.Now()
		if guard != nil { // What follows may send to peers.
			if err := reportConnections(router, broker); err != nil {
				return err
			}
		}
		if access := guard.access(); access != broker.access {
			broker.SetAccess(access)
			log.Info("read who is authorized", "file", guard.file, "keys", len(access.grants)) // and it counts now
			if len(access.grants) == 0 && access.anybody == nil {
				log.Warn("nobody is authorized: the file has no line", "file", guard.file)
			}
		}
		if stop.Err() != nil && graceEnd.IsZero() {
			broker.Drain()
			graceEnd = now.Add(grace)
			inFlight := broker.inFlight()
			log.Info("broker stopping", "in_flight", inFlight, "refused", broker.unfinished-inFlight, "grace", grace)
		}
		deadline := broker.Tick(now)
		memory.keep(broker.held, waker.queued())
		if !graceEnd.IsZero() {
			end := graceEnd
			if broker.Drained() {
				end = earlier(graceEnd, broker.lastRequest.Add(quietTime))
			}
			if !now.Before(end) {
				broker.Stop()
				log.Info("broker stopped", "uptime", now.Sub(broker.begin).Round(time.Second), "requests", broker.total.counts[requestsTotal], "replies", broker.total.counts[repliesTotal])
				return nil
			}
			deadline = earlier(deadline, end)
		}
		if err := waiter.Wait(deadline, sockets...); err != nil {
			return err
		}
		if waker.woken() {
			broker.ClientsHaveRead()
		}
		if router.monitored {
			if err := reportConnections(router, broker); err != nil {
				return err
			}
		}
		if guard != nil && guard.handler.readable {
			if err := admitPeers(router, broker, guard); err != nil {
				return err
			}
		}
		for begin, now := time.Now(), time.Now(); router.readable && now.Sub(begin) < maxTurn; now = time.Now() {
			frames, from, err := router.receiveFrom()
			if err != nil {
				return err
			}
			if frames == nil {
				break
			}
			broker.Receive(frames, from, now)
			if monitorErr != nil {
				return monitorErr
			}
			memory.passed(sizeOf(frames))
		}
	}
}

const maxBacklog = 1024 // connections that are not accepted yet

// spareFiles returns how many descriptors connections leave free. So many may be accepted at once. When
// there is no descriptor left, ZeroMQ tries again and again to accept the next connection, and on an
// ipc endpoint it ends the process.
func spareFiles() int { return min(openFiles()/2, maxBacklog) }

// openFiles returns how many descriptors the process may have.
func openFiles() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(limit.Cur)
}

// admitPeers answers what the guard is asked.
func admitPeers(router *socket, broker *Broker, guard *guard) error {
	for begin := time.Now(); time.Since(begin) < maxTurn; {
		question, err := guard.handler.receive()
		if err != nil || question == nil {
			return err
		}
		// The connection that is asked about was accepted before, so now it counts.
		if err := reportConnections(router, broker); err != nil {
			return err
		}
		if err := guard.handler.send(guard.answer(question, broker.accepted)); err != nil {
			return err
		}
	}
	return nil
}

// reportConnections tells the broker which connections the monitor saw begin, break or fail.
func reportConnections(router *socket, broker *Broker) error {
	for {
		event, source, err := router.event()
		switch {
		case err != nil || event == 0:
			return err
		case event == zmq.EVENT_ACCEPTED:
			broker.Accepted(source)
			if limit := openFiles(); source >= limit-spareFiles() { // It has the lowest descriptor that was free.
				syscall.Shutdown(source, syscall.SHUT_RDWR)
				broker.log.warn("open files", "connections refused", "why", "the limit of open files is near", "limit", limit)
			}
		case event == zmq.EVENT_DISCONNECTED:
			broker.Disconnected(source, time.Now())
		default:
			broker.log.warn("handshake", "a peer connected but did not complete the ZeroMQ handshake")
		}
	}
}
