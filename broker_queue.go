package main

import (
	"container/list"
	"log/slog"
	"slices"
	"time"
)

// A peerQueue is what ZeroMQ holds for one peer, which has not read it yet.
type peerQueue interface {
	size() size
	// notify lets ClientsHaveRead be called, once, when the queue is down to low bytes or less.
	notify(low size)
	close()
}

// A brokerClient is a client that has sent a request, until its requests have ended and it has read
// the replies. Clients are told apart by their identity.
type brokerClient struct {
	identity   string
	user       string // as in sender
	replaced   bool   // another user has the identity now
	queue      peerQueue
	unfinished int              // requests
	held       size             // of these requests
	recallable addressNode      // those of them that wait, or run and can be ended
	owed       []*brokerRequest // that broke, and whose end the client has not read enough to take
	goneSince  time.Time        // when its connection broke; zero while it is there
}

// An addressNode holds the requests of a client that can be recalled and whose address begins with the same
// frames, so that mmi.cancel finds them by a part of their address.
type addressNode struct {
	parent   *addressNode
	frame    string // that distinguishes it from its siblings
	children map[string]*addressNode
	requests list.List // of *brokerRequest, whose address ends here
}

// costOfNodes returns the bytes that the nodes for the frames behind the identity take, if no other
// request shares them.
func costOfNodes(address [][]byte) size {
	return sizeOf(address[1:]) + nodeCost*size(len(address)-1)
}

// child returns the node for one more frame of an address, a new one if there is none.
func (n *addressNode) child(frame []byte) *addressNode {
	c, ok := n.children[string(frame)]
	if !ok {
		c = &addressNode{parent: n, frame: string(frame)}
		if n.children == nil {
			n.children = map[string]*addressNode{}
		}
		n.children[c.frame] = c
	}
	return c
}

// find returns the node of an address without its identity, or nil if there is none.
func (n *addressNode) find(address [][]byte) *addressNode {
	for _, frame := range address {
		if n = n.children[string(frame)]; n == nil {
			return nil
		}
	}
	return n
}

// prune removes the node, and then its parents, as far as they are empty.
func (n *addressNode) prune() {
	for n.parent != nil && n.requests.Len() == 0 && len(n.children) == 0 {
		delete(n.parent.children, n.frame)
		n = n.parent
	}
}

// all appends the requests of the node and of all nodes below it.
func (n *addressNode) all(requests []*brokerRequest) []*brokerRequest {
	for e := n.requests.Front(); e != nil; e = e.Next() {
		requests = append(requests, e.Value.(*brokerRequest))
	}
	for _, c := range n.children {
		requests = c.all(requests)
	}
	return requests
}

// A clientQueue is the waiting requests of one client for one service, in their order.
type clientQueue struct {
	client   *brokerClient
	requests list.List     // of *brokerRequest
	turn     *list.Element // its place in the turns of the service
}

// next returns the request whose turn it is, or nil if none waits.
func (s *brokerService) next() *brokerRequest {
	if s.waiting == 0 {
		return nil
	}
	return s.turns.Front().Value.(*clientQueue).requests.Front().Value.(*brokerRequest)
}

// full tells whether the queue of a service has no room for a request of a client. If max requests
// wait, there is room only for clients that have less than an equal share of them: one client cannot
// shut the others out.
func (s *brokerService) full(c *brokerClient, max int) bool {
	if s.waiting < max {
		return false
	}
	q, ok := s.queues[c]
	return !ok && len(s.queues) >= max || ok && q.requests.Len() >= max/len(s.queues)
}

// enqueue puts a request at the end of the queue of its client, or ahead of all that came later, and then
// the next turn is that of its client.
func (b *Broker) enqueue(r *brokerRequest, ahead bool) {
	s := r.service
	q, ok := s.queues[r.client]
	if !ok {
		q = &clientQueue{client: r.client}
		q.turn = s.turns.PushBack(q)
		if s.queues == nil {
			s.queues = map[*brokerClient]*clientQueue{}
		}
		s.queues[r.client] = q
	}
	r.inQueue = q.requests.PushBack(r)
	if ahead {
		// Only those that workers returned as well can have come earlier.
		first := q.requests.Front()
		for first.Value.(*brokerRequest).number < r.number {
			first = first.Next()
		}
		q.requests.MoveBefore(r.inQueue, first)
		s.turns.MoveToFront(q.turn)
	}
	s.waiting++
	b.index(r)
}

