package main

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
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

// Broker is the broker of MDP/0.1 (RFC 7) as a state machine: Receive and Tick are
// its events, the messages that it sends are its actions, and it knows no socket and
// no clock. It belongs to one goroutine.
//
// For each service either workers are idle or requests wait, never both. A request
// that was taken is either waiting or in the hands of one worker, until it ends:
// by a reply, or by its client's cancel.
type Broker struct {
	brokerRules
	send func(frames [][]byte) error // the identity first; fails at once, perhaps with errWouldBlock
	log  *slog.Logger

	// debug tells whether the log takes lines for single requests: making them costs more
	// than the rest of the work.
	debug bool

	services map[string]*service
	workers  map[string]*worker    // by identity
	waiting  map[string]*list.List // of *request, by the identity of the client
	tokens   tokens
	held     size // of all requests that have not ended
	open     int  // how many those are
	draining bool

	born, now, due time.Time // due is the next heartbeat
	total          tally
	warned         map[string]bool // what the log has about already
	forgive        time.Time       // when it may have it again
}

// brokerRules are the flags that the state machine goes by.
type brokerRules struct {
	heartbeatFlags
	QueueTTL  duration `default:"1m"`
	MaxQueue  uint     `default:"100000"`
	MaxMemory size     `default:"1G"`
	Redeliver uint     `default:"0"`
}

// A service is there while it has workers or waiting requests.
type service struct {
	name     string
	workers  int
	idle     list.List // of *worker, the least recently used first
	waiting  list.List // of *request, the oldest first
	orphaned time.Time // when it lost its last worker
	tally    tally
}

// A worker serves one service, one request at a time.
type worker struct {
	identity string
	address  [][]byte // which is that identity
	service  *service
	request  *request      // what it works on, nil when idle
	place    *list.Element // among the idle, nil when busy
	silence  int           // heartbeats since it was last heard
	age      int           // heartbeats since it got its request
	attends  bool          // it was heard while busy; many workers cannot be
}

// A request lives from its arrival to its end.
type request struct {
	service *service
	frame   []byte   // the service's name, for the reply
	client  [][]byte // the client's address stack, its identity first
	body    [][]byte
	token   []byte // stands for the client towards the worker

	arrived, started time.Time
	redelivered      uint
	queued, owned    *list.Element // its places in the queues of service and client, nil when in flight
}

// size is what the broker holds of it: a client's address may be long, too.
func (r *request) size() size {
	return sizeOf(r.client) + size(len(r.frame)) + sizeOf(r.body)
}

func NewBroker(rules brokerRules, now time.Time, send func(frames [][]byte) error, log *slog.Logger) *Broker {
	return &Broker{
		brokerRules: rules,
		send:        send,
		log:         log,
		debug:       log.Enabled(context.Background(), slog.LevelDebug),
		services:    map[string]*service{},
		workers:     map[string]*worker{},
		waiting:     map[string]*list.List{},
		tokens:      tokens{run: fmt.Sprintf("%08x.", rand.Uint32())},
		born:        now,
		now:         now,
		due:         now,
		warned:      map[string]bool{},
	}
}

// Receive takes a message as the ROUTER gives it, the identity of the peer first.
func (b *Broker) Receive(frames [][]byte, now time.Time) {
	if len(frames) == 0 {
		return
	}
	b.now = now
	peer := frames[0]
	m, err := Parse(frames[1:])
	if err == nil && m.Kind != KindClient && len(m.Address) > 0 {
		err = fmt.Errorf("%v: a worker has no address but its identity", m.Kind)
	}
	if err != nil {
		b.warn("peer "+string(peer), "bad message", "peer", string(peer), "why", err)
		return
	}
	if b.debug {
		b.log.Debug("message", "peer", string(peer), "kind", m.Kind, "service", string(m.Service), "frames", len(m.Body))
	}
	if m.Kind == KindClient {
		b.receiveClient(frames[:1+len(m.Address)], m)
	} else {
		b.receiveWorker(peer, m)
	}
}

