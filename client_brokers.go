package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A search looks for the broker that a client is to use, among several in the order of preference: the
// first that is there and knows somebody who serves the name. Attempts overlap. It is a state machine that
// knows no socket and no clock: the loop around it begins what next returns, and tells what became of it.
type search []*candidate

// A candidate is a broker that may be chosen.
type candidate struct {
	address  brokerAddress
	rests    time.Time     // the first attempt begins no sooner
	patience time.Duration // how long a request waits for its verdict rather than at a broker without the service
	begun    time.Time     // zero before the first attempt
	passed   bool          // others need not wait for it
	verdict  verdict
	err      error // why it failed

	link  *link // of the attempt
	asked bool  // over the link, whether somebody serves the name
}

type verdict int

const (
	undecided verdict = iota
	unserving         // it is there, but nobody serves the name
	serving
	failed // for good
)

const (
	// overlap is how long the next attempt waits for one that neither succeeds nor fails.
	overlap = 250 * time.Millisecond

	// farthest is the patience with a broker: over a long way, the verdict takes some round trips.
	farthest = time.Second

	// restTime is how long a broker that stops, or whose name is unknown, is not tried again.
	restTime = time.Second
)

func newSearch(addresses []brokerAddress) (s search) {
	for _, address := range addresses {
		s = append(s, &candidate{address: address, patience: farthest})
	}
	return s
}

// next returns the candidate whose attempt begins now, or nil.
func (s search) next(now time.Time) *candidate {
	for i, k := range s {
		switch {
		case !k.begun.IsZero() || now.Before(k.rests):
		case i > 0 && !s[i-1].silentFor(overlap, now):
			return nil
		default:
			k.begun, k.verdict, k.err = now, undecided, nil
			return k
		}
	}
	return nil
}

// silentFor tells whether nothing is known of a candidate after so long, or nothing will be known soon.
func (k *candidate) silentFor(d time.Duration, now time.Time) bool {
	return k.passed || now.Before(k.rests) || !k.begun.IsZero() && now.Sub(k.begun) >= d
}

// lose is called when an attempt failed or its connection broke. Another one may succeed.
func (k *candidate) lose() { k.passed, k.verdict = true, undecided }

// fail is called when no attempt will succeed.
func (k *candidate) fail(err error) { k.passed, k.verdict, k.err = true, failed, err }

// decide is called when the broker has told whether somebody serves the name.
func (k *candidate) decide(served bool) {
	k.passed, k.verdict = true, unserving
	if served {
		k.verdict = serving
	}
}

// found returns the candidate to use, or nil as long as there is none. If nobody serves the name
// anywhere, it is the first of those that are there.
func (s search) found(now time.Time) *candidate {
	if k := s.first(serving); k != nil {
		return k
	}
	if slices.ContainsFunc(s, func(k *candidate) bool { return !k.silentFor(k.patience, now) }) {
		return nil
	}
	return s.first(unserving)
}

// first returns the first candidate with a verdict, or nil.
func (s search) first(v verdict) *candidate {
	if i := slices.IndexFunc(s, func(k *candidate) bool { return k.verdict == v }); i >= 0 {
		return s[i]
	}
	return nil
}

// failure returns why there will be no broker, or nil if there may be one.
func (s search) failure() error {
	if slices.ContainsFunc(s, func(k *candidate) bool { return k.verdict != failed }) {
		return nil
	}
	return s[0].err
}

// deadline returns when next or found may return something else without an event, zero for never.
func (s search) deadline(now time.Time) (due time.Time) {
	for _, k := range s {
		switch {
		case now.Before(k.rests):
			due = earlier(due, k.rests)
		case k.begun.IsZero():
		case !k.silentFor(overlap, now):
			due = earlier(due, k.begun.Add(overlap))
		case !k.silentFor(k.patience, now):
			due = earlier(due, k.begun.Add(k.patience))
		}
	}
	return due
}

// A seeker is the loop around a search. It owns the sockets of the attempts.
type seeker struct {
	search
	service string // empty if any broker will do
	stop    context.Context
	cancel  context.CancelFunc // of the looking up of names
	known   chan func()        // what to do when a name was looked up
	wake    func()
	options []func(*socket) error // of connections
}

// newSeeker returns a seeker for a broker where a service is served.
func newSeeker(stop context.Context, addresses []brokerAddress, service string, wake func()) *seeker {
	s := &seeker{search: newSearch(addresses), service: service, known: make(chan func(), len(addresses)), wake: wake}
	s.stop, s.cancel = context.WithCancel(stop)
	return s
}

// close closes the connections that were not taken.
func (s *seeker) close() {
	s.cancel()
	for _, k := range s.search {
		if k.link != nil {
			k.link.Close()
		}
	}
}

// begin begins the attempts that are due, and returns the sockets to wait for and when to call it again.
func (s *seeker) begin(now time.Time) (sockets []*socket, due time.Time) {
	for k := s.next(now); k != nil; k = s.next(now) {
		s.lookUp(k)
	}
	for _, k := range s.search {
		if k.link != nil {
			sockets = append(sockets, k.link.socket)
		}
	}
	return sockets, s.deadline(now)
}

