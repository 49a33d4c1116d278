package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"
)

// A call is a request and, once it has ended, what came of it: a reply or an error.
type call struct {
	service string
	body    [][]byte
	timeout time.Duration // of each try; 0 for none
	retries int           // how often it is tried again after a temporary failure
	patient bool          // while the broker refuses it, it is sent again within its timeout
	mobile  bool          // another broker may get it, if one refuses it because it stops
	stream  *callStream   // nil unless it takes partial replies

	ended bool
	reply Reply
	err   error // why there is no reply: wraps errCancelled or one of the failures below

	number      int    // in the order of begin
	correlation string // the frame by which the reply to this try is known, or empty
	tries       int
	cancelling  bool      // the broker was asked to drop it
	due         time.Time // the end of its timeout; zero for never
	resume      time.Time // the end of its pause
}

// status returns the exit status that the end of the call means.
func (c *call) status() int {
	if c.err != nil {
		return failureOf(c.err).status
	}
	return c.reply.Status
}

// temporary tells whether the same request may well end differently next time.
func (c *call) temporary() bool {
	switch c.status() {
	case exitUnavailable, exitTemporary, exitTimeout:
		return true
	}
	return false
}

// mayQueue tells whether a broker may put the request into a queue. It answers requests to
// itself at once.
func (c *call) mayQueue() bool { return !isManagement(c.service) }

// refused tells whether the broker itself refused the call, so that it has certainly not begun.
func (c *call) refused() bool {
	return c.err == nil && c.reply.FromBroker && c.reply.Status == exitTemporary
}

// Why a call has no reply.
var (
	errNoBroker = &failure{status: exitUnavailable, err: errors.New("no broker"),
		hint: "start one with bbroker, or tell where it is with --broker, --host or --port"}
	errLost = &failure{status: exitUnavailable, err: errors.New("lost the broker"),
		hint: "the command may have run, or the request is longer than bbroker --max-message"}
	errTimeout  = &failure{status: exitTimeout, err: errors.New("no reply")}
	errProtocol = &failure{status: exitProtocol, err: errors.New("bad reply"), hint: "is that an MDP broker?"}

	errCancelled     = errors.New("cancelled")
	errNoCorrelation = errors.New("it does not tell which request it is for")
)

// A caller makes calls over one connection. It is a state machine that knows no socket and no clock:
// the loop around it calls a method for each event. The loop also opens a connection when
// needsConnection says so, and closes its own when the caller has dropped it.
//
// A call waits until the connection takes it, is then in flight, and ends once, with a reply or
// an error. After a temporary failure it pauses before its next try, if it has one left. If it is
// patient and the broker has refused it, it waits again, and all those that wait are held back.
type caller struct {
	endpoint string // of the broker, or of all that it may be, for errors

	// several tells that there are other brokers. Calls that have not begun then leave one that is lost
	// or about to stop.
	several bool
	left    bool // the broker was left, since the loop looked last
	stops   bool // because it is about to stop

	// With correlation, any number of calls are in flight: each has a frame of its own at the
	// head of its address, which a broker that knows address stacks gives back. Without it there
	// is one at a time, as RFC 7 spells it.
	correlated bool

	retrying func(c *call, pause time.Duration) // told of each retry; may be nil

	conn    *connection // nil if there is none
	waiting []*call     // the next one to send first
	pausing []*call
	ended   []*call   // since the last takeEnded
	due     time.Time // nothing is due before; zero for never
	begun   int

	held holdBack
}

// A connection to a broker, which may not be up yet.
type connection struct {
	send      func(frames [][]byte) error
	connected bool             // the broker is there
	inFlight  map[string]*call // by correlation
	cancels   int              // that the broker has not confirmed
	cancelled time.Time        // when the first of them was sent, or the broker was heard since
	received  func() uint64    // bytes over the connection so far; 0 if that is unknown
	heard     uint64           // of them, when that was checked last
	closing   time.Time        // when it is closed even if cancels are left; zero while it takes calls
	draining  bool             // the broker is about to stop, and would refuse what is sent to it
	failed    *call            // ends when the connection is closed; only without correlation

	support     support   // of the broker for partial replies
	answerDue   time.Time // when the broker should have told that; zero if nothing is asked or it is not there
	asked       bool      // it was asked, perhaps before the connection broke
	lateAnswers int       // to mmi.credit for calls that have ended; only without correlation
}

// cancelPatience is how long a connection waits for the broker to confirm that it dropped
// requests. Brokers other than ours do not know mmi.cancel.
const cancelPatience = 500 * time.Millisecond