func (b *Broker) receiveClient(client [][]byte, m Message) {
	if isOurs(m.Service) {
		b.reply(client, m.Service, [][]byte{b.manage(string(m.Service), client, m.Body)})
		return
	}
	s := b.service(m.Service)
	r := &request{service: s, frame: m.Service, client: client, body: m.Body, token: b.tokens.next(), arrived: b.now}
	b.open++
	b.held += r.size()
	b.count(s, requests, 1)
	b.count(s, bytesIn, uint64(sizeOf(r.body)))
	switch {
	case b.draining:
		b.refuse(r, "the broker is shutting down")
	case b.held > b.MaxMemory:
		b.refuse(r, "the broker holds as many bytes as it may")
	case b.give(r):
	case s.waiting.Len() >= int(b.MaxQueue):
		b.refuse(r, "the queue is full")
	default:
		b.enqueue(r, s.waiting.PushBack)
	}
	b.settle(s)
}

func (b *Broker) receiveWorker(identity []byte, m Message) {
	w, known := b.workers[string(identity)]
	if !known {
		switch m.Kind {
		case KindReady:
			b.register(identity, m.Service)
		case KindDisconnect: // and gone
		default:
			// It registered with another broker, this one before its restart perhaps, or
			// was given up. DISCONNECT makes it register anew.
			b.sendWorker([][]byte{identity}, Message{Kind: KindDisconnect})
		}
		return
	}

	w.silence = 0
	switch m.Kind {
	case KindHeartbeat:
		// It may have crossed the request on its way. Only later ones tell.
		w.attends = w.attends || w.request != nil && w.age > 1
	case KindReply:
		r := w.request
		if r == nil || len(m.Client) != 1 || string(m.Client[0]) != string(r.token) {
			b.expel(w, "a reply to a request that it does not have")
			break
		}
		b.count(w.service, replies, 1)
		if _, _, status, ok := parseStatusReply(m.Body); ok && status != 0 {
			b.count(w.service, failures, 1)
		}
		b.observe(w.service, served, b.now.Sub(r.started))
		if b.debug {
			b.log.Debug("request done", "request", string(r.token), "service", w.service.name, "took", b.now.Sub(r.started))
		}
		b.finish(r, m.Body)
		b.rest(w)
	case KindDisconnect:
		b.log.Info("worker left", "worker", w.identity, "service", w.service.name, "why", "it said DISCONNECT")
		// It would have replied had it started on its request; the next one will.
		if r := b.remove(w); r != nil {
			b.enqueue(r, w.service.waiting.PushFront)
		}
	default:
		b.expel(w, fmt.Sprintf("an unexpected %v", m.Kind))
	}
	b.settle(w.service)
}

func (b *Broker) register(identity, name []byte) {
	w := &worker{identity: string(identity), address: [][]byte{bytes.Clone(identity)}}
	if isOurs(name) {
		b.warn("peer "+w.identity, "worker refused", "worker", w.identity, "service", string(name), "why", "the name is the broker's own")
		b.sendWorker(w.address, Message{Kind: KindDisconnect})
		return
	}
	b.log.Info("worker came", "worker", w.identity, "service", string(name))
	w.service = b.service(name)
	w.service.workers++
	b.workers[w.identity] = w
	b.rest(w)
	b.settle(w.service)
}

// service returns the service of that name, a new one if there is none.
func (b *Broker) service(name []byte) *service {
	s, ok := b.services[string(name)]
	if !ok {
		s = &service{name: string(name)}
		b.services[s.name] = s
	}
	return s
}

// rest makes a worker idle, and the last one to be used.
func (b *Broker) rest(w *worker) {
	w.request = nil
	w.place = w.service.idle.PushBack(w)
}

// enqueue puts a request into the queue of its service, at the end that push puts it.
func (b *Broker) enqueue(r *request, push func(any) *list.Element) {
	r.queued = push(r)
	identity := string(r.client[0])
	own, ok := b.waiting[identity]
	if !ok {
		own = list.New()
		b.waiting[identity] = own
	}
	r.owned = own.PushBack(r)
}

