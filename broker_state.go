package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"strconv"
	"time"
)

// Broker is the broker of MDP/0.1 (RFC 7) and MDP/0.2 (RFC 18). It is a state machine that knows no socket and no
// clock: Receive, Disconnected and Tick are its events, and the messages that it sends are its
// actions. It belongs to one goroutine.
//
// For each service either workers are idle or requests wait, never both. A request that was taken
// waits or is with one worker, until it ends: with a reply, or when its client cancels it.
type Broker struct {
	brokerFlags
	outlet outlet
	log    *brokerLog
	access *accessList // nil where no keys are in use

	// debug tells whether the log takes lines for single requests, which cost more than all other
	// work on a request.
	debug bool

	services    map[string]*brokerService
	unserved    int                      // services without workers
	workers     map[string]*brokerWorker // by identity
	clients     map[string]*brokerClient // by identity
	unread      map[*brokerRequest]bool  // streams whose client has to read before their worker gets credit
	cancelling  int                      // workers that end their command if it is cancelled
	sources     map[int]string           // identities, by the descriptor of their connection
	connections map[int]uint64           // numbers of those that are open, by their descriptor
	accepted    uint64                   // connections so far
	tokenPrefix string                   // of this run of the broker
	lastToken   uint64
	held        size // of all requests that have not ended
	unfinished  int  // their number
	draining    bool
	expiring    bool // requests may have waited too long
	forbidding  bool // requests may wait that their clients may not make any more

	begin, now, nextHeartbeat, lastRequest time.Time

	total   tally
	reports map[reportKey]report // of mmi services
}

// An outlet is what a broker sends its messages through. The first frame of a message is the identity
// of the peer. It never waits: an error is errWouldBlock, or means that the peer is gone.
type outlet interface {
	send(frames [][]byte, queue peerQueue) error
	newQueue() peerQueue
	queued() size                   // bytes in all queues
	received(source int) (n uint64) // bytes over a connection so far; 0 if that is unknown
	updateConnections()             // calls Accepted and Disconnected for what happened up to the last message
}

// brokerFlags are the flags that the state machine obeys.
type brokerFlags struct {
	heartbeatFlags
	QueueTTL  time.Duration `default:"1m"`
	MaxQueue  int           `default:"100000"`
	MaxMemory size          `default:"1G"`
	Redeliver int           `default:"0"`
}

func (f *brokerFlags) Validate() error {
	switch {
	case f.MaxQueue < 0:
		return fmt.Errorf("--max-queue must be 0 or more, not %d", f.MaxQueue)
	case f.Redeliver < 0:
		return fmt.Errorf("--redeliver must be 0 or more, not %d", f.Redeliver)
	}
	return f.heartbeatFlags.Validate()
}

// What a broker takes from one peer, besides the flags.
const (
	clientShare  = 2           // a client may hold MaxMemory divided by this, in requests and unread replies
	maxUnserved  = 10_000      // names that wait for their first worker
	maxAddress   = 16          // frames of a client's address
	maxReturns   = 10          // times that workers may return a request
	frontReturns = 3           // of these, how often it goes ahead of the others
	maxEnded     = 1000        // waiting requests that expire or are refused in one Tick
	smallReply   = 4 << 10     // bytes of a reply that a client gets even if memory is full
	requestCost  = 512         // bytes that holding a request takes, besides its frames
	nodeCost     = 384         // bytes that a node of its address takes, besides a copy of the frame
	workerPrefix = "bservice." // begins the identity of workers of ours, bservice or a library
)

// A brokerService exists while it has workers or waiting requests.
type brokerService struct {
	name       string
	workers    int
	elsewhere  int                            // of the workers: they work for other brokers
	idle       list.List                      // of *brokerWorker, the least recently used first
	waiting    int                            // requests
	queues     map[*brokerClient]*clientQueue // that are not empty
	turns      list.List                      // of *clientQueue, the next one first
	unservedAt time.Time                      // when it lost its last worker
	returning  time.Time                      // until then a worker may come back that ends a command
	tally      tally
}