// brokerPatience is how long a broker may take for that before calls go to another one.
const brokerPatience = 5 * time.Second

// begin takes a new call.
func (r *caller) begin(c *call, now time.Time) {
	r.begun++
	c.number, c.mobile = r.begun, r.several
	r.try(c, now)
}

func (r *caller) try(c *call, now time.Time) {
	c.tries++
	if r.correlated {
		// What still comes for an earlier try must not end this one.
		c.correlation = fmt.Sprintf("%d.%d", c.number, c.tries)
	}
	c.startTimeout(now)
	r.due = earlier(r.due, c.due)
	r.waiting = append(r.waiting, c)
}

func (c *call) startTimeout(now time.Time) {
	c.due = time.Time{}
	if c.timeout > 0 {
		c.due = now.Add(c.timeout)
	}
}

// busy tells whether the caller has calls.
func (r *caller) busy() bool {
	return len(r.waiting)+len(r.pausing) > 0 || r.conn != nil && (len(r.conn.inFlight) > 0 || r.conn.failed != nil)
}

// needsConnection tells whether calls wait for a connection.
func (r *caller) needsConnection() bool { return r.conn == nil && len(r.waiting) > 0 }

// open gives the caller a connection. What it sends before a broker is there waits in the socket.
func (r *caller) open(send func(frames [][]byte) error) {
	r.conn = &connection{send: send, received: func() uint64 { return 0 }, inFlight: map[string]*call{}}
	r.held = holdBack{}
}

// flush sends the calls that wait, as long as the connection takes them, and what else is to be said. It
// tells whether to call it again when the connection takes messages again.
func (r *caller) flush(now time.Time) (blocked bool) {
	for r.mayCall() {
		c := r.waiting[0]
		if c.stream != nil && r.conn.support < supportNone {
			return r.ask(now) || r.grant()
		}
		err := r.sendIn(r.dialectFor(c), c.service, c.body, c.correlation)
		if err == errWouldBlock {
			return true
		}
		r.waiting = r.waiting[1:]
		r.conn.inFlight[c.correlation] = c
		if err != nil {
			return false // The connection broke within the message. lost is about to be called.
		}
		if c.stream != nil {
			c.stream.reset(r.conn)
		}
		if r.conn.connected {
			c.release()
		}
	}
	return r.grant()
}

// mayCall tells whether there is a call to be sent, and a connection that takes it.
func (r *caller) mayCall() bool {
	return len(r.waiting) > 0 && r.conn != nil && r.conn.takesCalls(r.correlated) && !(r.several && r.conn.cancels > 0) && r.held.allows(len(r.conn.inFlight))
}

// takesCalls tells whether another call may be sent over the connection, which may be nil: then it is
// still to be opened.
func (k *connection) takesCalls(correlated bool) bool {
	return k == nil || k.closing.IsZero() && !k.draining && (correlated || len(k.inFlight) == 0)
}

// setConnected is called when the broker is there. From now on a call is either answered over this
// connection or fails with it.
func (r *caller) setConnected() {
	if r.conn == nil || r.conn.connected {
		return
	}
	r.conn.connected = true
	for _, c := range r.conn.inFlight {
		c.release()
	}
}

// release frees the body of a call that was sent and is not sent again: the reply may need the memory.
func (c *call) release() {
	if c.tries > c.retries && !c.patient && !c.mobile {
		length := sizeOf(c.body)
		c.body = nil
		freeMemory(length)
	}
}

// sendIn sends a request in a dialect of clients.
func (r *caller) sendIn(dialect Dialect, service string, body [][]byte, correlation string) error {
	m := Message{Dialect: dialect, Kind: KindRequest, Service: []byte(service), Body: body}
	if correlation != "" {
		m.Address = [][]byte{[]byte(correlation)}
	}
	return r.conn.send(m.Frames())
}

// sendCancel asks the broker to drop a request if it has not begun, or all of them if the
// correlation is empty.
func (r *caller) sendCancel(correlation string, now time.Time) {
	if err := r.sendIn(r.conn.streamDialect(), mmiCancel, emptyBody, correlation); err == nil {
		if r.conn.cancels++; r.conn.cancels == 1 {
			r.conn.cancelled = now
		}
	}
}