func (b *Broker) dequeue(r *request) {
	r.service.waiting.Remove(r.queued)
	identity := string(r.client[0])
	own := b.waiting[identity]
	own.Remove(r.owned)
	if own.Len() == 0 {
		delete(b.waiting, identity)
	}
	r.queued, r.owned = nil, nil
}

// give gives a request to an idle worker, and tells whether there was one.
func (b *Broker) give(r *request) bool {
	s := r.service
	for s.idle.Len() > 0 {
		w := s.idle.Front().Value.(*worker)
		err := b.sendWorker(w.address, Message{Kind: KindRequest, Client: [][]byte{r.token}, Body: r.body})
		if err != nil {
			b.lose(w, err)
			continue
		}
		b.observe(s, waited, b.now.Sub(r.arrived))
		s.idle.Remove(w.place)
		w.request, w.place, w.age = r, nil, 0
		r.started = b.now
		if b.debug {
			b.log.Debug("request given", "request", string(r.token), "service", s.name, "client", string(r.client[0]), "worker", w.identity)
		}
		return true
	}
	return false
}

// settle ends whatever happened to a service: its waiting requests go to its idle
// workers for as long as there are both, and it is forgotten when it has neither
// workers nor requests.
func (b *Broker) settle(s *service) {
	for s.waiting.Len() > 0 {
		r := s.waiting.Front().Value.(*request)
		if !b.give(r) {
			return
		}
		b.dequeue(r)
	}
	if s.workers == 0 {
		delete(b.services, s.name)
	}
}

// Tick does what is due and returns the time of the next call.
func (b *Broker) Tick(now time.Time) time.Time {
	b.now = now
	if now.Before(b.due) {
		return b.due
	}
	b.due = now.Add(time.Duration(b.Heartbeat))
	for _, w := range b.workers {
		b.beat(w)
	}
	if b.QueueTTL > 0 {
		for _, s := range b.services {
			b.expire(s)
		}
	}
	if !now.Before(b.forgive) {
		clear(b.warned)
		b.forgive = now.Add(time.Minute)
	}
	return b.due
}

// beat is a heartbeat of the broker's as one worker sees it. How long a worker was
// silent is counted in them, so that a broker that stood still for a while blames
// nobody for it.
func (b *Broker) beat(w *worker) {
	w.age++
	if w.request == nil || w.attends {
		w.silence++
	}
	if w.silence > b.Liveness {
		b.expel(w, fmt.Sprintf("silent for %d heartbeats", b.Liveness))
	} else if err := b.sendWorker(w.address, Message{Kind: KindHeartbeat}); err != nil && err != errWouldBlock {
		b.lose(w, err) // one that would block is busy, and need not read
	}
	b.settle(w.service)
}

// expire ends the requests that have waited too long for a first worker to come, or
// for one to come back.
func (b *Broker) expire(s *service) {
	for s.workers == 0 && s.waiting.Len() > 0 {
		r := s.waiting.Front().Value.(*request)
		since := r.arrived
		if s.orphaned.After(since) {
			since = s.orphaned
		}
		if b.now.Sub(since) < time.Duration(b.QueueTTL) {
			break
		}
		b.warn("expired "+s.name, "requests expired", "service", s.name, "client", string(r.client[0]))
		b.count(s, expired, 1)
		b.dequeue(r)
		b.fail(r, exitUnavailable, fmt.Sprintf("no worker came within %v", time.Duration(b.QueueTTL)))
	}
	b.settle(s)
}

// expel disconnects a worker that broke the protocol or fell silent.
func (b *Broker) expel(w *worker, why string) {
	b.sendWorker(w.address, Message{Kind: KindDisconnect})
	b.lose(w, errors.New(why))
}

