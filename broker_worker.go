package main

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"log/slog"
	"slices"
)

// A brokerWorker serves one service, one request at a time.
type brokerWorker struct {
	identity    string
	user        string   // as in sender
	address     [][]byte // the identity as a frame
	dialect     Dialect
	queue       peerQueue
	source      int    // the descriptor of its connection, or -1
	received    uint64 // bytes over its connection, when it was last silent
	service     *brokerService
	request     *brokerRequest // nil when idle or elsewhere
	elsewhere   bool           // it handed a request back, since it works for other brokers, until READY
	idleElement *list.Element  // its place among the idle workers, nil when busy or elsewhere
	silence     int            // heartbeats since it was last heard
	busy        int            // heartbeats since it was given its request
	heard       int            // heartbeats that it sent since then

	gone    bool // its connection broke
	isOurs  bool // it knows what is not in the RFCs
	cancels bool // it ends its command if it gets DISCONNECT

	// beatsWhileBusy tells that it sends heartbeats while it works; many workers cannot.
	beatsWhileBusy bool
}

// register takes READY of a new worker.
func (b *Broker) register(from sender, mine *grant, identity []byte, m Message) {
	name := m.Service
	w := &brokerWorker{identity: string(identity), user: from.user, address: [][]byte{bytes.Clone(identity)}, dialect: m.Dialect, source: from.source,
		isOurs: bytes.HasPrefix(identity, []byte(workerPrefix)), cancels: len(m.Body) > 0 && string(m.Body[0]) == cancels}
	w.beatsWhileBusy = w.isOurs
	if isManagement(string(name)) {
		b.log.warn("peer "+w.identity, "worker refused", "worker", logged(w.identity), "service", logged(string(name)), "why", "the name is the broker's own")
		b.tell(w, Message{Kind: KindDisconnect})
		return
	}
	if !mine.mayServe(string(name)) {
		b.unauthorized(from.user, mine, "serve", string(name))
		refusal := Message{Kind: KindDisconnect}
		if w.isOurs { // A worker of others may not understand more.
			refusal.Body = [][]byte{[]byte(notAllowed), fmt.Appendf(nil, "%s may not serve %s", mine.holder(), name)}
		}
		b.tell(w, refusal)
		return
	}
	b.log.event(slog.LevelInfo, "worker came", "worker", logged(w.identity), "service", logged(string(name)))
	w.queue = b.outlet.newQueue()
	w.service = b.service(name)
	if w.service.workers++; w.service.workers == 1 {
		b.unserved--
	}
	b.workers[w.identity] = w
	if w.cancels {
		b.cancelling++
	}
	b.makeIdle(w)
	b.dispatch(w.service)
}

// receiveWorker takes any other message of a registered worker.
func (b *Broker) receiveWorker(w *brokerWorker, m Message) {
	w.silence = 0
	why, handsBack := m.because(handedBack)
	switch {
	case m.Kind == KindHeartbeat:
		// One may have crossed the request on its way.
		if w.heard++; w.heard > 1 && w.request != nil {
			w.beatsWhileBusy = true
		}
	case handsBack && w.request != nil && !w.request.begun:
		b.handBack(w, why)
	case m.Kind == KindDisconnect:
		b.log.event(slog.LevelInfo, "worker left", "worker", logged(w.identity), "service", logged(w.service.name), "why", "it sent DISCONNECT")
		// It has not begun its request, or it would have replied first.
		if r := b.remove(w); r != nil && r.begun {
			b.fail(r, exitUnavailable, "the worker left before the end of its reply")
		} else if r != nil {
			r.returned++
			b.takeBack(r, r.returned <= frontReturns)
		}
	case m.Kind == KindReady && w.elsewhere && string(m.Service) == w.service.name:
		b.makeIdle(w)
		b.dispatch(w.service)
		if w.idleElement != nil { // It has reserved a job, and must know that there is no request.
			b.tell(w, Message{Kind: KindHeartbeat})
		}
	default:
		b.disconnect(w, fmt.Sprintf("an unexpected %v", m.Kind))
	}
	b.dispatch(w.service)
}

// receiveOutcome takes a PARTIAL or REPLY of a registered worker. Some workers leave out the empty frame
// behind the address, so that a body begins there.
func (b *Broker) receiveOutcome(w *brokerWorker, m Message, delimited bool) {
	w.silence = 0
	r := w.request
	if r == nil || len(m.Client) == 0 || string(m.Client[0]) != string(r.token) {
		b.disconnect(w, fmt.Sprintf("a %v to a request that it was not given", m.Kind))
		b.dispatch(w.service)
		return
	}
	body := m.Body
	if len(m.Client) > 1 {
		body = m.Client[1:]
		if delimited { // by an empty frame of the body
			body = slices.Concat(body, [][]byte{nil}, m.Body)
		}
	}
	if m.Kind == KindPartial {
		b.receivePartial(w, body)
		return
	}
	if !r.ended {
		b.receiveReply(w, body)
	}
	b.makeIdle(w)
	b.dispatch(w.service)
}