// receive takes a message of the broker.
func (r *caller) receive(frames [][]byte, now time.Time) {
	r.setConnected() // The monitor does not report peers that speak ZMTP 2.
	m, err := Parse(frames)
	if r.takeAnswer(m) {
		return
	}
	m, err = r.complete(m, frames, err)
	c := r.conn.inFlight[r.correlationOf(m)]
	hasPartials := m.Dialect.hasPartials()
	switch {
	case err != nil:
	case !m.Dialect.ofClient(), hasPartials && m.Kind == KindRequest, hasPartials && c != nil && (c.stream == nil || !c.stream.dialect.hasPartials()):
		err = fmt.Errorf("an unexpected %v", m.Kind)
	case r.correlated && len(m.Address) != 1 && string(m.Service) != mmiCancel:
		err = errNoCorrelation
	}
	if err != nil {
		r.fail(fmt.Errorf("%w from %s: %w", errProtocol, r.endpoint, err), now)
		return
	}

	switch {
	case string(m.Service) == mmiCancel && (c == nil || c.service != mmiCancel):
		r.conn.cancels--
		r.conn.cancelled = now // The others get their time, too.
		if c != nil && c.cancelling && len(m.Body) == 1 && string(m.Body[0]) == mmiFound {
			r.end(c, Reply{}, errCancelled, now)
		}
		r.closeIfDone(now)
	case string(m.Service) == mmiCredit && (c == nil || c.service != mmiCredit):
		r.creditAnswered(c, m.Body)
	case c == nil:
		// It comes too late.
	case string(m.Service) != c.service:
		r.end(c, Reply{}, fmt.Errorf("%w from %s: it is from service %q", errProtocol, r.endpoint, m.Service), now)
	case m.Kind == KindPartial:
		r.takePart(c, ParseReply(m.Body))
	default:
		reply := ParseReply(m.Body)
		if reply.FromBroker && bytes.HasSuffix(reply.Stderr, []byte(shuttingDown+"\n")) {
			r.conn.draining = true
		}
		r.end(c, reply, nil, now)
	}
	r.leaveIfDone()
}

// correlationOf returns the correlation of the call that a message is for.
func (r *caller) correlationOf(m Message) string {
	if r.correlated && len(m.Address) == 1 {
		return string(m.Address[0])
	}
	return ""
}

// leaveIfDone drops the connection to a broker that is about to stop, when it owes no reply.
func (r *caller) leaveIfDone() {
	if r.several && r.conn != nil && r.conn.draining && r.conn.closing.IsZero() && len(r.conn.inFlight) == 0 {
		r.leave()
		r.stops = true
	}
}

// recall drops a connection that was not there yet. The calls are in the socket, from where they would go to
// a broker that comes later.
func (r *caller) recall() {
	if r.conn != nil {
		r.waiting = slices.Concat(r.inFlightInOrder(), r.waiting)
		r.conn = nil
	}
}

// leave drops the connection. What waits goes to another broker.
func (r *caller) leave() { r.conn, r.left = nil, true }

// avoided tells whether calls that wait had better go to another broker: this one is about to stop, or it
// confirms no cancels, as one that is frozen.
func (r *caller) avoided(now time.Time) bool {
	k := r.conn
	return r.several && k != nil && k.closing.IsZero() && (k.draining || k.cancels > 0 && now.Sub(k.cancelled) >= cancelPatience)
}

// handOver gives the calls that wait to another caller.
func (r *caller) handOver(other *caller) {
	for _, c := range r.waiting {
		other.begun++
		c.number = other.begun
		if other.correlated {
			c.correlation = fmt.Sprintf("%d.%d", c.number, c.tries)
		}
		other.due = earlier(other.due, c.due)
	}
	other.waiting, r.waiting = append(other.waiting, r.waiting...), nil
}

// asks tells whether a call to a service without a correlation is in flight.
func (r *caller) asks(service string) bool {
	c := r.conn.inFlight[""]
	return c != nil && c.service == service
}

// lost is called when the connection broke, after its last messages.
func (r *caller) lost(now time.Time) {
	if r.conn == nil {
		return
	}
	r.conn.connected, r.conn.draining, r.conn.cancels = false, false, 0
	r.conn.support, r.conn.answerDue, r.conn.lateAnswers = supportUnknown, time.Time{}, 0 // Another broker may come.
	r.held = holdBack{}
	r.closeIfDone(now)
	r.fail(fmt.Errorf("%w at %s before its reply", errLost, r.endpoint), now)
	if r.several {
		r.leave()
	}
}

// fail ends the calls in flight and drops the connection. Without calls in flight nothing is
// lost, and the connection stays: ZeroMQ makes it again.
func (r *caller) fail(err error, now time.Time) {
	if r.conn == nil || len(r.conn.inFlight) == 0 {
		return
	}
	calls := r.inFlightInOrder()
	r.conn = nil
	for _, c := range calls {
		r.end(c, Reply{}, err, now)
	}
}