// lose gives a worker up. What it was working on may be done or half done: another
// worker gets it only where that was asked for, else the client learns of it at once.
func (b *Broker) lose(w *worker, why error) {
	r := b.remove(w)
	held := ""
	if r != nil {
		held = string(r.token)
	}
	b.log.Warn("worker lost", "worker", w.identity, "service", w.service.name, "request", held, "why", why)
	b.count(w.service, lostWorkers, 1)
	switch {
	case r == nil:
	case r.redelivered < b.Redeliver:
		r.redelivered++
		b.count(r.service, redelivered, 1)
		b.enqueue(r, r.service.waiting.PushFront)
	default:
		b.fail(r, exitUnavailable, "the worker was lost while it had the request; it may have been done")
	}
}

// remove forgets a worker and returns the request that it had, or nil.
func (b *Broker) remove(w *worker) *request {
	delete(b.workers, w.identity)
	w.service.workers--
	if w.service.workers == 0 {
		w.service.orphaned = b.now
	}
	if w.place != nil {
		w.service.idle.Remove(w.place)
	}
	return w.request
}

// refuse ends a request that may come again later.
func (b *Broker) refuse(r *request, why string) {
	b.warn("refused "+r.service.name, "requests refused", "service", r.service.name, "client", string(r.client[0]), "why", why)
	b.count(r.service, refused, 1)
	b.fail(r, exitTemporary, why)
}

// fail ends a request with a status reply of the broker's own.
func (b *Broker) fail(r *request, status int, why string) {
	b.finish(r, statusReply(nil, fmt.Appendf(nil, "bbroker: %s: %s\n", r.service.name, why), status))
}

// finish ends a request with a reply. A client that is gone, or does not read, loses
// it, and nobody else waits.
func (b *Broker) finish(r *request, body [][]byte) {
	b.end(r)
	if err := b.reply(r.client, r.frame, body); err != nil {
		b.count(r.service, droppedReplies, 1)
		b.log.Debug("reply dropped", "client", string(r.client[0]), "service", r.service.name, "why", err)
		return
	}
	b.count(r.service, bytesOut, uint64(sizeOf(body)))
}

// end is the end of every request that was taken.
func (b *Broker) end(r *request) {
	b.open--
	b.held -= r.size()
}

func (b *Broker) reply(client [][]byte, service []byte, body [][]byte) error {
	return b.send(Message{Address: client, Kind: KindClient, Service: service, Body: body}.Frames())
}

// sendWorker sends a message to a worker. An error means that the worker is unreachable,
// or that it does not read.
func (b *Broker) sendWorker(address [][]byte, m Message) error {
	m.Address = address
	return b.send(m.Frames())
}

// Drain makes the broker refuse new requests and those that wait.
func (b *Broker) Drain() {
	b.draining = true
	for _, s := range b.services {
		for s.waiting.Len() > 0 {
			r := s.waiting.Front().Value.(*request)
			b.dequeue(r)
			b.refuse(r, "the broker is shutting down")
		}
		b.settle(s)
	}
}

// Drained tells whether every request has ended.
func (b *Broker) Drained() bool { return b.open == 0 }

// Stop answers every request that is left and says DISCONNECT to every worker. The
// broker is of no use afterwards.
func (b *Broker) Stop() {
	b.Drain()
	for _, w := range b.workers {
		b.sendWorker(w.address, Message{Kind: KindDisconnect})
		if r := b.remove(w); r != nil {
			b.refuse(r, "the broker is shutting down; the request may have been done")
		}
		b.settle(w.service)
	}
}

// warn logs what could come again and again, from strangers too: the same once a
// minute, and so many different ones.
func (b *Broker) warn(what, message string, attrs ...any) {
	const most = 100
	if b.warned[what] || len(b.warned) > most {
		return
	}
	b.warned[what] = true
	if len(b.warned) > most {
		b.log.Warn("too many different warnings, silent for up to a minute")
		return
	}
	b.log.Warn(message, attrs...)
}

func sizeOf(body [][]byte) size {
	n := 0
	for _, frame := range body {
		n += len(frame)
	}
	return size(n)
}

// tokens are the names of requests towards workers: printable, and no two alike, in
// this run of the broker and by all odds in any.
type tokens struct {
	run   string
	count uint64
}