// A brokerRequest exists from its arrival to its end.
type brokerRequest struct {
	service *brokerService
	client  *brokerClient
	worker  *brokerWorker // that has it, nil while it waits
	dialect Dialect       // of the client
	name    []byte        // of the service, for the reply
	address [][]byte      // the client's address stack, with its identity first
	body    [][]byte
	token   []byte // stands for the client in messages to workers
	number  uint64 // in the order in which requests were taken
	cost    size   // bytes that holding it takes

	arrived, started time.Time
	redelivered      int
	returned         int  // times that a worker returned it
	ended            bool // the worker that has it does not know that

	partials bool     // the client takes partial replies
	begun    bool     // a part of the reply has come
	onTheWay int      // parts that were passed on, for which the worker got no new credit
	ahead    int      // parts for which the broker gave the worker credit, and the client has given none so far
	window   int      // how many parts may be on their way
	grants   bool     // the client gives credit
	gathered [][]byte // parts for a client that takes none

	// Its places in the queue of its client, nil when in flight, and among the addresses of its client, nil
	// if it cannot be recalled.
	inQueue *list.Element
	node    *addressNode
	inNode  *list.Element
}

// NewBroker returns a broker without workers and requests.
func NewBroker(flags brokerFlags, now time.Time, out outlet, log *slog.Logger) *Broker {
	return &Broker{
		brokerFlags:   flags,
		outlet:        out,
		log:           newBrokerLog(log),
		debug:         log.Enabled(context.Background(), slog.LevelDebug),
		services:      map[string]*brokerService{},
		workers:       map[string]*brokerWorker{},
		clients:       map[string]*brokerClient{},
		unread:        map[*brokerRequest]bool{},
		sources:       map[int]string{},
		connections:   map[int]uint64{},
		tokenPrefix:   fmt.Sprintf("%08x.", rand.Uint32()),
		begin:         now,
		now:           now,
		nextHeartbeat: now,
		reports:       map[reportKey]report{},
	}
}

// knows tells whether a connection is known to be that of an identity.
func (b *Broker) knows(source int, identity []byte) bool {
	return source < 0 || b.sources[source] == string(identity)
}

// Receive takes a message as the ROUTER received it, the identity of the peer first. Its long frames are only
// lent: what the broker keeps, it copies.
func (b *Broker) Receive(frames [][]byte, from sender, now time.Time) {
	if len(frames) == 0 {
		return
	}
	b.now = now
	if len(frames[0]) > maxIdentity {
		b.log.warn("identity", "messages ignored", "why", fmt.Sprintf("a peer has an identity of more than %d bytes", maxIdentity))
		return
	}
	peer, mine := frames[0], b.grantOf(from.user)
	m, err := Parse(frames[1:])
	// The connection that has the descriptor may be a new one, even of the same peer. What happened to the one
	// before must not happen to this message. ZeroMQ lets another peer have an identity only when all messages
	// of the one before were received: with keys, the broker has to know by then that its connection broke.
	if b.access != nil || !b.knows(from.source, peer) || m.Dialect.ofClient() && (m.Dialect.hasPartials() || b.cancelling > 0) {
		b.outlet.updateConnections()
	}
	gone := b.isGone(from)
	if !gone && !b.knows(from.source, peer) {
		b.sources[from.source] = string(peer)
	}
	switch {
	case err == nil && !m.Dialect.ofClient() && len(m.Address) > 0:
		err = fmt.Errorf("%v: a worker has no address other than its identity", m.Kind)
	case err == nil && len(m.Address) >= maxAddress:
		err = fmt.Errorf("an address of more than %d frames", maxAddress)
	case err == nil && m.Dialect.ofClient() && m.Kind != KindRequest:
		err = fmt.Errorf("an unexpected %v", m.Kind)
	case err == nil && !m.Dialect.ofClient() && len(frames) > maxFrames:
		err = fmt.Errorf("%v: more than %d frames", m.Kind, maxFrames)
	}
	w := b.workers[string(peer)]
	if w != nil && (w.user != from.user || !mine.mayServe(w.service.name)) {
		b.revoke(w)
		w = nil
	}
	if w != nil && !m.Dialect.ofClient() && (m.Kind == KindReply || m.Kind == KindPartial) && (err == nil || errors.Is(err, errNoClient)) {
		b.receiveOutcome(w, m, err == nil)
		return
	}
	if err != nil {
		b.log.warn("peer "+string(peer), "bad message", "peer", logged(string(peer)), "why", err)
		if w != nil {
			b.disconnect(w, "a bad message")
			b.dispatch(w.service)
		}
		return
	}
	if b.debug {
		b.log.Debug("message", "peer", logged(string(peer)), "kind", m.Kind, "service", logged(string(m.Service)), "frames", len(m.Body))
	}
	switch {
	case m.Dialect.ofClient():
		c := b.client(peer, from.user)
		c.goneSince = time.Time{}
		if gone {
			c.goneSince = now
		}
		b.receiveClient(c, frames[:1+len(m.Address)], m, mine, len(frames) > maxFrames)
	case w != nil:
		b.receiveWorker(w, m)
	case gone: // DISCONNECT could go to another peer that has the identity now.
	case m.Kind == KindReady:
		b.register(from, mine, peer, m)
	case m.Kind != KindDisconnect:
		// It registered with an earlier run of this broker, or was given up. DISCONNECT makes it
		// register anew.
		b.sendTo([][]byte{peer}, nil, Message{Dialect: m.Dialect, Kind: KindDisconnect})
	}
}