// refuse ends all calls and drops the connection: there will be none.
func (r *caller) refuse(err error, now time.Time) {
	calls := slices.Concat(r.waiting, r.pausing)
	if r.conn != nil {
		calls = append(r.inFlightInOrder(), calls...)
	}
	r.conn, r.waiting, r.pausing = nil, nil, nil
	for _, c := range calls {
		r.end(c, Reply{}, err, now)
	}
}

// inFlightInOrder returns the calls in flight in the order of begin.
func (r *caller) inFlightInOrder() []*call {
	return slices.SortedFunc(maps.Values(r.conn.inFlight), func(a, b *call) int { return cmp.Compare(a.number, b.number) })
}

// end ends a try of a call. Without correlation a failure also ends the connection, and before it
// the call does not end: a late reply must not be taken for that of the next call.
func (r *caller) end(c *call, reply Reply, err error, now time.Time) {
	c.reply, c.err = reply, err
	if r.conn != nil && r.conn.inFlight[c.correlation] == c {
		delete(r.conn.inFlight, c.correlation)
		if err != nil && !r.correlated {
			r.conn.failed = c
			r.close(now)
			return
		}
		if c.stream != nil && c.stream.granting {
			r.conn.lateAnswers++
		}
	}
	r.conclude(c, now)
}

// conclude ends a call, or lets it wait or pause before it is sent again.
func (r *caller) conclude(c *call, now time.Time) {
	refused := c.refused()
	switch {
	case (c.patient || c.mobile && r.conn != nil && r.conn.draining) && refused && (c.due.IsZero() || now.Before(c.due)):
		r.held.refused(len(r.conn.inFlight), now)
		r.waiting = append([]*call{c}, r.waiting...)
		r.due = earlier(r.due, earlier(c.due, r.held.probe))
		return
	case c.temporary() && c.tries <= c.retries:
		r.pause(c, now)
	default:
		c.ended = true
		r.ended = append(r.ended, c)
	}
	if c.err == nil && !refused {
		r.held.answered()
	}
}

// pause lets a call pause before its next try.
func (r *caller) pause(c *call, now time.Time) {
	pause := jitter(backoff(c.tries))
	c.resume = now.Add(pause)
	r.due = earlier(r.due, c.resume)
	r.pausing = append(r.pausing, c)
	if r.retrying != nil {
		r.retrying(c, pause)
	}
}

// jitter returns a pause of half its length at least: those who failed together must not come back
// together.
func jitter(pause time.Duration) time.Duration { return pause/2 + rand.N(pause/2) }

// A holdBack limits the calls in flight after a refusal to those that were not refused: more would be
// refused again and again. Each reply allows one more, and so does a pause.
type holdBack struct {
	limited  bool
	window   int       // calls that may be in flight
	refusals int       // in a row
	probe    time.Time // when one more is allowed
	probing  bool      // it was, and nothing is known of it
}

// maxProbePause limits the time until one more call is allowed.
const maxProbePause = time.Second

func (h *holdBack) allows(inFlight int) bool { return !h.limited || inFlight < h.window }

// refused is called when a call was refused, with the number of those that are still in flight.
func (h *holdBack) refused(inFlight int, now time.Time) {
	h.window = inFlight
	if !h.limited || h.probing { // Others were sent together with a call that was refused.
		h.limited, h.probing = true, false
		h.refusals++
		h.pause(now)
	}
}

func (h *holdBack) pause(now time.Time) {
	h.probe = now.Add(jitter(min(backoff(max(1, h.refusals)), maxProbePause)))
}

// answered is called for each reply that is no refusal.
func (h *holdBack) answered() {
	h.window++
	h.refusals = 0
}

// allowOne allows one more call at the time of the probe.
func (h *holdBack) allowOne(inFlight int, now time.Time) {
	if h.limited && !now.Before(h.probe) {
		h.window, h.probing = inFlight+1, true
		h.pause(now)
	}
}

// has tells whether the caller has a call that has not ended.
func (r *caller) has(c *call) bool {
	inConnection := r.conn != nil && (r.conn.inFlight[c.correlation] == c || r.conn.failed == c)
	return inConnection || slices.Contains(r.waiting, c) || slices.Contains(r.pausing, c)
}

// takeEnded returns the calls that ended since the last time.
func (r *caller) takeEnded() []*call {
	ended := r.ended
	r.ended = nil
	return ended
}