func (t *tokens) next() []byte {
	t.count++
	return strconv.AppendUint([]byte(t.run), t.count, 10)
}

// From here on: what a person can see of the broker.

// manage answers a request to the broker itself (RFC 8, and more).
func (b *Broker) manage(name string, client, body [][]byte) []byte {
	switch name {
	case mmiService:
		if len(body) != 1 {
			return []byte(mmiBadRequest)
		}
		s, ok := b.services[string(body[0])]
		return found(ok && s.workers > 0)
	case mmiCancel:
		return found(b.cancel(client) > 0)
	case mmiServices:
		return b.table()
	case mmiMetrics:
		return b.metrics()
	}
	return []byte(mmiNotImplemented)
}

// isOurs tells whether a name is one that only the broker answers.
func isOurs(name []byte) bool { return bytes.HasPrefix(name, []byte(mmiPrefix)) }

func found(yes bool) []byte {
	if yes {
		return []byte(mmiFound)
	}
	return []byte(mmiNotFound)
}

// cancel drops the waiting requests of a client and returns how many. They are those
// whose address begins with the client's: it may have put frames of its own behind,
// and others may share its identity behind a proxy.
func (b *Broker) cancel(client [][]byte) (dropped int) {
	own, ok := b.waiting[string(client[0])]
	if !ok {
		return 0
	}
	for e := own.Front(); e != nil; {
		r := e.Value.(*request)
		e = e.Next()
		if len(r.client) < len(client) || !slices.EqualFunc(r.client[:len(client)], client, bytes.Equal) {
			continue
		}
		b.dequeue(r)
		b.end(r)
		b.count(r.service, cancelled, 1)
		b.settle(r.service)
		dropped++
	}
	return dropped
}

// A tally is what happened to one service, or to all there ever were.
type tally struct {
	counts [len(counters)]uint64
	times  [len(durations)]histogram
}

type counter int

const (
	requests counter = iota
	replies
	failures
	lostWorkers
	redelivered
	refused
	expired
	cancelled
	droppedReplies
	bytesIn
	bytesOut
)

// A metric is a name and a help text as Prometheus wants them.
type metric struct{ name, help string }

var counters = [...]metric{
	requests:       {"requests_total", "Requests that came from clients."},
	replies:        {"replies_total", "Replies that came from workers."},
	failures:       {"failures_total", "Replies that told of a failed command."},
	lostWorkers:    {"lost_workers_total", "Workers that were gone or silent or broke the protocol."},
	redelivered:    {"redelivered_total", "Requests of lost workers that were given to another."},
	refused:        {"refused_total", "Requests refused with status 75."},
	expired:        {"expired_total", "Requests that no worker came for."},
	cancelled:      {"cancelled_total", "Requests that their client gave up before they began."},
	droppedReplies: {"dropped_replies_total", "Replies whose client was gone or did not read."},
	bytesIn:        {"request_bytes_total", "Bytes in the bodies of requests."},
	bytesOut:       {"reply_bytes_total", "Bytes in the bodies of replies that were sent."},
}

const (
	waited = iota
	served
)

var durations = [...]metric{
	waited: {"wait_seconds", "Time from a request's arrival to its worker."},
	served: {"serve_seconds", "Time from a request's worker to its reply."},
}

func (b *Broker) count(s *service, c counter, n uint64) {
	b.total.counts[c] += n
	s.tally.counts[c] += n
}

func (b *Broker) observe(s *service, which int, d time.Duration) {
	b.total.times[which].observe(d)
	s.tally.times[which].observe(d)
}

// A histogram counts durations up to each of its bounds, in seconds.
type histogram struct {
	buckets [len(bounds)]uint64
	count   uint64
	sum     time.Duration
}

var bounds = [...]float64{0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300}

func (h *histogram) observe(d time.Duration) {
	h.count++
	h.sum += d
	if i, _ := slices.BinarySearch(bounds[:], d.Seconds()); i < len(bounds) {
		h.buckets[i]++
	}
}