func (b *Broker) receiveClient(c *brokerClient, address [][]byte, m Message, mine *grant, cutOff bool) {
	if !mine.mayCall(string(m.Service)) {
		b.forbid(&brokerRequest{client: c, dialect: m.Dialect, name: m.Service, address: address}, false)
		return
	}
	if isManagement(string(m.Service)) {
		answer := b.manage(string(m.Service), c, address, m.Body, mine)
		b.reply(c, Message{Dialect: m.Dialect, Address: address, Kind: KindReply, Service: m.Service, Body: [][]byte{answer}})
		return
	}
	b.lastRequest = b.now
	s := b.services[string(m.Service)]
	if s == nil && b.unserved < maxUnserved {
		s = b.service(m.Service)
	}
	r := &brokerRequest{service: s, client: c, dialect: m.Dialect, name: m.Service, address: address, body: m.Body, arrived: b.now,
		partials: m.Dialect.hasPartials(),
		cost:     requestCost + costOf(address) + costOfNodes(address) + size(len(m.Service)) + costOf(m.Body)}
	b.count(s, requestsTotal, 1)
	b.count(s, requestBytes, uint64(sizeOf(m.Body)))
	switch {
	case cutOff:
		b.answer(r, exitUsage, fmt.Sprintf("the request has more than %d arguments", maxFrames))
	case b.draining:
		b.refuse(r, shuttingDown)
	case b.held+b.outlet.queued()+r.cost > b.MaxMemory:
		b.refuse(r, "the broker holds --max-memory bytes already")
	case c.held+c.queue.size()+r.cost > b.MaxMemory/clientShare:
		b.refuse(r, "the client holds its share of --max-memory already")
	case s == nil:
		b.refuse(r, "too many names wait for a service")
	case s.idle.Len() == 0 && s.full(c, b.MaxQueue):
		b.refuse(r, "the queue is full")
	default:
		b.take(r)
	}
	if s != nil {
		b.dispatch(s)
	}
}

// take accepts a request, which ends with end.
func (b *Broker) take(r *brokerRequest) {
	keep(r.address)
	keep(r.body)
	if r.partials {
		r.window = max(minWindow, min(maxWindow, clientWindow/(r.client.unfinished+1)))
	}
	r.token = b.nextToken(r.window, b.grantOf(r.client.user).name)
	r.number = b.lastToken
	b.hold(r)
	if !b.assign(r) {
		b.enqueue(r, false)
	}
}

// service returns the service of a name, a new one if there is none.
func (b *Broker) service(name []byte) *brokerService {
	s, ok := b.services[string(name)]
	if !ok {
		s = &brokerService{name: string(name)}
		b.services[s.name] = s
		b.unserved++
	}
	return s
}

// assign gives a request to the next idle worker, and tells whether there was one.
func (b *Broker) assign(r *brokerRequest) bool {
	s := r.service
	for s.idle.Len() > 0 {
		w := s.idle.Front().Value.(*brokerWorker)
		if b.access != nil && w.gone {
			// ZeroMQ goes by its identity, which others can claim now.
			b.loseWorker(w, errors.New("its connection broke"))
			continue
		}
		err := b.tell(w, Message{Kind: KindRequest, Client: [][]byte{r.token}, Body: r.body})
		if err != nil {
			b.loseWorker(w, err)
			continue
		}
		b.observe(s, waitSeconds, b.now.Sub(r.arrived))
		s.idle.Remove(w.idleElement)
		w.request, w.idleElement, w.busy, w.heard = r, nil, 0, 0
		r.worker, r.started = w, b.now
		if r.partials || w.cancels {
			b.index(r)
		} else {
			r.unindex()
		}
		if b.debug {
			b.log.Debug("request given", "request", string(r.token), "service", logged(s.name), "client", logged(r.client.identity), "worker", logged(w.identity))
		}
		return true
	}
	return false
}

