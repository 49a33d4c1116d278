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
