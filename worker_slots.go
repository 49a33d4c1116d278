package main

import (
	"slices"
	"sync"
)

// slots are the jobs of a service. Each runs one command at a time, for whichever broker. Sessions that
// find none free wait for one, and get one in the order in which they came. Any goroutine may use them.
//
// A session that gets a slot in this way reserves it, and asks its broker for a request. Until one has come,
// no other session of that broker gets a slot: a broker without requests would keep all of them from the
// other brokers.
type slots struct {
	mu      sync.Mutex
	free    []Handler       // the least recently used first
	waiting []*place        // who has waited longest first
	asked   map[string]bool // brokers for which a session has reserved a slot
}

// A place is that of a session among those that wait for a slot.
type place struct {
	broker string
	slot   chan Handler // has room for what ends the wait: a slot, or nil if the broker has no request
	wake   func()       // tells the session
}

func newSlots(handlers ...Handler) *slots {
	return &slots{free: handlers, asked: map[string]bool{}}
}

// take returns a slot or, if none is free, a place among those that wait for one.
func (s *slots) take(broker string, wake func()) (Handler, *place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.free) == 0 {
		p := &place{broker, make(chan Handler, 1), wake}
		s.waiting = append(s.waiting, p)
		return nil, p
	}
	slot := s.free[0]
	s.free = s.free[1:]
	return slot, nil
}

// put makes a slot free.
func (s *slots) put(slot Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = append(s.free, slot)
	s.reserve()
}

// answered ends a reservation, because the broker gave a request.
func (s *slots) answered(broker string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asked, broker)
	s.reserve()
}

// unanswered ends a reservation, because the broker gave no request in time. So it has none, and no other
// session of it has to wait.
func (s *slots) unanswered(broker string, slot Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = slices.DeleteFunc(s.waiting, func(p *place) bool {
		if p.broker == broker {
			p.end(nil)
		}
		return p.broker == broker
	})
	s.cancel(broker, slot)
}

// leave gives up a place, and the slot that may have come meanwhile.
func (s *slots) leave(p *place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiting, p); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	} else if slot := <-p.slot; slot != nil {
		s.cancel(p.broker, slot)
	}
}

// reserve gives free slots to those that wait for one.
func (s *slots) reserve() {
	for len(s.free) > 0 {
		i := slices.IndexFunc(s.waiting, func(p *place) bool { return !s.asked[p.broker] })
		if i < 0 {
			return
		}
		p := s.waiting[i]
		s.waiting = slices.Delete(s.waiting, i, i+1)
		s.asked[p.broker] = true
		p.end(s.free[0])
		s.free = s.free[1:]
	}
}

// cancel makes a slot free that was reserved.
func (s *slots) cancel(broker string, slot Handler) {
	delete(s.asked, broker)
	s.free = append(s.free, slot)
	s.reserve()
}

// end ends the wait of a session.
func (p *place) end(slot Handler) {
	p.slot <- slot
	p.wake()
}