// receiveReply takes the reply to the request of a worker.
func (b *Broker) receiveReply(w *brokerWorker, body [][]byte) {
	r := w.request
	b.count(w.service, repliesTotal, 1)
	if ParseReply(body).Status != 0 {
		b.count(w.service, failuresTotal, 1)
	}
	b.observe(w.service, serveSeconds, b.now.Sub(r.started))
	if b.debug {
		b.log.Debug("request done", "request", string(r.token), "service", logged(w.service.name), "took", b.now.Sub(r.started))
	}
	b.end(r)
	if b.mayGoOn(r) {
		if r.gathered != nil {
			body = slices.Concat(r.gathered, body)
		}
		b.deliver(r, body)
	} else {
		b.forbid(r, true)
	}
}

// handBack takes a request back from a worker that works for other brokers. That may happen to a request any
// number of times. The worker stays registered: its service is there, and its requests can wait for it.
func (b *Broker) handBack(w *brokerWorker, why string) {
	r := w.request
	if b.debug {
		b.log.Debug("request handed back", "request", string(r.token), "service", logged(w.service.name), "worker", logged(w.identity), "why", logged(why))
	}
	w.request, w.elsewhere = nil, true
	w.service.elsewhere++
	if r.worker = nil; !r.ended {
		b.takeBack(r, true)
	}
}

// makeIdle puts a worker at the tail of the idle list of its service.
func (b *Broker) makeIdle(w *brokerWorker) {
	w.request = nil
	w.comeBack()
	w.idleElement = w.service.idle.PushBack(w)
}

// comeBack ends the time in which a worker works for other brokers.
func (w *brokerWorker) comeBack() {
	if w.elsewhere {
		w.elsewhere = false
		w.service.elsewhere--
	}
}

// heartbeat sends a worker a heartbeat, and disconnects one that was silent for too many of them.
// Silence is counted in heartbeats of the broker, so that no worker pays for a time in which the
// broker stood still.
func (b *Broker) heartbeat(w *brokerWorker) {
	w.busy++
	if w.request == nil || w.beatsWhileBusy {
		w.silence++
	}
	if w.silence > 1 {
		// A heartbeat waits behind a long frame. Bytes that arrive are a sign of life as well.
		if n := b.outlet.received(w.source); n != w.received {
			w.received, w.silence = n, 1
		}
	}
	if w.silence > b.Liveness {
		b.disconnect(w, fmt.Sprintf("silent for %d heartbeats", b.Liveness))
	} else if err := b.tell(w, Message{Kind: KindHeartbeat}); err != nil && err != errWouldBlock {
		// One that does not read is not lost yet: its silence decides. Of one that is gone, a reply or
		// DISCONNECT may still have to be received.
		if w.gone || w.request == nil {
			b.loseWorker(w, err)
		}
		w.gone = true
	}
	b.dispatch(w.service)
}

// disconnect sends DISCONNECT to a worker that broke the protocol or fell silent, and gives it up.
func (b *Broker) disconnect(w *brokerWorker, why string) {
	b.tell(w, Message{Kind: KindDisconnect})
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
	b.log.event(slog.LevelWarn, "worker lost", "worker", logged(w.identity), "service", logged(w.service.name), "request", token, "why", why)
	b.count(w.service, lostWorkersTotal, 1)
	switch {
	case r == nil:
	case r.redelivered < b.Redeliver && !r.begun && !b.draining && b.mayGoOn(r):
		r.redelivered++
		b.count(r.service, redeliveredTotal, 1)
		b.enqueue(r, true)
	default:
		b.fail(r, exitUnavailable, "the worker was lost while it had the request; the command may have run")
	}
}

// takeBack puts a request that a worker returned into the queue again, perhaps ahead of those that wait,
// unless it comes back from each worker.
func (b *Broker) takeBack(r *brokerRequest, ahead bool) {
	switch {
	case b.draining:
		b.end(r)
		b.refuse(r, shuttingDown)
	case r.client.replaced:
		b.end(r)
		b.count(r.service, abandonedTotal, 1)
	case !b.mayGoOn(r):
		b.end(r)
		b.forbid(r, false)
	case r.returned >= maxReturns:
		b.count(r.service, poisonedTotal, 1)
		b.fail(r, exitUnavailable, fmt.Sprintf("%d workers returned the request", maxReturns))
	default:
		b.enqueue(r, ahead)
	}
}

// remove forgets a worker and returns the request that it had, nil if there is none or it has ended.
func (b *Broker) remove(w *brokerWorker) *brokerRequest {
	delete(b.workers, w.identity)
	if w.cancels {
		b.cancelling--
	}
	w.queue.close()
	w.comeBack()
	if w.service.workers--; w.service.workers == 0 {
		w.service.unservedAt = b.now
		b.unserved++
	}
	if w.idleElement != nil {
		w.service.idle.Remove(w.idleElement)
	}
	r := w.request
	if r == nil || r.ended {
		return nil
	}
	r.worker = nil
	return r
}

// tell sends a message to a worker, in its dialect. An error is that of sendTo.
func (b *Broker) tell(w *brokerWorker, m Message) error {
	m.Dialect = w.dialect
	return b.sendTo(w.address, w.queue, m)
}