// cancel asks for the end of a call: it ends with errCancelled if it has not begun, and otherwise
// as if nothing had been asked. It is not sent again.
func (r *caller) cancel(c *call, now time.Time) {
	c.retries, c.patient, c.mobile = 0, false, false
	for _, list := range []*[]*call{&r.waiting, &r.pausing} {
		if i := slices.Index(*list, c); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
			r.end(c, Reply{}, errCancelled, now)
			return
		}
	}
	if r.conn != nil && r.conn.inFlight[c.correlation] == c {
		c.cancelling = true
		r.sendCancel(c.correlation, now)
	}
}

// abandon gives up all calls. The connection stays until the broker has confirmed that it dropped
// those that it had in a queue; calls may still end meanwhile.
func (r *caller) abandon(now time.Time) {
	r.waiting, r.pausing = nil, nil
	if r.conn == nil {
		return
	}
	queued := false
	for _, c := range r.conn.inFlight {
		c.retries, c.patient, c.mobile = 0, false, false
		queued = queued || c.mayQueue()
		if c.stream != nil {
			delete(r.conn.inFlight, c.correlation) // More parts are for nobody.
		}
	}
	if queued && r.conn.connected {
		r.sendCancel("", now)
	}
	r.close(now)
}

// close takes no more calls over this connection, and drops it once cancels are confirmed.
func (r *caller) close(now time.Time) {
	r.conn.closing = now.Add(cancelPatience)
	r.closeIfDone(now)
}

func (r *caller) closeIfDone(now time.Time) {
	k := r.conn
	if k == nil || k.closing.IsZero() || k.cancels > 0 && k.connected && now.Before(k.closing) {
		return
	}
	r.conn = nil
	if k.failed != nil {
		r.conclude(k.failed, now)
	}
}

// deadline returns when tick has something to do, zero for never.
func (r *caller) deadline() time.Time {
	if r.conn == nil {
		return r.due
	}
	due := earlier(earlier(r.due, r.conn.closing), r.conn.answerDue)
	if r.several && r.conn.cancels > 0 {
		due = earlier(due, r.conn.cancelled.Add(brokerPatience))
		if len(r.waiting) > 0 {
			due = earlier(due, r.conn.cancelled.Add(cancelPatience))
		}
	}
	return due
}

// tick does what is due.
func (r *caller) tick(now time.Time) {
	r.closeIfDone(now)
	r.doubt(now)
	if k := r.conn; r.several && k != nil && k.cancels > 0 {
		// The answer waits behind a long frame. Bytes that arrive are a sign of life as well.
		if n := k.received(); n != k.heard {
			k.heard, k.cancelled = n, now
		}
		if now.Sub(k.cancelled) >= brokerPatience {
			r.lost(now)
		}
	}
	if !r.due.IsZero() && !now.Before(r.due) {
		r.expire(now)
	}
	r.leaveIfDone()
}

// expire ends the calls whose time is over, and tries again those whose pause is over.
func (r *caller) expire(now time.Time) {
	r.due = time.Time{}
	split := func(calls []*call, due func(*call) time.Time) (rest, overdue []*call) {
		for _, c := range calls {
			if t := due(c); !t.IsZero() && !now.Before(t) {
				overdue = append(overdue, c)
			} else {
				rest = append(rest, c)
				r.due = earlier(r.due, t)
			}
		}
		return rest, overdue
	}
	timeout := func(c *call) time.Time { return c.due }

	var overdue, again []*call
	if r.conn != nil {
		if _, overdue = split(r.inFlightInOrder(), timeout); len(overdue) > 0 && !r.conn.connected {
			r.recall()
			overdue = nil
		}
	}
	for _, c := range overdue {
		if c.mayQueue() {
			r.sendCancel(c.correlation, now)
		}
		r.end(c, Reply{}, c.silence(r.endpoint), now)
	}
	r.waiting, overdue = split(r.waiting, timeout)
	for _, c := range overdue {
		if c.refused() {
			r.conclude(c, now)
			continue
		}
		err := fmt.Errorf("%w at %s within %v", errNoBroker, r.endpoint, c.timeout)
		if r.conn != nil && r.conn.connected {
			err = c.silence(r.endpoint)
		}
		r.end(c, Reply{}, err, now)
	}
	r.pausing, again = split(r.pausing, func(c *call) time.Time { return c.resume })
	for _, c := range again {
		c.reply, c.err = Reply{}, nil
		r.try(c, now)
	}
	if r.conn == nil || len(r.waiting) == 0 {
		r.held = holdBack{}
		return
	}
	r.held.allowOne(len(r.conn.inFlight), now)
	r.due = earlier(r.due, r.held.probe)
}