// dispatch gives waiting requests of a service to its idle workers, a client after the other, and
// forgets a service that has neither workers nor requests. It follows every event that changes either.
func (b *Broker) dispatch(s *brokerService) {
	for r := s.next(); r != nil; r = s.next() {
		if b.draining || b.forbidding && !b.mayGoOn(r) || !b.assign(r) {
			return
		}
		b.dequeue(r, true)
	}
	if s.workers == 0 && !b.now.Before(s.returning) && b.services[s.name] == s {
		delete(b.services, s.name)
		b.unserved--
	}
}

// Accepted is called when a peer has connected.
func (b *Broker) Accepted(source int) {
	b.accepted++
	b.connections[source] = b.accepted
}

// isGone tells whether a message came over a connection that broke before it was received. Its descriptor
// may belong to a newer connection by now. It only tells where keys are in use.
func (b *Broker) isGone(from sender) bool {
	number, open := b.connections[from.source]
	return b.access != nil && (!open || number > from.admitted)
}

// Disconnected is called when a connection of a peer broke.
func (b *Broker) Disconnected(source int, now time.Time) {
	b.now = now
	delete(b.connections, source)
	identity, ok := b.sources[source]
	if !ok {
		return
	}
	delete(b.sources, source)
	if c := b.clients[identity]; c != nil {
		c.goneSince = now
		b.recall(running(c.recallable.all(nil)), cancelledTotal, "its client is gone")
	}
	if w := b.workers[identity]; w != nil && w.source == source {
		w.gone = true
	}
}

// Tick does what is due and returns the time of the next call.
func (b *Broker) Tick(now time.Time) time.Time {
	b.now = now
	if !now.Before(b.nextHeartbeat) {
		b.nextHeartbeat = now.Add(b.Heartbeat)
		for _, w := range b.workers {
			b.heartbeat(w)
		}
		b.sweepClients()
		b.log.tick(now)
		b.expiring = true
	}
	if b.forbidding {
		if b.forbidWaiting(maxEnded); b.forbidding {
			return now // for the rest of them, once messages have had their turn
		}
	}
	if b.expiring {
		if b.expiring = b.expireQueues(); b.expiring {
			return now // for the rest of them, once messages have had their turn
		}
	}
	if b.draining && b.refuseWaiting(maxEnded) {
		return now
	}
	return b.nextHeartbeat
}

// expireQueues ends the requests that have waited too long for a worker of their service, up to a
// number of them. It tells whether there may be more.
func (b *Broker) expireQueues() (more bool) {
	expired := 0
	for _, s := range b.services {
		if s.workers > 0 {
			continue
		}
		if b.QueueTTL == 0 || b.now.Sub(s.unservedAt) < b.QueueTTL {
			b.dispatch(s) // It may be over.
			continue
		}
		for _, q := range s.queues {
			for e := q.requests.Front(); e != nil && b.now.Sub(e.Value.(*brokerRequest).arrived) >= b.QueueTTL; e = q.requests.Front() {
				if expired++; expired > maxEnded {
					return true
				}
				r := e.Value.(*brokerRequest)
				b.log.warn("expired "+s.name, "requests expired", "service", logged(s.name), "client", logged(r.client.identity))
				b.count(s, expiredTotal, 1)
				b.dequeue(r, false)
				b.fail(r, exitUnavailable, fmt.Sprintf("no worker came within %v", b.QueueTTL))
			}
		}
		b.dispatch(s)
	}
	return false
}

// refuse answers a request that was not taken, or was taken and has not begun. Its client may send it
// again.
func (b *Broker) refuse(r *brokerRequest, why string) {
	b.log.warn("refused "+string(r.name), "requests refused", "service", logged(string(r.name)), "client", logged(r.client.identity), "why", why)
	b.count(r.service, refusedTotal, 1)
	b.answer(r, exitTemporary, why)
}

// fail ends a request that was taken.
func (b *Broker) fail(r *brokerRequest, status int, why string) {
	b.end(r)
	b.answer(r, status, why)
}

// answer sends a status reply of the broker itself.
func (b *Broker) answer(r *brokerRequest, status int, why string) {
	b.deliver(r, r.failure(status, why))
}

// failure returns the body of a status reply of the broker itself.
func (r *brokerRequest) failure(status int, why string) [][]byte {
	return Reply{Stderr: fmt.Appendf(nil, "bbroker: %s: %s\n", printable(string(r.name)), why), Status: status, FromBroker: true}.Body()
}

// reply returns the reply with a body, in the dialect of the client.
func (r *brokerRequest) reply(body [][]byte) Message {
	return Message{Dialect: r.dialect, Address: r.address, Kind: KindReply, Service: r.name, Body: body}
}

