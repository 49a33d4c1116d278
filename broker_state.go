package main

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"time"
)

// Broker is the broker of MDP/0.1 (RFC 7). It is a state machine that knows no socket and no
// clock: Receive and Tick are its events, and the messages that it sends are its actions. It
// belongs to one goroutine.
//
// For each service either workers are idle or requests wait, never both. A request that was taken
// waits or is with one worker, until it ends: with a reply, or when its client cancels it.
type Broker struct {
	brokerFlags
	send func(frames [][]byte) error // the identity first; never waits, may return errWouldBlock
	log  *slog.Logger

	// debug tells whether the log takes lines for single requests, which cost more than all other
	// work on a request.
	debug bool

	services    map[string]*brokerService
	workers     map[string]*brokerWorker // by identity
	waiting     map[string]*list.List    // of *brokerRequest, by the identity of the client
	tokenPrefix string                   // of this run of the broker
	lastToken   uint64
	held        size // of all requests that have not ended
	unfinished  int  // their number
	draining    bool

	begin, now, nextHeartbeat time.Time
	total                     tally
	warned                    map[string]bool // what was logged since warnAgain was set
	warnAgain                 time.Time       // when warned is cleared
}

// brokerFlags are the flags that the state machine obeys.
type brokerFlags struct {
	heartbeatFlags
	QueueTTL  time.Duration `default:"1m"`
	MaxQueue  uint          `default:"100000"`
	MaxMemory size          `default:"1G"`
	Redeliver uint          `default:"0"`
}

// A brokerService exists while it has workers or waiting requests.
type brokerService struct {
	name       string
	workers    int
	idle       list.List // of *brokerWorker, the least recently used first
	waiting    list.List // of *brokerRequest, the oldest first
	unservedAt time.Time // when it lost its last worker
	tally      tally
}

// A brokerWorker serves one service, one request at a time.
type brokerWorker struct {
	identity    string
	address     [][]byte // the identity as a frame
	service     *brokerService
	request     *brokerRequest // nil when idle
	idleElement *list.Element  // its place among the idle workers, nil when busy
	silence     int            // heartbeats since it was last heard
	busy        int            // heartbeats since it was given its request

	// heardWhileBusy tells that it can send heartbeats while it works; many workers cannot.
	heardWhileBusy bool
}

// A brokerRequest exists from its arrival to its end.
type brokerRequest struct {
	service *brokerService
	name    []byte   // of the service, for the reply
	client  [][]byte // the address stack, with the identity first
	body    [][]byte
	token   []byte // stands for the client in messages to workers

	arrived, started time.Time
	redelivered      uint

	// Its places in the queues of its service and of its client, nil when in flight.
	queued, owned *list.Element
}

// size returns the bytes that the broker holds. The address of a client may be long, too.
func (r *brokerRequest) size() size {
	return sizeOf(r.client) + size(len(r.name)) + sizeOf(r.body)
}

// NewBroker returns a broker without workers and requests.
func NewBroker(flags brokerFlags, now time.Time, send func(frames [][]byte) error, log *slog.Logger) *Broker {
	return &Broker{
		brokerFlags:   flags,
		send:          send,
		log:           log,
		debug:         log.Enabled(context.Background(), slog.LevelDebug),
		services:      map[string]*brokerService{},
		workers:       map[string]*brokerWorker{},
		waiting:       map[string]*list.List{},
		tokenPrefix:   fmt.Sprintf("%08x.", rand.Uint32()),
		begin:         now,
		now:           now,
		nextHeartbeat: now,
		warned:        map[string]bool{},
	}
}