// lookUp begins to look up the name of a broker's host, which may take long, and then to connect.
func (s *seeker) lookUp(k *candidate) {
	go func() {
		endpoint, err := lookUp(s.stop, k.address.endpoint)
		s.known <- func() {
			if err == nil {
				k.link, err = dial(s.stop, "brequest", brokerAddress{endpoint, k.address.keys}, s.options...)
			}
			if err != nil {
				k.fail(err)
			}
			if errors.Is(err, errLookUp) { // The name may be known later.
				k.begun, k.rests = time.Time{}, time.Now().Add(restTime)
			}
		}
		s.wake()
	}()
}

// handle handles what a wait found. An error is that of a socket.
func (s *seeker) handle() error {
	for len(s.known) > 0 {
		(<-s.known)()
	}
	for _, k := range s.search {
		if k.link == nil {
			continue
		}
		if err := s.follow(k); err != nil {
			return err
		}
	}
	return nil
}

// follow handles what happened to an attempt.
func (s *seeker) follow(k *candidate) error {
	if err := k.link.update(); err != nil {
		return err
	}
	if k.link.retried || k.link.broken {
		k.link.retried, k.link.broken, k.asked = false, false, false
		k.lose()
	}
	switch {
	case k.link.refused != nil:
		k.fail(fmt.Errorf("%w: %s", k.link.refused, k.address.endpoint))
		k.link.Close()
		k.link = nil
		return nil
	case k.link.connected && s.service == "":
		k.decide(true)
	case k.link.connected && !k.asked:
		k.asked = true
		k.link.send(Message{Dialect: client01, Kind: KindRequest, Service: []byte(mmiService), Body: framesOf([]string{s.service})}.Frames())
	}
	for k.asked {
		frames, err := k.link.receive()
		if err != nil || frames == nil {
			return err
		}
		// A broker of others may not know who serves the name.
		m, _ := Parse(frames)
		reply := ParseReply(m.Body)
		k.decide(serviceCode(reply) != mmiNotFound && reply.Status != exitNotAllowed)
	}
	return nil
}

// seek looks for one of several brokers while calls wait for a connection and none is there. It returns the
// sockets to wait for, and until when.
func (c *Client) seek() (sockets []*socket, due time.Time) {
	i := slices.IndexFunc(c.lanes, (*lane).seeks)
	if len(c.brokers) == 1 || i < 0 || slices.ContainsFunc(c.lanes, (*lane).usable) {
		c.stopSeeking()
		return nil, due
	}
	if c.seeker == nil {
		c.seeker = newSeeker(c.stop, slices.Concat(c.brokers[c.first:], c.brokers[:c.first]), c.service, c.waiter.Wake)
		c.seeker.options = c.options
		for _, k := range c.seeker.search {
			k.rests = c.resting[k.address.endpoint]
			if limit := c.lanes[i].due; !limit.IsZero() { // Some of the time is for the reply.
				k.patience = min(k.patience, time.Until(limit)/2)
			}
		}
	}
	return c.seeker.begin(time.Now())
}

// usable tells whether the broker of a lane is there, for other lanes too.
func (l *lane) usable() bool { return l.connected() && !l.avoided(time.Now()) }

// seeks tells whether the calls of a lane wait for a connection that is still to be opened.
func (l *lane) seeks() bool { return l.needsConnection() && l.link == nil }

func (c *Client) stopSeeking() {
	if c.seeker != nil {
		c.seeker.close()
		c.seeker = nil
	}
}

// sought handles what the last wait found in the search. Calls go to the broker that was found.
func (c *Client) sought(now time.Time) error {
	if c.seeker == nil {
		return nil
	}
	if err := c.seeker.handle(); err != nil {
		return err
	}
	found, failure := c.seeker.found(now), c.seeker.failure()
	i := slices.IndexFunc(c.lanes, (*lane).seeks)
	switch {
	case i < 0: // The calls have ended meanwhile.
	case found != nil:
		l := c.lanes[i]
		c.first = slices.Index(c.brokers, found.address)
		l.use(found.link)
		found.link, l.endpoint = nil, found.address.endpoint
		l.setConnected()
	case failure != nil:
		for _, l := range c.lanes {
			l.refuse(failure, now)
		}
	default:
		return nil
	}
	c.stopSeeking()
	return nil
}

// moveOn lets calls go to another broker, if a lane has left its own or had better do so. The next search
// begins behind that one.
func (c *Client) moveOn(l *lane, now time.Time) {
	avoids := len(l.waiting) > 0 && l.avoided(now)
	if !l.left && !avoids {
		return
	}
	if l.endpoint == c.brokers[c.first].endpoint {
		c.first = (c.first + 1) % len(c.brokers)
	}
	if l.stops || avoids {
		c.resting[l.endpoint] = now.Add(restTime)
	}
	if avoids {
		l.handOver(&c.freeLane().caller)
		// Calls that are still to come go to the other lane, too.
		c.lanes = append(slices.DeleteFunc(slices.Clone(c.lanes), func(other *lane) bool { return other == l }), l)
		return
	}
	l.left, l.stops, l.endpoint = false, false, c.Endpoint()
}