// deliver sends the reply to a request. A client that is gone or does not read loses it; nobody else
// waits for that.
func (b *Broker) deliver(r *brokerRequest, body [][]byte) {
	err := b.reply(r.client, r.reply(body))
	if err == nil {
		b.count(r.service, replyBytes, uint64(sizeOf(body)))
		return
	}
	b.count(r.service, droppedRepliesTotal, 1)
	if b.debug {
		b.log.Debug("reply dropped", "client", logged(r.client.identity), "service", logged(string(r.name)), "why", err)
	}
	if r.partials && r.begun && mayReadLater(err) {
		b.oweEnd(r)
	}
}

// hold counts a request that was taken, until its end.
func (b *Broker) hold(r *brokerRequest) {
	b.unfinished++
	b.held += r.cost
	r.client.unfinished++
	r.client.held += r.cost
}

// end releases a request that was taken.
func (b *Broker) end(r *brokerRequest) {
	r.ended = true
	r.unindex()
	delete(b.unread, r)
	b.unfinished--
	b.held -= r.cost
	r.client.unfinished--
	r.client.held -= r.cost
}

var errNotReading = errors.New("the client does not read its replies")

// errReplaced means that somebody else may have the identity of the client now.
var errReplaced = errors.New("the connection of the client is gone")

// reply sends a message to a client, unless there are too many that it has not read. ZeroMQ goes by the identity
// of a client, which others can claim once it is gone: a reply to a key is for that connection only.
func (b *Broker) reply(c *brokerClient, m Message) error {
	if c.replaced || b.access != nil && !c.goneSince.IsZero() {
		return errReplaced
	}
	cost := costOf(m.Address) + size(len(m.Service)) + costOf(m.Body)
	queued := c.queue.size()
	if queued+cost > b.MaxMemory/clientShare || b.held+b.outlet.queued()+cost > b.MaxMemory {
		if queued > 0 || cost > smallReply {
			return errNotReading
		}
	}
	err := b.sendTo(m.Address, c.queue, m)
	if err != nil && err != errWouldBlock && c.goneSince.IsZero() {
		c.goneSince = b.now
	}
	return err
}

// sendTo sends a message to a peer. An error means that the peer cannot be reached, or that it does
// not read.
func (b *Broker) sendTo(address [][]byte, queue peerQueue, m Message) error {
	m.Address = address
	return b.outlet.send(m.Frames(), queue)
}

// Drain lets Tick refuse the requests that wait. Those that come from now on are refused at once.
func (b *Broker) Drain() { b.draining = true }

// refuseWaiting refuses up to a number of the requests that wait, and tells whether there may be more.
func (b *Broker) refuseWaiting(max int) (more bool) {
	refused := 0
	for _, s := range b.services {
		for r := s.next(); r != nil; r = s.next() {
			if refused++; refused > max {
				return true
			}
			b.dequeue(r, true)
			b.end(r)
			b.refuse(r, shuttingDown)
		}
		b.dispatch(s)
	}
	return false
}

// inFlight returns the number of requests that workers have.
func (b *Broker) inFlight() (n int) {
	for _, w := range b.workers {
		if w.request != nil {
			n++
		}
	}
	return n
}

// Drained tells whether every request has ended.
func (b *Broker) Drained() bool { return b.unfinished == 0 }

// Stop answers every request that is left and sends DISCONNECT to every worker. The broker must not
// be used afterwards.
func (b *Broker) Stop() {
	b.Drain()
	b.refuseWaiting(math.MaxInt)
	for _, w := range b.workers {
		b.tell(w, Message{Kind: KindDisconnect})
		if r := b.remove(w); r != nil {
			b.fail(r, exitUnavailable, shuttingDown+"; the command may have run")
		}
		b.dispatch(w.service)
	}
	for _, c := range b.clients {
		b.dropOwed(c)
	}
}

// nextToken returns the token of a new request. Tokens are printable, and differ from each other
// and, with high probability, from those of other runs of the broker. If the client takes partial replies,
// ~ and the number of those that may be on their way follow; and the name of the caller, if it is known, behind
// an @.
func (b *Broker) nextToken(window int, caller string) []byte {
	b.lastToken++
	token := strconv.AppendUint([]byte(b.tokenPrefix), b.lastToken, 10)
	if window > 0 {
		token = strconv.AppendInt(append(token, '~'), int64(window), 10)
	}
	if caller != "" {
		token = append(append(token, '@'), caller...)
	}
	return token
}
