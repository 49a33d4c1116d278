package main

import (
	"fmt"
	"reflect"
	"testing"
)

var (
	readyFrames    = []string{"", "MDPW01", "\x01", "echo"}
	handBackFrames = []string{"", "MDPW01", "\x05", "75", "all jobs are busy"}
)

// request lets the broker send a request, and the session start it or hand it back.
func (s *fakeSession) request(body string) {
	s.t.Helper()
	s.from("", "MDPW01", "\x02", "token", "", body)
}

// newFakeSessions returns registered sessions with several brokers, which share one slot.
func newFakeSessions(t *testing.T, n int) (sessions []*fakeSession) {
	slots := newSlots(noHandler)
	for i := range n {
		s := newFakeSessionWith(t, slots)
		s.Broker.endpoint = fmt.Sprint(i)
		s.register()
		sessions = append(sessions, s)
	}
	return sessions
}

// expectFree checks that a slot is free, and that nobody waits for one.
func expectFree(t *testing.T, s *slots, free int) {
	t.Helper()
	if len(s.free) != free || len(s.waiting) != 0 || len(s.asked) != 0 {
		t.Fatalf("%d slots are free, want %d; %d sessions wait; %d brokers are asked", len(s.free), free, len(s.waiting), len(s.asked))
	}
}

func TestRequestWithoutASlotIsHandedBackAndReadyFollowsWithOne(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	b.expect(handBackFrames)
	b.expectOver(false)
	if b.started != nil || b.working {
		t.Fatalf("it started %q without a slot", b.started)
	}
	b.Claim(b.clock) // without a slot
	b.expect()

	a.Finish(frames("one"))
	a.expect([]string{"", "MDPW01", "\x03", "token", "", "one"})
	b.claim()
	b.expect(readyFrames)
	b.request("2")
	if want := [][]string{{"2"}}; !reflect.DeepEqual(b.started, want) {
		t.Fatalf("it started %q, want %q", b.started, want)
	}
	b.Finish(frames("two"))
	b.expect([]string{"", "MDPW01", "\x03", "token", "", "two"})
	expectFree(t, a.Slots, 1)
}

func TestSessionThatWaitsForASlotStaysInTouchWithItsBroker(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	b.expect(handBackFrames)
	b.pass(3)
	b.expect(heartbeatFrames, heartbeatFrames, heartbeatFrames)
	b.pass(3)
	b.expectOver(true) // The broker was silent.
	a.Finish(frames("one"))
	expectFree(t, a.Slots, 1)
}

func TestSessionThatIsSentARequestWhileItWaitsHandsThatBackToo(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	b.request("2")
	b.expect(handBackFrames, handBackFrames)
	a.Finish(nil)
	b.claim()
	b.expect(readyFrames)
	b.clock = b.clock.Add(reservation)
	b.Tick(b.clock)
	expectFree(t, a.Slots, 1)
}

func TestReservationEndsWhenTheBrokerHasNoRequest(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	b.from("", "MDPW01", "\x04") // It waits for its turn, with no reservation that could end.
	a.Finish(nil)
	b.claim()
	b.expect(handBackFrames, readyFrames)
	if b.slot == nil {
		t.Fatal("no slot is reserved")
	}
	b.from("", "MDPW01", "\x04")
	expectFree(t, a.Slots, 1)
}

func TestReservationEndsWhenNoRequestComes(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	a.Finish(nil)
	b.claim()
	b.expect(handBackFrames, readyFrames)
	if next, want := b.Tick(b.clock), b.clock.Add(reservation); !next.Equal(want) {
		t.Errorf("the next tick is due at %v, want %v", next, want)
	}
	b.clock = b.clock.Add(reservation - 1)
	b.Tick(b.clock)
	if b.slot == nil {
		t.Fatal("the slot was given back too early")
	}
	a.request("3")
	a.expect([]string{"", "MDPW01", "\x03", "token", ""}, handBackFrames)
	b.clock = b.clock.Add(1)
	if next := b.Tick(b.clock); !next.Equal(b.due) {
		t.Errorf("the next tick is due at %v, want %v with the next heartbeat", next, b.due)
	}
	a.claim()
	a.expect(readyFrames)

	// It stays registered, without a slot.
	b.expectOver(false)
	b.request("4")
	b.expect(handBackFrames)
	a.clock = a.clock.Add(reservation)
	a.Tick(a.clock)
	b.claim()
	b.expect(readyFrames)
	b.request("4")
	if len(b.started) != 1 {
		t.Fatalf("it started %q", b.started)
	}
}

// TestBrokerWithoutRequestsKeepsOneSlot begins with three sessions of a broker, which gave the same request
// to each of them.
func TestBrokerWithoutRequestsKeepsOneSlot(t *testing.T) {
	slots := newSlots(noHandler, noHandler, noHandler)
	var a, b []*fakeSession
	for i := range 6 {
		s := newFakeSessionWith(t, slots)
		s.Broker.endpoint = "ab"[i%2 : i%2+1]
		s.register()
		if i%2 == 0 {
			a = append(a, s)
		} else {
			b = append(b, s)
		}
	}
	for _, s := range a {
		s.request("1")
	}
	for _, s := range b {
		s.request("2")
		s.expect(handBackFrames)
	}
	for _, s := range a {
		s.Finish(nil)
	}
	b[0].claim()
	b[0].expect(readyFrames)
	if b[1].woken || b[2].woken {
		t.Fatal("two sessions ask a broker at the same time")
	}
	b[0].request("2")
	b[1].claim()
	b[1].expect(readyFrames)
	if b[2].woken {
		t.Fatal("two sessions ask a broker at the same time")
	}
	b[1].clock = b[1].clock.Add(reservation)
	b[1].Tick(b[1].clock)
	b[2].claim() // without a slot: the broker has no request
	b[2].expect(readyFrames)
	if !b[2].reserved.IsZero() || b[2].slot != nil {
		t.Error("the last session has a slot")
	}
	expectFree(t, slots, 2)
	b[2].request("3")
	if len(b[2].started) != 1 {
		t.Error("a request was not started although a slot is free")
	}
}