// sorted are the services by name.
func (b *Broker) sorted() []*service {
	return slices.SortedFunc(maps.Values(b.services), func(x, y *service) int { return strings.Compare(x.name, y.name) })
}

// table is the reply to mmi.services: a line for each, with a header. Names that would
// break a line are quoted.
func (b *Broker) table() []byte {
	out := []byte("service\tworkers\tidle\twaiting\tin flight\tserved\tfailed\n")
	for _, s := range b.sorted() {
		out = fmt.Appendf(out, "%s\t%d\t%d\t%d\t%d\t%d\t%d\n", printable(s.name), s.workers, s.idle.Len(), s.waiting.Len(),
			s.workers-s.idle.Len(), s.tally.counts[replies], s.tally.counts[failures])
	}
	return out
}

// A view is what the metrics tell of one service, or of all of them together.
type view struct {
	label                  string // of the service, or empty
	workers, idle, waiting int
	*tally
}

// metrics is the reply to mmi.metrics: Prometheus' text format. What ends in _total or
// is a histogram of a service begins anew when the service was gone for a while; the
// broker's own go on.
func (b *Broker) metrics() []byte {
	all := view{workers: len(b.workers), tally: &b.total}
	var each []view
	for _, s := range b.sorted() {
		label := fmt.Sprintf(`service="%s"`, labelEscaper.Replace(strings.ToValidUTF8(s.name, "\uFFFD")))
		each = append(each, view{label, s.workers, s.idle.Len(), s.waiting.Len(), &s.tally})
		all.idle += s.idle.Len()
		all.waiting += s.waiting.Len()
	}

	var out []byte
	head := func(kind, name, help string) {
		out = fmt.Appendf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	// family writes one metric: of the broker, and of each service.
	family := func(kind string, m metric, sample func(name string, v view)) {
		head(kind, "backbone_"+m.name, m.help)
		sample("backbone_"+m.name, all)
		head(kind, "backbone_service_"+m.name, m.help)
		for _, v := range each {
			sample("backbone_service_"+m.name, v)
		}
	}
	number := func(kind string, m metric, value func(v view) uint64) {
		family(kind, m, func(name string, v view) {
			out = fmt.Appendf(out, "%s%s %d\n", name, labels(v.label), value(v))
		})
	}

	head("gauge", "backbone_uptime_seconds", "Time since the broker began.")
	out = fmt.Appendf(out, "backbone_uptime_seconds %g\n", b.now.Sub(b.born).Seconds())
	number("gauge", metric{"workers", "Workers that are registered."}, func(v view) uint64 { return uint64(v.workers) })
	number("gauge", metric{"idle_workers", "Workers without a request."}, func(v view) uint64 { return uint64(v.idle) })
	number("gauge", metric{"queue_length", "Requests that wait for a worker."}, func(v view) uint64 { return uint64(v.waiting) })
	for c, m := range counters {
		number("counter", m, func(v view) uint64 { return v.counts[c] })
	}
	for d, m := range durations {
		family("histogram", m, func(name string, v view) {
			h, below := &v.times[d], uint64(0)
			for i, bound := range bounds {
				below += h.buckets[i]
				out = fmt.Appendf(out, "%s_bucket%s %d\n", name, labels(v.label, fmt.Sprintf(`le="%g"`, bound)), below)
			}
			out = fmt.Appendf(out, "%s_bucket%s %d\n", name, labels(v.label, `le="+Inf"`), h.count)
			out = fmt.Appendf(out, "%s_sum%s %g\n", name, labels(v.label), h.sum.Seconds())
			out = fmt.Appendf(out, "%s_count%s %d\n", name, labels(v.label), h.count)
		})
	}
	return out
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// labels are those that are not empty, in braces.
func labels(some ...string) string {
	some = slices.DeleteFunc(some, func(label string) bool { return label == "" })
	if len(some) == 0 {
		return ""
	}
	return "{" + strings.Join(some, ",") + "}"
}