// index lets mmi.cancel and mmi.credit find a request.
func (b *Broker) index(r *brokerRequest) {
	if r.node != nil {
		return
	}
	r.node = &r.client.recallable
	for _, frame := range r.address[1:] {
		r.node = r.node.child(frame)
	}
	r.inNode = r.node.requests.PushBack(r)
}

func (r *brokerRequest) unindex() {
	if r.node == nil {
		return
	}
	r.node.requests.Remove(r.inNode)
	r.node.prune()
	r.node, r.inNode = nil, nil
}

// dequeue takes a request out of the queue. If it had its turn, the other clients are next.
func (b *Broker) dequeue(r *brokerRequest, hadTurn bool) {
	s := r.service
	q := s.queues[r.client]
	q.requests.Remove(r.inQueue)
	s.waiting--
	if q.requests.Len() == 0 {
		s.turns.Remove(q.turn)
		delete(s.queues, r.client)
	} else if hadTurn {
		s.turns.MoveToBack(q.turn)
	}
	r.inQueue = nil
}

// client returns the client of a user with an identity, a new one if there is none. If another user had
// the identity before, nobody awaits the replies to that one any more.
func (b *Broker) client(identity []byte, user string) *brokerClient {
	c, ok := b.clients[string(identity)]
	if ok && c.user != user {
		c.replaced, ok = true, false
		b.forgetClient(c)
	}
	if !ok {
		c = &brokerClient{identity: string(identity), user: user, queue: b.outlet.newQueue()}
		b.clients[c.identity] = c
	}
	return c
}

// sweepClients forgets clients that are done, and gives up the requests of those that are gone for good.
func (b *Broker) sweepClients() {
	for identity, c := range b.clients {
		b.payOwed(c)
		if !c.goneSince.IsZero() && b.now.Sub(c.goneSince) >= b.silenceLimit() {
			b.recall(c.recallable.all(nil), abandonedTotal, "its client is gone")
		}
		if c.unfinished == 0 && c.queue.size() == 0 {
			b.forgetClient(c)
			delete(b.clients, identity)
		}
	}
}

// forgetClient gives up what a client has, and its queue.
func (b *Broker) forgetClient(c *brokerClient) {
	b.recall(c.recallable.all(nil), abandonedTotal, "its client is gone")
	b.dropOwed(c)
	c.queue.close()
}

// recall gives up requests of which nobody awaits a reply. It counts those that wait for a reason; those that
// run are cancelled.
func (b *Broker) recall(requests []*brokerRequest, reason counter, why string) {
	for _, r := range requests {
		if r.inQueue == nil {
			b.giveUp(r, cancelledTotal, why)
			continue
		}
		b.dequeue(r, false)
		b.end(r)
		b.count(r.service, reason, 1)
		b.dispatch(r.service)
	}
}

// giveUp ends a request that a worker has, because nobody awaits its reply any more, and counts it.
func (b *Broker) giveUp(r *brokerRequest, reason counter, why string) {
	w := r.worker
	b.end(r)
	b.count(r.service, reason, 1)
	b.log.event(slog.LevelInfo, "request cancelled", "request", string(r.token), "service", logged(r.service.name),
		"client", logged(r.client.identity), "worker", logged(w.identity), "why", why)
	if !w.takesCancel(r) {
		return // It goes on in vain: its reply will be dropped.
	}
	b.tell(w, Message{Kind: KindDisconnect})
	b.remove(w)
	w.service.returning = b.now.Add(b.silenceLimit())
	b.dispatch(w.service)
}

// takesCancel tells whether a worker ends the command of a request when it gets DISCONNECT. To one that
// has not shown that, nothing new is said.
func (w *brokerWorker) takesCancel(r *brokerRequest) bool { return w.cancels || w.isOurs && r.partials }

// running returns those of the requests that a worker has.
func running(requests []*brokerRequest) []*brokerRequest {
	return slices.DeleteFunc(requests, func(r *brokerRequest) bool { return r.inQueue != nil })
}

// cancel gives up the requests of a client whose address begins with that of its message, and returns their
// number: the client may add frames of its own, and behind a proxy others share its identity.
func (b *Broker) cancel(c *brokerClient, address [][]byte) (recalled int) {
	node := c.recallable.find(address)
	if node == nil {
		return 0
	}
	requests := node.all(nil)
	b.recall(requests, cancelledTotal, "its client gave it up")
	return len(requests)
}