func TestRequestEndsTheTimeLimitOfTheReservation(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.request("2")
	a.Finish(nil)
	b.claim()
	b.request("2")
	b.pass(3)
	if !b.working || b.slot == nil {
		t.Fatal("the command lost its slot")
	}
	b.Finish(nil)
	expectFree(t, a.Slots, 1)
}

func TestSessionsOfAllBrokersGetSlotsInTheOrderInWhichTheyBeganToWait(t *testing.T) {
	sessions := newFakeSessions(t, 4)
	running := sessions[0]
	running.request("x")
	for _, i := range []int{2, 1, 3} {
		sessions[i].request("x")
	}
	// Whoever ends a command has the next request at once, and waits behind the others.
	for range 3 {
		for _, i := range []int{2, 1, 3, 0} {
			running.Finish(nil)
			running.request("x")
			for j, s := range sessions {
				if s.woken != (j == i) {
					t.Fatalf("session %d was woken: %v, but %d is next", j, s.woken, i)
				}
			}
			running = sessions[i]
			running.claim()
			running.request("x")
		}
	}
	for i, s := range sessions {
		if len(s.started) < 3 {
			t.Errorf("session %d started %d requests, want 3 or more", i, len(s.started))
		}
	}
}

// TestSlotOfASessionThatEndsGoesToTheNext ends a session in each of its states.
func TestSlotOfASessionThatEndsGoesToTheNext(t *testing.T) {
	waits := func(a, b *fakeSession) {
		a.request("1")
		b.request("2")
	}
	wasGivenASlot := func(a, b *fakeSession) {
		waits(a, b)
		a.Finish(nil)
	}
	hasReserved := func(a, b *fakeSession) {
		wasGivenASlot(a, b)
		b.claim()
	}
	for name, begin := range map[string]func(a, b *fakeSession){"waits": waits, "was given a slot": wasGivenASlot, "has reserved one": hasReserved} {
		for how, end := range map[string]func(*fakeSession){
			"connection breaks": func(s *fakeSession) { s.Lose() },
			"DISCONNECT":        func(s *fakeSession) { s.from("", "MDPW01", "\x05") },
			"silence":           func(s *fakeSession) { s.pass(10) },
			"stop":              func(s *fakeSession) { s.Leave() },
		} {
			t.Run(name+"/"+how, func(t *testing.T) {
				all := newFakeSessions(t, 3)
				a, b, c := all[0], all[1], all[2]
				begin(a, b)
				c.request("3")
				b.sent = nil
				end(b)
				if how == "stop" { // The broker must know that it does not wait any more.
					b.expect([]string{"", "MDPW01", "\x05"})
				} else {
					b.expectOver(true)
				}
				if a.working {
					a.Finish(nil)
				}
				c.claim()
				c.request("3")
				if len(c.started) != 1 {
					t.Fatal("the next session did not start its request")
				}
				c.Finish(nil)
				expectFree(t, a.Slots, 1)
			})
		}
	}
}

func TestSessionWhoseConnectionBreaksWhileACommandOfAnotherBrokerRunsIsOverAtOnce(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.Lose()
	b.expectOver(true)
	if b.working || !a.working {
		t.Errorf("a works: %v, b works: %v", a.working, b.working)
	}
	a.Finish(nil)
	a.expectOver(false)
	expectFree(t, a.Slots, 1)
}

func TestCommandOfASessionThatIsOverKeepsItsSlot(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	a.from("", "MDPW01", "\x05")
	a.expectOver(true)
	b.request("2")
	b.expect(handBackFrames)
	a.Finish(nil)
	a.expect()
	b.claim()
	b.expect(readyFrames)
}

func TestReplyThatCannotBeSentYetKeepsNoSlot(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	a.failure = errWouldBlock
	a.Finish(frames("one"))
	b.request("2")
	b.expect()
	if len(b.started) != 1 {
		t.Error("the reply of one broker keeps a command of another from running")
	}
}

func TestConnectionThatBreaksInAHandBackOrReadyEndsTheSession(t *testing.T) {
	both := newFakeSessions(t, 2)
	a, b := both[0], both[1]
	a.request("1")
	b.failure = errWouldBlock
	b.request("2")
	b.expectOver(true)

	c := newFakeSessionWith(t, a.Slots)
	c.register()
	c.request("3")
	c.failure = errWouldBlock
	a.Finish(nil)
	c.claim()
	c.expectOver(true)
	expectFree(t, a.Slots, 1)
}

func TestSlotsAreUsedInTurn(t *testing.T) {
	var used []int
	slots := newSlots()
	for i := range 3 {
		slots.put(func(Request) Reply {
			used = append(used, i)
			return Reply{}
		})
	}
	for range 5 {
		slot, place := slots.take("", nil)
		if place != nil {
			t.Fatal("no slot is free")
		}
		slot(Request{})
		slots.put(slot)
	}
	if want := []int{0, 1, 2, 0, 1}; !reflect.DeepEqual(used, want) {
		t.Errorf("the slots were used in the order %v, want %v", used, want)
	}
}