// Receive takes a message as the ROUTER received it, the identity of the peer first.
func (b *Broker) Receive(frames [][]byte, now time.Time) {
	if len(frames) == 0 {
		return
	}
	b.now = now
	peer := frames[0]
	m, err := Parse(frames[1:])
	if err == nil && m.Kind != KindClient && len(m.Address) > 0 {
		err = fmt.Errorf("%v: a worker has no address other than its identity", m.Kind)
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
	if isManagement(string(m.Service)) {
		b.reply(client, m.Service, [][]byte{b.manage(string(m.Service), client, m.Body)})
		return
	}
	s := b.service(m.Service)
	r := &brokerRequest{service: s, name: m.Service, client: client, body: m.Body, token: b.nextToken(), arrived: b.now}
	b.unfinished++
	b.held += r.size()
	b.count(s, requestsTotal, 1)
	b.count(s, requestBytes, uint64(sizeOf(r.body)))
	switch {
	case b.draining:
		b.refuse(r, shuttingDown)
	case b.held > b.MaxMemory:
		b.refuse(r, "the broker holds --max-memory bytes of requests already")
	case b.assign(r):
	case s.waiting.Len() >= int(b.MaxQueue):
		b.refuse(r, "the queue is full")
	default:
		b.enqueue(r, s.waiting.PushBack)
	}
	b.dispatch(s)
}

func (b *Broker) receiveWorker(identity []byte, m Message) {
	w, known := b.workers[string(identity)]
	if !known {
		switch m.Kind {
		case KindReady:
			b.register(identity, m.Service)
		case KindDisconnect:
		default:
			// It registered with an earlier run of this broker, or was taken for lost. DISCONNECT
			// makes it register anew.
			b.sendTo([][]byte{identity}, Message{Kind: KindDisconnect})
		}
		return
	}

	w.silence = 0
	switch m.Kind {
	case KindHeartbeat:
		// The first one may have crossed the request on its way.
		w.heardWhileBusy = w.heardWhileBusy || w.request != nil && w.busy > 1
	case KindReply:
		r := w.request
		if r == nil || len(m.Client) != 1 || string(m.Client[0]) != string(r.token) {
			b.disconnect(w, "a reply to a request that it was not given")
			break
		}
		b.count(w.service, repliesTotal, 1)
		if ParseReply(m.Body).Status != 0 {
			b.count(w.service, failuresTotal, 1)
		}
		b.observe(w.service, serveSeconds, b.now.Sub(r.started))
		if b.debug {
			b.log.Debug("request done", "request", string(r.token), "service", w.service.name, "took", b.now.Sub(r.started))
		}
		b.finish(r, m.Body)
		b.makeIdle(w)
	case KindDisconnect:
		b.log.Info("worker left", "worker", w.identity, "service", w.service.name, "why", "it sent DISCONNECT")
		// It has not begun its request, or it would have replied first.
		if r := b.remove(w); r != nil {
			b.requeue(r)
		}
	default:
		b.disconnect(w, fmt.Sprintf("an unexpected %v", m.Kind))
	}
	b.dispatch(w.service)
}

func (b *Broker) register(identity, name []byte) {
	w := &brokerWorker{identity: string(identity), address: [][]byte{bytes.Clone(identity)}}
	if isManagement(string(name)) {
		b.warn("peer "+w.identity, "worker refused", "worker", w.identity, "service", string(name), "why", "the name is the broker's own")
		b.sendTo(w.address, Message{Kind: KindDisconnect})
		return
	}
	b.log.Info("worker came", "worker", w.identity, "service", string(name))
	w.service = b.service(name)
	w.service.workers++
	b.workers[w.identity] = w
	b.makeIdle(w)
	b.dispatch(w.service)
}

// service returns the service of a name, a new one if there is none.
func (b *Broker) service(name []byte) *brokerService {
	s, ok := b.services[string(name)]
	if !ok {
		s = &brokerService{name: string(name)}
		b.services[s.name] = s
	}
	return s
}

// makeIdle puts a worker at the tail of the idle list of its service.
func (b *Broker) makeIdle(w *brokerWorker) {
	w.request = nil
	w.idleElement = w.service.idle.PushBack(w)
}

// enqueue puts a request into the queues of its client and, with push, of its service.
func (b *Broker) enqueue(r *brokerRequest, push func(any) *list.Element) {
	r.queued = push(r)
	identity := string(r.client[0])
	own, ok := b.waiting[identity]
	if !ok {
		own = list.New()
		b.waiting[identity] = own
	}
	r.owned = own.PushBack(r)
}

// requeue puts a request that a worker had ahead of the others.
func (b *Broker) requeue(r *brokerRequest) {
	if b.draining {
		b.refuse(r, shuttingDown)
		return
	}
	b.enqueue(r, r.service.waiting.PushFront)
}

func (b *Broker) dequeue(r *brokerRequest) {
	r.service.waiting.Remove(r.queued)
	identity := string(r.client[0])
	own := b.waiting[identity]
	own.Remove(r.owned)
	if own.Len() == 0 {
		delete(b.waiting, identity)
	}
	r.queued, r.owned = nil, nil
}

// assign gives a request to the next idle worker, and tells whether there was one.
func (b *Broker) assign(r *brokerRequest) bool {
	s := r.service
	for s.idle.Len() > 0 {
		w := s.idle.Front().Value.(*brokerWorker)
		err := b.sendTo(w.address, Message{Kind: KindRequest, Client: [][]byte{r.token}, Body: r.body})
		if err != nil {
			b.loseWorker(w, err)
			continue
		}
		b.observe(s, waitSeconds, b.now.Sub(r.arrived))
		s.idle.Remove(w.idleElement)
		w.request, w.idleElement, w.busy = r, nil, 0
		r.started = b.now
		if b.debug {
			b.log.Debug("request given", "request", string(r.token), "service", s.name, "client", string(r.client[0]), "worker", w.identity)
		}
		return true
	}
	return false
}

// dispatch gives waiting requests of a service to its idle workers, and forgets a service that has
// neither workers nor requests. It follows every event that changes either.
func (b *Broker) dispatch(s *brokerService) {
	for s.waiting.Len() > 0 {
		r := s.waiting.Front().Value.(*brokerRequest)
		if !b.assign(r) {
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
	if now.Before(b.nextHeartbeat) {
		return b.nextHeartbeat
	}
	b.nextHeartbeat = now.Add(b.Heartbeat)
	for _, w := range b.workers {
		b.heartbeat(w)
	}
	if b.QueueTTL > 0 {
		for _, s := range b.services {
			b.expire(s)
		}
	}
	if !now.Before(b.warnAgain) {
		clear(b.warned)
		b.warnAgain = now.Add(time.Minute)
	}
	return b.nextHeartbeat
}

// heartbeat sends a worker a heartbeat, and disconnects one that was silent for too many of them.
// Silence is counted in heartbeats of the broker, so that no worker pays for a time in which the
// broker stood still.
func (b *Broker) heartbeat(w *brokerWorker) {
	w.busy++
	if w.request == nil || w.heardWhileBusy {
		w.silence++
	}
	if w.silence > b.Liveness {
		b.disconnect(w, fmt.Sprintf("silent for %d heartbeats", b.Liveness))
	} else if err := b.sendTo(w.address, Message{Kind: KindHeartbeat}); err != nil && err != errWouldBlock {
		b.loseWorker(w, err) // One that does not read is not lost yet: its silence decides.
	}
	b.dispatch(w.service)
}

// expire ends the requests that have waited too long for a worker of their service.
func (b *Broker) expire(s *brokerService) {
	for s.workers == 0 && s.waiting.Len() > 0 {
		r := s.waiting.Front().Value.(*brokerRequest)
		since := r.arrived
		if s.unservedAt.After(since) {
			since = s.unservedAt
		}
		if b.now.Sub(since) < b.QueueTTL {
			break
		}
		b.warn("expired "+s.name, "requests expired", "service", s.name, "client", string(r.client[0]))
		b.count(s, expiredTotal, 1)
		b.dequeue(r)
		b.fail(r, exitUnavailable, fmt.Sprintf("no worker came within %v", b.QueueTTL))
	}
	b.dispatch(s)
}

// disconnect sends DISCONNECT to a worker that broke the protocol or fell silent, and gives it up.
func (b *Broker) disconnect(w *brokerWorker, why string) {
	b.sendTo(w.address, Message{Kind: KindDisconnect})
	b.loseWorker(w, errors.New(why))
}

// loseWorker gives a worker up. The command of its request may have run: with --redeliver another
// worker gets the request, else the client is told at once.
func (b *Broker) loseWorker(w *brokerWorker, why error) {
	r := b.remove(w)
	token := ""
	if r != nil {
		token = string(r.token)
	}
	b.log.Warn("worker lost", "worker", w.identity, "service", w.service.name, "request", token, "why", why)
	b.count(w.service, lostWorkersTotal, 1)
	switch {
	case r == nil:
	case r.redelivered < b.Redeliver:
		r.redelivered++
		b.count(r.service, redeliveredTotal, 1)
		b.requeue(r)
	default:
		b.fail(r, exitUnavailable, "the worker was lost while it had the request; the command may have run")
	}
}

// remove forgets a worker and returns the request that it had, or nil.
func (b *Broker) remove(w *brokerWorker) *brokerRequest {
	delete(b.workers, w.identity)
	w.service.workers--
	if w.service.workers == 0 {
		w.service.unservedAt = b.now
	}
	if w.idleElement != nil {
		w.service.idle.Remove(w.idleElement)
	}
	return w.request
}

const shuttingDown = "the broker is shutting down"

// refuse ends a request that its client may send again later.
func (b *Broker) refuse(r *brokerRequest, why string) {
	b.warn("refused "+r.service.name, "requests refused", "service", r.service.name, "client", string(r.client[0]), "why", why)
	b.count(r.service, refusedTotal, 1)
	b.fail(r, exitTemporary, why)
}

// fail ends a request with a status reply of the broker itself.
func (b *Broker) fail(r *brokerRequest, status int, why string) {
	b.finish(r, Reply{Stderr: fmt.Appendf(nil, "bbroker: %s: %s\n", r.service.name, why), Status: status}.Body())
}

// finish ends a request with a reply. A client that is gone or does not read loses it; nobody else
// waits for that.
func (b *Broker) finish(r *brokerRequest, body [][]byte) {
	b.end(r)
	if err := b.reply(r.client, r.name, body); err != nil {
		b.count(r.service, droppedRepliesTotal, 1)
		b.log.Debug("reply dropped", "client", string(r.client[0]), "service", r.service.name, "why", err)
		return
	}
	b.count(r.service, replyBytes, uint64(sizeOf(body)))
}

// end releases a request that was taken.
func (b *Broker) end(r *brokerRequest) {
	b.unfinished--
	b.held -= r.size()
}

func (b *Broker) reply(client [][]byte, service []byte, body [][]byte) error {
	return b.sendTo(client, Message{Kind: KindClient, Service: service, Body: body})
}

// sendTo sends a message to a peer. An error means that the peer cannot be reached, or that it does
// not read.
func (b *Broker) sendTo(address [][]byte, m Message) error {
	m.Address = address
	return b.send(m.Frames())
}

// Drain refuses the requests that wait, and those that come from now on.
func (b *Broker) Drain() {
	b.draining = true
	for _, s := range b.services {
		for s.waiting.Len() > 0 {
			r := s.waiting.Front().Value.(*brokerRequest)
			b.dequeue(r)
			b.refuse(r, shuttingDown)
		}
		b.dispatch(s)
	}
}

// Drained tells whether every request has ended.
func (b *Broker) Drained() bool { return b.unfinished == 0 }

// Stop answers every request that is left and sends DISCONNECT to every worker. The broker must not
// be used afterwards.
func (b *Broker) Stop() {
	b.Drain()
	for _, w := range b.workers {
		b.sendTo(w.address, Message{Kind: KindDisconnect})
		if r := b.remove(w); r != nil {
			b.refuse(r, shuttingDown+"; the command may have run")
		}
		b.dispatch(w.service)
	}
}

// warn logs what any peer can cause again and again: the same thing once a minute, and a hundred
// different ones.
func (b *Broker) warn(what, message string, attrs ...any) {
	const limit = 100
	if b.warned[what] || len(b.warned) > limit {
		return
	}
	b.warned[what] = true
	if len(b.warned) > limit {
		b.log.Warn("too many different warnings, silent for up to a minute")
		return
	}
	b.log.Warn(message, attrs...)
}

// nextToken returns the token of a new request. Tokens are printable, and differ from each other
// and, with high probability, from those of other runs of the broker.
func (b *Broker) nextToken() []byte {
	b.lastToken++
	return strconv.AppendUint([]byte(b.tokenPrefix), b.lastToken, 10)
}
