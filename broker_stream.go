package main

import "strconv"

// Partial replies (MDP/0.2, RFC 18). A client that knows them gets each part as it comes, and no part is ever
// dropped: a stream that cannot be passed on breaks, and its client is told. For other clients the broker
// gathers the parts.
//
// What may be on its way is limited by credit. bservice has it for a window of parts, and gets more when
// the client has used some (mmi.credit). For clients of others, which do not tell, the broker gives it as they
// read: when what ZeroMQ holds for them is down to maxAhead.

const (
	// maxWindow is how many parts of a reply may be on their way from a service to its client. With parts of
	// 64 KiB, 4 MiB are enough for 20 MB/s at a round trip of 0.1 s. The more requests a client has, the
	// fewer parts of each: clientWindow in all, but minWindow of each.
	maxWindow    = 64
	minWindow    = 2
	clientWindow = 8 * maxWindow

	// maxAhead is how many bytes ZeroMQ may hold for a client that grants no credit before the broker gives no
	// more of it.
	maxAhead = 1 << 20
)

// receivePartial takes a part of the reply to the request of a worker.
func (b *Broker) receivePartial(w *brokerWorker, body [][]byte) {
	r := w.request
	switch {
	case r.ended: // The worker cannot be told.
	case !b.mayGoOn(r):
		b.giveUp(r, cancelledTotal, "its client may not call the service any more")
		b.forbid(r, true)
	case !r.partials:
		b.gather(r, body)
	case w.isOurs && r.onTheWay >= r.window:
		b.disconnect(w, "a part without credit")
		b.dispatch(w.service)
	default:
		b.pass(r, body)
	}
}

// gather keeps a part for a client that takes whole replies only.
func (b *Broker) gather(r *brokerRequest, body [][]byte) {
	cost := costOf(body)
	if r.client.held+r.client.queue.size()+cost > b.MaxMemory/clientShare || b.held+b.outlet.queued()+cost > b.MaxMemory {
		b.fail(r, exitUnavailable, "the parts of the reply take more than the share of the client in --max-memory")
		return
	}
	r.begun = true
	keep(body)
	r.gathered = append(r.gathered, body...)
	r.cost += cost
	r.client.held += cost
	b.held += cost
}

// pass passes a part on to its client.
func (b *Broker) pass(r *brokerRequest, body [][]byte) {
	err := b.reply(r.client, Message{Dialect: r.dialect, Address: r.address, Kind: KindPartial, Service: r.name, Body: body})
	switch {
	case err == nil:
		r.begun = true
		r.onTheWay++
		b.count(r.service, replyBytes, uint64(sizeOf(body)))
		b.giveCredit(r)
	case mayReadLater(err):
		b.giveUp(r, droppedRepliesTotal, "its client does not read")
		b.oweEnd(r)
	default:
		b.giveUp(r, cancelledTotal, "its client is gone")
	}
}

// mayReadLater tells whether a message could not be sent to a client because it has not read others.
func mayReadLater(err error) bool { return err == errNotReading || err == errWouldBlock }

// giveCredit gives the worker of a stream credit if the client does not, and has read what was passed on so
// far, as far as the broker can tell. If it has not, the broker waits for that.
func (b *Broker) giveCredit(r *brokerRequest) {
	c := r.client
	switch {
	case r.grants || r.worker == nil || !r.worker.isOurs || r.onTheWay < r.window/2:
	case c.queue.size() <= maxAhead:
		r.ahead += r.onTheWay
		b.grant(r, r.onTheWay)
	default:
		b.unread[r] = true
		c.queue.notify(maxAhead)
	}
}

// grant gives the worker of a stream credit for parts of which the client has disposed.
func (b *Broker) grant(r *brokerRequest, parts int) {
	if r.worker != nil && r.worker.isOurs && parts > 0 {
		m := Message{Dialect: worker02Delimited, Kind: KindCredit, Client: [][]byte{r.token}, Body: [][]byte{strconv.AppendInt(nil, int64(parts), 10)}}
		if err := b.sendTo(r.worker.address, r.worker.queue, m); err != nil {
			return // The worker does not read, or is gone. Its silence decides.
		}
	}
	r.onTheWay -= parts
}

// credit answers mmi.credit: the client of a stream, known by its address, takes so many more parts. Zero
// tells that the client will give credit from now on. Streams of a client that run at the same time need
// addresses of their own.
func (b *Broker) credit(c *brokerClient, address, body [][]byte) string {
	if len(body) != 1 {
		return mmiBadRequest
	}
	parts, err := strconv.ParseUint(string(body[0]), 10, 16)
	if err != nil {
		return mmiBadRequest
	}
	node := c.recallable.find(address)
	if node == nil || node.requests.Len() == 0 {
		return mmiNotFound
	}
	// The first words of a client about a request follow it; later ones are about the one that runs.
	r := node.requests.Front().Value.(*brokerRequest)
	if parts == 0 {
		r = node.requests.Back().Value.(*brokerRequest)
	}
	switch {
	case !r.partials:
		return mmiNotFound
	case int(parts) > r.ahead+r.onTheWay:
		return mmiBadRequest
	}
	r.grants = true
	// Parts may have come before the first mmi.credit, so that the worker has the credit for them.
	given := min(int(parts), r.ahead)
	r.ahead -= given
	b.grant(r, int(parts)-given)
	return mmiFound
}

// ClientsHaveRead is called when a queue is down to what its notify asked for.
func (b *Broker) ClientsHaveRead() {
	for r := range b.unread {
		if r.client.queue.size() <= maxAhead {
			delete(b.unread, r)
			b.giveCredit(r)
		}
	}
}

// oweEnd keeps the end of a stream that broke until its client has read enough to take it. Parts were lost:
// a client that reads again must not take what it got for all.
func (b *Broker) oweEnd(r *brokerRequest) {
	b.hold(r)
	r.client.owed = append(r.client.owed, r)
}

// payOwed sends a client what it is owed, as far as it reads.
func (b *Broker) payOwed(c *brokerClient) {
	for len(c.owed) > 0 {
		r := c.owed[0]
		err := b.reply(c, r.reply(r.failure(exitUnavailable, "the stream broke, because it was not read")))
		if err != nil && mayReadLater(err) {
			return
		}
		c.owed = c.owed[1:]
		b.end(r)
	}
}

// dropOwed drops what a client is owed that will not take it any more.
func (b *Broker) dropOwed(c *brokerClient) {
	b.payOwed(c)
	for _, r := range c.owed {
		b.end(r)
	}
	c.owed = nil
}
