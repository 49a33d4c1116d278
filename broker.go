package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
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
  -q, --quiet            log errors only
  -v, --verbose          log each message
  -h, --help
  --version

Durations have a unit or are seconds: 500ms, 2.5, 1m.

Environment, where no flag says otherwise:
  BACKBONE_HOST, BACKBONE_PORT, BACKBONE_BROKER    as --host, --port, --broker

Exit status:
  0      stopped by SIGTERM or SIGINT
  64     wrong usage
  69     it cannot listen there; the port is in use, perhaps
  74     the endpoint could not be printed

Examples:
  $ bbroker &
  $ bbroker --host 0.0.0.0 --port 6000
  $ bbroker --broker ipc:///run/backbone.sock --broker tcp://127.0.0.1:5555
  $ bbroker --port 0 >endpoint &
  $ brequest mmi.service ls-service          # 200: it is served; 404: it is not
`

type brokerTool struct {
	commonFlags
	heartbeatFlags
	Where []string `arg:"" optional:""`
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
	socket, bound, err := listen(endpoints)
	if err != nil {
		return err
	}
	defer removeSockets(bound)
	defer socket.Close()
	if err := output(strings.Join(bound, "\n") + "\n"); err != nil {
		return err
	}

	stop, restore := signal.NotifyContext(context.Background(), stopSignals()...)
	defer restore()
	return serve(stop, socket, t.heartbeatFlags, log)
}

// listen returns a ROUTER that is bound to the endpoints, and what it is bound to.
func listen(endpoints []string) (*zmq.Socket, []string, error) {
	socket, err := zmq.NewSocket(zmq.ROUTER)
	if err != nil {
		return nil, nil, fmt.Errorf("open a ZeroMQ socket: %w", err)
	}
	err = errors.Join(
		// A message to a peer that is gone fails, instead of vanishing.
		socket.SetRouterMandatory(1),
		// What a client has not read yet; it may have many requests in flight. Beyond
		// it the client loses its replies, and nobody waits for it.
		socket.SetSndhwm(10_000),
		// What one peer has sent that is not yet received; beyond it TCP slows it down.
		socket.SetRcvhwm(1000),
		socket.SetBacklog(1024),
		socket.SetLinger(time.Second),
	)
	if err != nil {
		socket.Close()
		return nil, nil, fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	var bound []string
	for _, endpoint := range endpoints {
		real, err := bind(socket, endpoint)
		if err != nil {
			socket.Close()
			removeSockets(bound)
			return nil, nil, err
		}
		bound = append(bound, real)
	}
	return socket, bound, nil
}

// bind returns the endpoint that the socket is really bound to: port 0 has become
// a port.
func bind(socket *zmq.Socket, endpoint string) (string, error) {
	if err := setTransport(socket, endpoint); err != nil {
		return "", fmt.Errorf("set up a ZeroMQ socket: %w", err)
	}
	err := error(zmq.Errno(syscall.EADDRINUSE))
	if !ipcInUse(endpoint) {
		err = socket.Bind(endpoint)
	}
	if zmq.AsErrno(err) == zmq.Errno(syscall.ENODEV) {
		err = socket.Bind(lookUp(endpoint))
	}
	if err == nil {
		return socket.GetLastEndpoint()
	}
	f := &failure{exitUnavailable, fmt.Errorf("listen on %s: %w", endpoint, err), ""}
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

// lookUp puts an address in the place of a host name: ZeroMQ does so only where it
// connects, not where it binds.
func lookUp(endpoint string) string {
	host, port, err := net.SplitHostPort(strings.TrimPrefix(endpoint, "tcp://"))
	if err != nil {
		return endpoint
	}
	address, err := net.ResolveIPAddr("ip", host)
	if err != nil {
		return endpoint
	}
	return "tcp://" + net.JoinHostPort(address.String(), port)
}

// removeSockets takes away what ZeroMQ leaves behind of ipc:// endpoints.
func removeSockets(endpoints []string) {
	for _, endpoint := range endpoints {
		if path, ok := strings.CutPrefix(endpoint, "ipc://"); ok {
			os.Remove(path)
		}
	}
}

// serve is the loop around a Broker: it owns the socket and the clock. It returns nil
// once stop is done.
func serve(stop context.Context, socket *zmq.Socket, flags heartbeatFlags, log *slog.Logger) error {
	waker, err := newWaker()
	if err != nil {
		return err
	}
	defer waker.Close()
	defer context.AfterFunc(stop, waker.Wake)()

	broker := NewBroker(flags, func(frames [][]byte) error { return send(socket, frames) }, log)
	for stop.Err() == nil {
		deadline := broker.Tick(time.Now())
		if _, err := waker.Wait(socket, zmq.POLLIN, deadline); err != nil {
			return err
		}
		// A flood of messages must not keep the heartbeats from going out.
		for range 1000 {
			frames, err := receive(socket)
			if err != nil {
				return err
			}
			if frames == nil {
				break
			}
			broker.Receive(frames)
		}
	}
	broker.Stop()
	return nil
}

// Broker is the broker of MDP/0.1 (RFC 7) as a state machine: Receive and Tick are
// its events, the messages that it sends are its actions, and it knows no socket and
// no clock. It belongs to one goroutine.
//
// For each service either workers are idle or requests wait, never both.
type Broker struct {
	heartbeat time.Duration
	liveness  int
	send      func(frames [][]byte) error // the identity first; fails at once, perhaps with errWouldBlock
	log       *slog.Logger

	services map[string]*service
	workers  map[string]*worker // by identity
	due      time.Time          // of the next heartbeat
	tokens   tokens
	accused  map[string]bool // the peers whose bad messages were logged
}

// A service is there while it has workers or waiting requests.
type service struct {
	name    string
	workers int
	idle    list.List // of *worker, the least recently used first
	waiting list.List // of *request, the oldest first
}

// A worker serves one service, one request at a time.
type worker struct {
	identity string
	service  *service
	request  *request      // what it works on, nil when idle
	place    *list.Element // among the idle, nil when busy
	silence  int           // heartbeats since it was last heard
	age      int           // heartbeats since it got its request
	attends  bool          // it was heard while busy; many workers cannot be
}

// A request lives from its arrival to its reply.
type request struct {
	client  [][]byte // the client's address stack, its identity first
	service []byte
	body    [][]byte
	token   []byte // stands for the client towards the worker
}

func NewBroker(flags heartbeatFlags, send func(frames [][]byte) error, log *slog.Logger) *Broker {
	return &Broker{
		heartbeat: time.Duration(flags.Heartbeat),
		liveness:  flags.Liveness,
		send:      send,
		log:       log,
		services:  map[string]*service{},
		workers:   map[string]*worker{},
		tokens:    tokens{run: rand.Uint32()},
		accused:   map[string]bool{},
	}
}

// Receive takes a message as the ROUTER gives it, the identity of the peer first.
func (b *Broker) Receive(frames [][]byte) {
	if len(frames) == 0 {
		return
	}
	peer := frames[0]
	m, err := Parse(frames[1:])
	switch {
	case err != nil:
		b.accuse(peer, err)
	case m.Kind == KindClient:
		b.log.Debug("request", "client", string(peer), "service", string(m.Service), "frames", len(m.Body))
		b.receiveRequest(frames[:1+len(m.Address)], m)
	case len(m.Address) > 0:
		b.accuse(peer, fmt.Errorf("%v: a worker has no address but its identity", m.Kind))
	default:
		b.log.Debug("message", "worker", string(peer), "kind", m.Kind.String())
		b.receiveWorker(string(peer), m)
	}
}

func (b *Broker) receiveRequest(client [][]byte, m Message) {
	if strings.HasPrefix(string(m.Service), mmiPrefix) {
		b.reply(client, m.Service, b.manage(m))
		return
	}
	s := b.service(string(m.Service))
	s.waiting.PushBack(&request{client, m.Service, m.Body, b.tokens.next()})
	b.dispatch(s)
}

// manage answers a request to the broker itself (RFC 8).
func (b *Broker) manage(m Message) [][]byte {
	code := mmiNotImplemented
	if string(m.Service) == mmiService {
		switch {
		case len(m.Body) != 1:
			code = mmiBadRequest
		case b.served(string(m.Body[0])):
			code = mmiFound
		default:
			code = mmiNotFound
		}
	}
	return [][]byte{[]byte(code)}
}

func (b *Broker) served(name string) bool {
	s, ok := b.services[name]
	return ok && s.workers > 0
}

func (b *Broker) receiveWorker(identity string, m Message) {
	w, known := b.workers[identity]
	if !known {
		switch m.Kind {
		case KindReady:
			b.register(identity, string(m.Service))
		case KindDisconnect: // and gone
		default:
			// It registered with another broker, this one before its restart perhaps, or
			// was given up. DISCONNECT makes it register anew.
			b.sendWorker(identity, Message{Kind: KindDisconnect})
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
			return
		}
		b.reply(r.client, r.service, m.Body)
		b.rest(w)
		b.dispatch(w.service)
	case KindDisconnect:
		b.log.Info("worker left", "worker", identity, "service", w.service.name)
		// It would have replied had it started on its request; the next one will.
		if r := b.remove(w); r != nil {
			s := b.service(string(r.service))
			s.waiting.PushFront(r)
			b.dispatch(s)
		}
	default:
		b.expel(w, fmt.Sprintf("an unexpected %v", m.Kind))
	}
}

func (b *Broker) register(identity, name string) {
	if strings.HasPrefix(name, mmiPrefix) {
		b.log.Warn("worker refused", "worker", identity, "service", name, "why", "the name is the broker's own")
		b.sendWorker(identity, Message{Kind: KindDisconnect})
		return
	}
	b.log.Info("worker came", "worker", identity, "service", name)
	s := b.service(name)
	s.workers++
	w := &worker{identity: identity, service: s}
	b.workers[identity] = w
	b.rest(w)
	b.dispatch(s)
}

// service returns the service of that name, a new one if there is none.
func (b *Broker) service(name string) *service {
	s, ok := b.services[name]
	if !ok {
		s = &service{name: name}
		b.services[name] = s
	}
	return s
}

// rest makes a worker idle, and the last one to be used.
func (b *Broker) rest(w *worker) {
	w.request = nil
	w.place = w.service.idle.PushBack(w)
}

// dispatch gives waiting requests to idle workers for as long as there are both.
func (b *Broker) dispatch(s *service) {
	for s.waiting.Len() > 0 && s.idle.Len() > 0 {
		w := s.idle.Front().Value.(*worker)
		r := s.waiting.Front().Value.(*request)
		err := b.sendWorker(w.identity, Message{Kind: KindRequest, Client: [][]byte{r.token}, Body: r.body})
		if err != nil {
			b.lose(w, err)
			continue
		}
		s.waiting.Remove(s.waiting.Front())
		s.idle.Remove(w.place)
		w.request, w.place, w.age = r, nil, 0
	}
}

// Tick does what is due and returns the time of the next call.
func (b *Broker) Tick(now time.Time) time.Time {
	if now.Before(b.due) {
		return b.due
	}
	b.due = now.Add(b.heartbeat)
	for _, w := range b.workers {
		b.beat(w)
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
	if w.silence > b.liveness {
		b.expel(w, fmt.Sprintf("silent for %d heartbeats", b.liveness))
		return
	}
	err := b.sendWorker(w.identity, Message{Kind: KindHeartbeat})
	if err != nil && err != errWouldBlock { // a busy worker need not read
		b.lose(w, err)
	}
}

// expel disconnects a worker that broke the protocol or fell silent.
func (b *Broker) expel(w *worker, why string) {
	b.sendWorker(w.identity, Message{Kind: KindDisconnect})
	b.lose(w, errors.New(why))
}

// lose gives a worker up. What it was working on may be done or half done, so no
// other worker gets it, and the client learns of it at once.
func (b *Broker) lose(w *worker, why error) {
	b.log.Warn("worker lost", "worker", w.identity, "service", w.service.name, "why", why)
	if r := b.remove(w); r != nil {
		b.fail(r, exitUnavailable, "the worker was lost while it had the request; it may have been done")
	}
}

// remove forgets a worker and returns the request that it had, or nil.
func (b *Broker) remove(w *worker) *request {
	delete(b.workers, w.identity)
	s := w.service
	s.workers--
	if w.place != nil {
		s.idle.Remove(w.place)
	}
	if s.workers == 0 && s.waiting.Len() == 0 {
		delete(b.services, s.name)
	}
	return w.request
}

// fail ends a request with a status reply of the broker's own.
func (b *Broker) fail(r *request, status int, why string) {
	text := fmt.Sprintf("bbroker: %s: %s\n", r.service, why)
	b.reply(r.client, r.service, statusReply(nil, []byte(text), status))
}

// reply ends a request. A client that is gone, or does not read, loses its reply.
func (b *Broker) reply(client [][]byte, service []byte, body [][]byte) {
	err := b.send(Message{Address: client, Kind: KindClient, Service: service, Body: body}.Frames())
	if err != nil {
		b.log.Debug("reply dropped", "client", string(client[0]), "service", string(service), "why", err)
	}
}

// sendWorker sends a message to a worker. An error means that the worker is unreachable,
// or that it does not read.
func (b *Broker) sendWorker(identity string, m Message) error {
	m.Address = [][]byte{[]byte(identity)}
	return b.send(m.Frames())
}

// Stop answers every request and says DISCONNECT to every worker. The broker is of
// no use afterwards.
func (b *Broker) Stop() {
	const why = "the broker is shutting down"
	for _, s := range b.services {
		for e := s.waiting.Front(); e != nil; e = e.Next() {
			b.fail(e.Value.(*request), exitTemporary, why)
		}
	}
	for _, w := range b.workers {
		b.sendWorker(w.identity, Message{Kind: KindDisconnect})
		if w.request != nil {
			b.fail(w.request, exitTemporary, why)
		}
	}
}

// accuse logs what was wrong with a message, once for each peer.
func (b *Broker) accuse(peer []byte, err error) {
	if b.accused[string(peer)] {
		return
	}
	if len(b.accused) >= 1000 { // strangers must not fill the memory
		clear(b.accused)
	}
	b.accused[string(peer)] = true
	b.log.Warn("bad message", "peer", string(peer), "why", err)
}

// tokens are the names of requests towards workers: printable, and no two alike, in
// this run of the broker and by all odds in any.
type tokens struct {
	run   uint32
	count uint64
}

func (t *tokens) next() []byte {
	t.count++
	return strconv.AppendUint(fmt.Appendf(nil, "%08x.", t.run), t.count, 10)
}
