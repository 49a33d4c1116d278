package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A fakeConnection is a caller without a socket: it records what the caller sends, and its clock
// goes only when told to. Like the loop of a Client it opens a connection when one is needed.
type fakeConnection struct {
	*caller
	t      *testing.T
	sent   [][]string // over the present connection since the last call of expect
	opened int        // connections so far
	ended  []string   // the calls that ended, by their first frame, with what came of them
	err    error      // of every send
	clock  time.Time
}

func newFakeConnection(t *testing.T, correlated bool) *fakeConnection {
	return &fakeConnection{t: t, clock: time.Unix(0, 0), caller: &caller{endpoint: "tcp://broker", correlated: correlated}}
}

// settle does what the loop does around each event.
func (f *fakeConnection) settle() {
	f.tick(f.clock)
	if f.needsConnection() {
		f.opened++
		f.sent = nil
		f.open(func(frames [][]byte) error {
			if f.err == nil {
				f.sent = append(f.sent, spell(frames))
			}
			return f.err
		})
	}
	f.flush(f.clock)
	for _, c := range f.takeEnded() {
		outcome := fmt.Sprintf("%s: %q %d", c.service, spell(c.reply.Output), c.status())
		if c.err != nil {
			outcome = fmt.Sprintf("%s: %v", c.service, c.err)
		}
		f.ended = append(f.ended, outcome)
	}
}

func (f *fakeConnection) call(service string, timeout time.Duration, retries int) *call {
	c := &call{service: service, body: frames("body of " + service), timeout: timeout, retries: retries}
	f.begin(c, f.clock)
	f.settle()
	return c
}

// up lets the broker appear.
func (f *fakeConnection) up() {
	f.setConnected()
	f.settle()
}

// breaks lets the connection break.
func (f *fakeConnection) breaks() {
	f.lost(f.clock)
	f.settle()
}

func (f *fakeConnection) from(spelled ...string) {
	f.t.Helper()
	f.receive(frames(spelled...), f.clock)
	f.settle()
}

func (f *fakeConnection) pass(d time.Duration) {
	f.clock = f.clock.Add(d)
	f.settle()
}

// expect checks what was sent since the last time.
func (f *fakeConnection) expect(want ...[]string) {
	f.t.Helper()
	if len(f.sent) != len(want) || !slices.EqualFunc(f.sent, want, slices.Equal) {
		f.t.Fatalf("the client sent %q, want %q", f.sent, want)
	}
	f.sent = nil
}

// expectEnded checks which calls ended since the last time, and how.
func (f *fakeConnection) expectEnded(want ...string) {
	f.t.Helper()
	if !slices.Equal(f.ended, want) {
		f.t.Fatalf("the calls that ended are %q, want %q", f.ended, want)
	}
	f.ended = nil
}

// Requests and cancels as they are sent, without and with a correlation.
func plain(service string) []string { return []string{"", "MDPC01", service, "body of " + service} }
func numbered(n, service string) []string {
	return append([]string{n}, plain(service)...)
}

var plainCancel = []string{"", "MDPC01", "mmi.cancel", ""}

func numberedCancel(n string) []string { return append([]string{n}, plainCancel...) }

func TestRepliesReachTheirOwnCallsInAnyOrder(t *testing.T) {
	f := newFakeConnection(t, true)
	for _, service := range []string{"a", "b", "c"} {
		f.call(service, 0, 0)
	}
	f.expect(numbered("1.1", "a"), numbered("2.1", "b"), numbered("3.1", "c"))
	f.from("3.1", "", "MDPC01", "c", "third")
	f.from("1.1", "", "MDPC01", "a", "", "sorry", "exit status 3")
	f.from("2.1", "", "MDPC01", "b")
	f.from("2.1", "", "MDPC01", "b", "again")
	f.from("4.1", "", "MDPC01", "d", "unasked")
	f.expectEnded(`c: ["third"] 0`, `a: [""] 3`, `b: [] 0`)
}

func TestWithoutCorrelationThereIsOneCallAtATime(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("a", 0, 0)
	f.call("b", 0, 0)
	f.expect(plain("a"))
	f.from("", "MDPC01", "a", "first")
	f.expect(plain("b"))
	f.from("", "MDPC01", "b", "second")
	f.expectEnded(`a: ["first"] 0`, `b: ["second"] 0`)
	if f.opened != 1 {
		t.Errorf("%d connections were opened, want 1", f.opened)
	}
}

func TestCallThatTimesOutIsTakenBack(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("a", 2*time.Second, 0)
	f.up()
	f.expect(plain("a"))
	f.pass(2*time.Second - 1)
	f.expect()
	f.pass(1)
	f.expect(plainCancel)

	// It ends when the broker has confirmed that, or after half a second.
	f.call("b", 0, 0)
	f.expectEnded()
	f.from("", "MDPC01", "mmi.cancel", "404")
	f.expectEnded("a: no reply from tcp://broker within 2s")
	f.expect(plain("b"))
	if f.opened != 2 {
		t.Errorf("the next call went over connection %d, want 2", f.opened)
	}
}

func TestClientDoesNotWaitLongForABrokerThatConfirmsNothing(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("a", time.Second, 0)
	f.up()
	f.pass(time.Second)
	f.pass(cancelPatience - 1)
	f.expectEnded()
	if deadline := f.deadline(); !deadline.Equal(f.clock.Add(1)) {
		t.Errorf("the deadline is %v, want the end of the patience", deadline)
	}
	f.from("", "MDPC01", "a", "late")
	f.pass(1)
	f.expectEnded("a: no reply from tcp://broker within 1s")
}

func TestOneOfManyThatTimesOutLeavesTheOthersAlone(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("slow", time.Second, 0)
	f.call("patient", 0, 0)
	f.up()
	f.sent = nil
	f.pass(time.Second)
	f.expect(numberedCancel("1.1"))
	f.from("1.1", "", "MDPC01", "slow", "late")
	f.from("1.1", "", "MDPC01", "mmi.cancel", "404")
	f.from("2.1", "", "MDPC01", "patient", "reply")
	f.expectEnded("slow: no reply from tcp://broker within 1s", `patient: ["reply"] 0`)
	if f.opened != 1 {
		t.Errorf("%d connections were opened, want 1", f.opened)
	}
}

func TestCallToTheBrokerItselfIsNotTakenBack(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("mmi.service", time.Second, 0)
	f.up()
	f.sent = nil
	f.pass(time.Second)
	f.expect()
	f.expectEnded("mmi.service: no reply from tcp://broker within 1s")
}

func TestWithoutABrokerWhatTimedOutIsNotSentLater(t *testing.T) {
	for _, correlated := range []bool{false, true} {
		f := newFakeConnection(t, correlated)
		f.call("hasty", time.Second, 0)
		f.call("patient", time.Minute, 0)
		f.pass(time.Second)
		f.expectEnded("hasty: no broker at tcp://broker within 1s")
		if f.opened != 2 {
			t.Fatalf("%d connections were opened, want a second one, without the first request", f.opened)
		}
		want := plain("patient")
		if correlated {
			want = numbered("2.1", "patient")
		}
		f.up()
		f.expect(want)
	}
}

func TestConnectionThatBreaksEndsTheCallsInFlight(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("a", 0, 0)
	f.call("b", 0, 0)
	f.up()
	f.breaks()
	f.expectEnded("a: lost the broker at tcp://broker before its reply", "b: lost the broker at tcp://broker before its reply")
	f.call("c", 0, 0)
	f.expect(numbered("3.1", "c"))
	if f.opened != 2 {
		t.Errorf("the next call went over connection %d, want 2", f.opened)
	}
}

func TestConnectionThatBreaksWithoutCallsInFlightStays(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("a", 0, 0)
	f.up()
	f.from("1.1", "", "MDPC01", "a", "reply")
	f.breaks()
	f.call("b", time.Second, 0)
	f.pass(time.Second)
	f.expectEnded(`a: ["reply"] 0`, "b: no broker at tcp://broker within 1s")
}

func TestConnectionThatBreaksWithinARequestEndsIt(t *testing.T) {
	f := newFakeConnection(t, false)
	f.err = errors.New("broken pipe")
	f.call("a", 0, 0)
	f.err = nil
	f.breaks()
	f.expectEnded("a: lost the broker at tcp://broker before its reply")
}

func TestCallWaitsForAConnectionThatTakesIt(t *testing.T) {
	f := newFakeConnection(t, true)
	f.err = errWouldBlock
	f.call("a", 0, 0)
	f.call("b", 0, 0)
	f.expect()
	f.err = nil
	f.settle()
	f.expect(numbered("1.1", "a"), numbered("2.1", "b"))
}

func TestTemporaryFailuresAreTriedAgainOverANewConnection(t *testing.T) {
	for _, test := range []struct {
		name  string
		fails func(f *fakeConnection)
		last  string
	}{
		{"lost", func(f *fakeConnection) { f.breaks() }, "a: lost the broker at tcp://broker before its reply"},
		{"timeout", func(f *fakeConnection) {
			f.pass(time.Minute)
			f.from("", "MDPC01", "mmi.cancel", "404")
		}, "a: no reply from tcp://broker within 1m0s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFakeConnection(t, false)
			var pauses []time.Duration
			f.retrying = func(_ *call, pause time.Duration) { pauses = append(pauses, pause) }
			f.call("a", time.Minute, 2)
			for try := 1; try <= 3; try++ {
				f.up()
				f.expect(plain("a"))
				f.expectEnded()
				if f.opened != try {
					t.Errorf("try %d went over connection %d", try, f.opened)
				}
				test.fails(f)
				f.sent = nil
				f.pass(200 * time.Millisecond) // more than the second pause
			}
			f.expectEnded(test.last)
			if len(pauses) != 2 || pauses[0] < 50*time.Millisecond || pauses[0] > 100*time.Millisecond ||
				pauses[1] < 100*time.Millisecond || pauses[1] > 200*time.Millisecond {
				t.Errorf("the pauses are %v", pauses)
			}
		})
	}
}

func TestWhatComesForAnEarlierTryDoesNotEndTheNext(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("a", time.Second, 1)
	f.up()
	f.pass(time.Second)
	f.expect(numbered("1.1", "a"), numberedCancel("1.1"))
	f.pass(100 * time.Millisecond)
	f.expect(numbered("1.2", "a"))
	f.from("1.1", "", "MDPC01", "a", "late")
	f.from("1.1", "", "MDPC01", "mmi.cancel", "200")
	f.expectEnded()
	f.from("1.2", "", "MDPC01", "a", "reply")
	f.expectEnded(`a: ["reply"] 0`)
}

func TestOnlyTemporaryFailuresAreTriedAgain(t *testing.T) {
	for status, again := range map[int]bool{0: false, 1: false, 64: false, 69: true, 75: true, 76: false, 124: true, 126: false, 143: false} {
		f := newFakeConnection(t, false)
		f.call("a", 0, 1)
		f.from("", "MDPC01", "a", "", "", fmt.Sprint("exit status ", status))
		if got := len(f.ended) == 0; got != again {
			t.Errorf("status %d is tried again: %v", status, got)
		}
	}
}

// refusal is the body of a reply by which the broker itself refuses a request.
func refusal(why string) []string {
	return spell(Reply{Stderr: []byte("bbroker: a: " + why + "\n"), Status: 75, FromBroker: true}.Body())
}

// refuse lets the broker refuse a request.
func (f *fakeConnection) refuse(correlation, service, why string) {
	f.t.Helper()
	f.from(append([]string{correlation, "", "MDPC01", service}, refusal(why)...)...)
}

func TestPatientCallIsSentAgainWhileTheBrokerRefusesIt(t *testing.T) {
	f := newFakeConnection(t, true)
	c := &call{service: "a", body: frames("body of a"), timeout: time.Second, patient: true}
	f.begin(c, f.clock)
	f.settle()
	f.up()
	for range 4 { // with pauses of 0.05 to 0.1 s, 0.1 to 0.2, 0.2 to 0.4
		f.expect(numbered("1.1", "a"))
		f.refuse("1.1", "a", "the queue is full")
		f.expectEnded()
		before := f.clock
		for len(f.sent) == 0 {
			f.clock = f.deadline()
			f.settle()
		}
		if pause := f.clock.Sub(before); pause < 50*time.Millisecond || pause > 400*time.Millisecond {
			t.Errorf("the pause is %v", pause)
		}
		if f.held.refusals == 3 {
			break
		}
	}
	f.sent = nil
	f.from("1.1", "", "MDPC01", "a", "", "", "exit status 75") // of a command
	f.expectEnded(`a: [""] 75`)
}

func TestRefusalHoldsBackOtherCallsUntilThereIsAReply(t *testing.T) {
	f := newFakeConnection(t, true)
	for i := range 10 {
		f.begin(&call{service: fmt.Sprint(i), body: frames("x"), patient: true}, f.clock)
	}
	f.settle()
	f.up()
	f.sent = nil
	for i := 3; i <= 10; i++ {
		f.refuse(fmt.Sprint(i, ".1"), fmt.Sprint(i-1), "the queue is full")
	}
	f.settle()
	f.expect()
	f.from("1.1", "", "MDPC01", "0", "done")
	f.settle()
	if len(f.sent) != 2 { // one in the place of it, and one more
		t.Errorf("the client sent %q after a reply", f.sent)
	}
	f.sent = nil
	f.pass(10 * time.Second)
	if len(f.sent) == 0 || len(f.sent) > 6 {
		t.Errorf("the client sent %q in ten seconds", f.sent)
	}
}

func TestRetriesFollowARefusal(t *testing.T) {
	for _, patient := range []bool{false, true} {
		f := newFakeConnection(t, true)
		f.begin(&call{service: "a", body: frames("x"), timeout: time.Second, retries: 2, patient: patient}, f.clock)
		f.settle()
		f.up()
		tries := map[string]bool{}
		for rounds := 0; len(f.ended) == 0 && rounds < 1000; rounds++ {
			for _, message := range f.sent {
				tries[message[0]] = true
				f.refuse(message[0], "a", "the queue is full")
			}
			f.sent = nil
			if len(f.ended) == 0 {
				f.clock = f.deadline()
				f.settle()
			}
		}
		f.expectEnded(`a: [""] 75`)
		if len(tries) != 3 {
			t.Errorf("patient %v: the tries are %v, want 3", patient, tries)
		}
	}
}

func TestCancelledCallIsNotSentAgain(t *testing.T) {
	f := newFakeConnection(t, true)
	c := &call{service: "a", body: frames("x"), retries: 3, patient: true}
	f.begin(c, f.clock)
	f.settle()
	f.up()
	f.cancel(c, f.clock)
	f.refuse("1.1", "a", "the queue is full")
	f.expectEnded(`a: [""] 75`)

	f = newFakeConnection(t, false) // While its connection is closed, it has not ended.
	c = &call{service: "a", body: frames("x"), timeout: time.Second, retries: 3, patient: true}
	f.begin(c, f.clock)
	f.settle()
	f.up()
	f.clock = f.clock.Add(time.Second)
	f.settle()
	if !f.has(c) || !f.busy() {
		t.Fatal("the call is forgotten")
	}
	f.cancel(c, f.clock)
	f.clock = f.clock.Add(cancelPatience)
	f.settle()
	if !c.ended {
		t.Error("the call goes on")
	}
}

func TestPatienceEndsWithTheTimeout(t *testing.T) {
	f := newFakeConnection(t, true)
	c := &call{service: "a", body: frames("body of a"), timeout: time.Second, patient: true}
	f.begin(c, f.clock)
	f.settle()
	f.up()
	begin := f.clock
	for len(f.ended) == 0 {
		f.refuse("1.1", "a", "the queue is full")
		if len(f.ended) == 0 {
			f.clock = f.deadline()
			f.settle()
		}
	}
	f.expectEnded(`a: [""] 75`)
	if took := f.clock.Sub(begin); took > time.Second {
		t.Errorf("it ended after %v", took)
	}
}

func TestCommandThatEndsLikeARefusalIsNotRunAgain(t *testing.T) {
	f := newFakeConnection(t, true)
	c := &call{service: "a", body: frames("body of a"), patient: true}
	f.begin(c, f.clock)
	f.settle()
	f.from("1.1", "", "MDPC01", "a", "", "bbroker: a: the queue is full\n", "exit status 75")
	f.expectEnded(`a: [""] 75`)
}

func TestNothingIsSentToABrokerThatIsAboutToStop(t *testing.T) {
	f := newFakeConnection(t, true)
	for _, service := range []string{"a", "b"} {
		f.begin(&call{service: service, body: frames("body of " + service), patient: true}, f.clock)
	}
	f.settle()
	f.up()
	f.sent = nil
	f.refuse("1.1", "a", shuttingDown)
	f.pass(time.Minute)
	f.begin(&call{service: "c", body: frames("body of c"), patient: true}, f.clock)
	f.settle()
	f.from("2.1", "", "MDPC01", "b", "done")
	f.expect()
	f.breaks()
	f.expect(numbered("1.1", "a"), numbered("3.1", "c"))
	f.expectEnded(`b: ["done"] 0`)
}

func TestRetryHasItsWholeTimeout(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("a", time.Second, 1)
	f.up()
	f.pass(900 * time.Millisecond)
	f.from("", "MDPC01", "a", "", "", "exit status 75")
	f.sent = nil
	f.pass(100 * time.Millisecond)
	f.expect(plain("a"))
	f.pass(time.Second - 1)
	f.expectEnded()
	f.pass(1)
	f.from("", "MDPC01", "mmi.cancel", "404")
	f.expectEnded("a: no reply from tcp://broker within 1s")
}

func TestRetryHasTheWholeBody(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("a", 10*time.Second, 1)
	f.up()
	f.expect(plain("a"))
	f.pass(6 * time.Second)
	f.breaks()
	f.pass(time.Second)
	f.expect(plain("a")) // to a broker that is not there
	f.pass(10 * time.Second)
	f.expectEnded("a: no broker at tcp://broker within 10s")
}

func TestBodyIsKeptUntilABrokerIsThereAndNoLonger(t *testing.T) {
	f := newFakeConnection(t, false)
	c := f.call("a", 0, 0)
	if c.body == nil {
		t.Error("the body was dropped before a broker was there")
	}
	f.up()
	if c.body != nil {
		t.Error("the body is kept though nothing sends it again")
	}
}

func TestCancelledCallEndsUnlessItHasBegun(t *testing.T) {
	f := newFakeConnection(t, true)
	queued, running := f.call("queued", 0, 0), f.call("running", 0, 0)
	f.up()
	f.err = errWouldBlock
	unsent := f.call("unsent", 0, 0)
	f.err = nil
	f.sent = nil
	for _, c := range []*call{unsent, queued, running} {
		f.cancel(c, f.clock)
	}
	f.settle()
	f.expect(numberedCancel("1.1"), numberedCancel("2.1"))
	f.from("1.1", "", "MDPC01", "mmi.cancel", "200")
	f.from("2.1", "", "MDPC01", "mmi.cancel", "404")
	f.from("2.1", "", "MDPC01", "running", "done")
	f.expectEnded("unsent: cancelled", "queued: cancelled", `running: ["done"] 0`)
	f.cancel(running, f.clock) // It has ended.
	f.settle()
	f.expect()
}

func TestCancelledCallIsNotTriedAgain(t *testing.T) {
	f := newFakeConnection(t, true)
	pausing, running := f.call("pausing", 0, 9), f.call("running", 0, 9)
	f.from("1.1", "", "MDPC01", "pausing", "", "", "exit status 75")
	f.cancel(pausing, f.clock)
	f.cancel(running, f.clock)
	f.from("2.1", "", "MDPC01", "running", "", "", "exit status 75")
	f.expectEnded("pausing: cancelled", `running: [""] 75`)
}

func TestAbandonedCallsAreTakenBackAtOnce(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("a", 0, 3)
	f.call("b", 0, 0)
	f.up()
	f.sent = nil
	f.abandon(f.clock)
	f.settle()
	f.expect(plainCancel)
	f.from("1.1", "", "MDPC01", "a", "just in time")
	if f.conn == nil {
		t.Error("the connection was dropped before the broker confirmed")
	}
	f.from("", "MDPC01", "mmi.cancel", "200")
	f.expectEnded(`a: ["just in time"] 0`)
	if f.conn != nil || !f.deadline().IsZero() {
		t.Error("something is left")
	}
}

func TestNothingIsTakenBackFromABrokerThatIsNotThere(t *testing.T) {
	f := newFakeConnection(t, true)
	f.call("a", 0, 0)
	f.sent = nil
	f.abandon(f.clock)
	f.settle()
	f.expect()
	if f.conn != nil {
		t.Error("the connection is kept")
	}
}

func TestBadRepliesEndTheCallsInFlight(t *testing.T) {
	for _, test := range []struct {
		name       string
		correlated bool
		message    []string
		want       []string
	}{
		{"nothing of MDP", true, []string{"hello"}, []string{
			"a: bad reply from tcp://broker: no frame MDPC01, MDPW01, MDPC02 or MDPW02 behind the address",
			"b: bad reply from tcp://broker: no frame MDPC01, MDPW01, MDPC02 or MDPW02 behind the address"}},
		{"a worker's message", true, []string{"1.1", "", "MDPW01", "\x02", "A", ""}, []string{
			"a: bad reply from tcp://broker: an unexpected REQUEST",
			"b: bad reply from tcp://broker: an unexpected REQUEST"}},
		{"no correlation", true, []string{"", "MDPC01", "a"}, []string{
			"a: bad reply from tcp://broker: it does not tell which request it is for",
			"b: bad reply from tcp://broker: it does not tell which request it is for"}},
		{"another service", true, []string{"2.1", "", "MDPC01", "a"}, []string{
			`b: bad reply from tcp://broker: it is from service "a"`}},
		{"another service", false, []string{"", "MDPC01", "b"}, []string{
			`a: bad reply from tcp://broker: it is from service "b"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFakeConnection(t, test.correlated)
			f.call("a", 0, 0)
			f.call("b", 0, 0)
			f.up()
			f.from(test.message...)
			f.expectEnded(test.want...)
		})
	}
}

// FuzzCaller lets a caller, its connection and its broker do what they like, and checks that every
// call ends exactly once and with its own reply, and that a broker gets each request as it was asked
// for and none after its end. Partial replies reach exactly their call, in order and none after its end. At
// most one grant is unanswered, and no more parts are granted than were written. Two bytes of the input are
// a step.
func FuzzCaller(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x03\x02\x00\x04\x00"))                                                     // a call, a broker, the reply
	f.Add([]byte("\x01\x00\x00\x03\x00\x07\x02\x00\x03\x00\x02\x00\x05\x20"))                             // the connection breaks; retries
	f.Add([]byte("\x00\x00\x00\x12\x05\x20\x02\x00\x05\x20\x06\x00\x08\x00"))                             // timeouts, cancels, abandon
	f.Add([]byte("\x00\x0a\x00\x02\x00\x0b\x00\x0b\x00\x0c\x00\x0c\x00\x0d\x02\x0b\x01\x0c\x00\x04\x00")) // a stream with credit
	f.Add([]byte("\x01\x0a\x00\x0a\x21\x02\x00\x06\x05\x0b\x02\x0c\x00\x0d\x01\x0c\x01\x03\x00\x02\x00")) // one without
	f.Fuzz(func(t *testing.T, steps []byte) {
		if len(steps) == 0 {
			return
		}
		w := &clientWorld{fakeConnection: newFakeConnection(t, steps[0]%2 == 1), calls: map[string]*call{}, ends: map[*call]int{}, cancelled: map[*call]bool{}, streams: map[*call]*fuzzedStream{}, partsSent: map[string]int{}}
		for steps = steps[1:]; len(steps) >= 2; steps = steps[2:] {
			w.step(steps[0], steps[1])
			w.check()
		}
		w.abandoned = true
		w.abandon(w.clock)
		w.clock = w.clock.Add(cancelPatience)
		w.tick(w.clock)
		w.check()
		if w.conn != nil || w.needsConnection() {
			t.Fatal("an abandoned caller keeps or wants a connection")
		}
	})
}

// A clientWorld is the world around a caller. The body of each call is a frame of its own.
type clientWorld struct {
	*fakeConnection
	calls     map[string]*call // by their body
	ends      map[*call]int
	cancelled map[*call]bool
	there     bool       // the broker
	unsent    [][]string // waits in the socket for a broker
	requests  [][]string // the broker has these, and has not answered them
	abandoned bool       // from now on calls need not end
	streams   map[*call]*fuzzedStream
	partsSent map[string]int // by request
	grants    []fuzzedGrant  // the broker has these, and has not answered them
	questions [][]string     // and these
}

// A fuzzedStream is what became of the parts for a call.
type fuzzedStream struct {
	taken     int
	unwritten []Reply // of them
	try       *fuzzedTry
}

// A fuzzedTry is what was granted for one of its tries.
type fuzzedTry struct {
	granted    int
	unanswered bool // there is a grant that is
}

// A fuzzedGrant is a grant as the broker has it.
type fuzzedGrant struct {
	message []string
	try     *fuzzedTry
}

// serviceAt returns the place of the name of the service in a client's message.
func serviceAt(message []string) int {
	if i := slices.Index(message, "MDPC02"); i >= 0 {
		return i + 2
	}
	return slices.Index(message, "MDPC01") + 1
}

// answerTo returns a reply to a request, in its dialect.
func answerTo(request []string, body ...string) []string {
	at := serviceAt(request)
	reply := slices.Clone(request[:at+1])
	if reply[at-1] == "\x01" {
		reply[at-1] = "\x03"
	}
	return append(reply, body...)
}

// beginStream begins a call that takes partial replies, and checks those.
func (w *clientWorld) beginStream(c *call, body string) {
	s := &fuzzedStream{}
	w.streams[c] = s
	c.stream = &callStream{take: func(part Reply) {
		want := fmt.Sprintf("part %d of %s %s", s.taken, c.correlation, body)
		if got := string(part.Output[0]); got != want || w.ends[c] > 0 {
			w.t.Fatalf("%+v got %q, want %q, and ended %d times", c, got, want, w.ends[c])
		}
		s.taken++
		s.unwritten = append(s.unwritten, part)
	}}
}

// deliverGrant brings a grant to the broker.
func (w *clientWorld) deliverGrant(message []string) {
	correlation := ""
	if w.correlated {
		correlation = message[0]
	}
	c := w.conn.inFlight[correlation]
	s := w.streams[c]
	n, err := strconv.Atoi(message[len(message)-1])
	if s == nil || err != nil || s.try.unanswered {
		w.t.Fatalf("%q was sent for %+v, %+v", message, c, s)
	}
	s.try.unanswered = true
	if s.try.granted += n; s.try.granted > s.taken-len(s.unwritten) {
		w.t.Fatalf("%d parts were granted, and %d written", s.try.granted, s.taken-len(s.unwritten))
	}
	w.grants = append(w.grants, fuzzedGrant{message, s.try})
}

func (w *clientWorld) send(frames [][]byte) error {
	if w.err != nil {
		return w.err
	}
	w.unsent = append(w.unsent, spell(frames))
	w.deliver()
	return nil
}

// deliver brings messages to the broker. A request must be what was asked for, and be wanted.
func (w *clientWorld) deliver() {
	for w.there && len(w.unsent) > 0 {
		message := w.unsent[0]
		w.unsent = w.unsent[1:]
		at := serviceAt(message)
		switch message[at] {
		case "mmi.service":
			w.questions = append(w.questions, message)
			continue
		case "mmi.credit":
			w.deliverGrant(message)
			continue
		}
		w.requests = append(w.requests, message)
		if message[at] == "mmi.cancel" {
			continue
		}
		w.partsSent[strings.Join(message, " ")] = 0
		c := w.calls[message[len(message)-1]]
		if c == nil || len(message) != at+2 || message[at] != c.service {
			w.t.Fatalf("nobody asked for %q", message)
		}
		if w.ends[c] > 0 {
			w.t.Fatalf("%q was sent after its end", message)
		}
		if s := w.streams[c]; s != nil {
			if s.taken > 0 {
				w.t.Fatalf("%q was sent after its first part", message)
			}
			s.try = &fuzzedTry{}
		}
	}
}

func (w *clientWorld) step(what, which byte) {
	switch what % 14 {
	case 0, 1, 10:
		body := fmt.Sprint("body ", len(w.calls))
		c := &call{service: fmt.Sprint("s", which%3), body: frames(body), timeout: time.Duration(which>>4) * time.Second, retries: int(which % 4), patient: which%8 > 3}
		w.calls[body] = c
		if what%14 == 10 {
			w.beginStream(c, body)
		}
		w.begin(c, w.clock)
	case 2:
		if w.conn != nil {
			w.there = true
			w.setConnected()
			w.deliver()
		}
	case 3:
		w.breaks()
	case 4, 5:
		if w.there && len(w.requests) > 0 {
			at := int(which) % len(w.requests)
			request := w.requests[at]
			w.requests = slices.Delete(w.requests, at, at+1)
			var body []string
			switch {
			case request[serviceAt(request)] == "mmi.cancel":
				body = []string{[]string{"200", "404"}[what%2]}
			case which > 220:
				body = refusal([]string{"the queue is full", shuttingDown}[what%2])
			case which > 200:
				body = []string{"", "", "exit status 75"}
			default:
				body = []string{"reply to " + request[len(request)-1]}
			}
			w.receive(frames(answerTo(request, body...)...), w.clock)
		}
	case 6:
		w.clock = w.clock.Add(time.Duration(which) * 50 * time.Millisecond)
	case 7:
		if c := w.calls[fmt.Sprint("body ", which)]; c != nil {
			w.cancelled[c] = true
			w.cancel(c, w.clock)
		}
	case 8:
		w.err = []error{nil, errWouldBlock, errors.New("broken pipe"), nil}[which%4]
	case 9:
		bad := [][]string{{}, {""}, {"MDPC02"}, {"MDPC02", "\x01", "s0"}, {"MDPC02", "\x03", "mmi.service", "200"}, {"99", "", "MDPC01", "s0", "whose?"}, {"", "MDPC01", "nobody"},
			{"", "MDPW01", "\x04"}, {"", "MDPC01", "mmi.cancel", "200"}, {"1.1", "", "MDPC01", "mmi.cancel", "200"}}
		if message := bad[int(which)%len(bad)]; w.there && (w.correlated || !slices.Contains(message, "99")) {
			w.receive(frames(message...), w.clock)
		}
	case 11:
		streams := slices.DeleteFunc(slices.Clone(w.requests), func(request []string) bool {
			return !slices.Contains(request, "MDPC02") || slices.Contains(request, "mmi.cancel")
		})
		if w.there && len(streams) > 0 {
			request := streams[int(which)%len(streams)]
			key, correlation := strings.Join(request, " "), ""
			if w.correlated {
				correlation = request[0]
			}
			part := answerTo(request, fmt.Sprintf("part %d of %s %s", w.partsSent[key], correlation, request[len(request)-1]))
			part[serviceAt(part)-1] = "\x02"
			w.partsSent[key]++
			w.receive(frames(part...), w.clock)
		}
	case 12:
		c := w.calls[fmt.Sprint("body ", which>>2)]
		if s := w.streams[c]; s != nil {
			n := min(len(s.unwritten), int(which%4))
			parts := s.unwritten[:n]
			s.unwritten = s.unwritten[n:]
			w.written(c, parts, w.clock)
		}
	case 13:
		code := []string{"200", "404", "400"}[which>>1%3]
		switch {
		case !w.there:
		case which%2 == 0 && len(w.questions) > 0:
			question := w.questions[0]
			w.questions = w.questions[1:]
			w.receive(frames(answerTo(question, code)...), w.clock)
		case which%2 == 1 && len(w.grants) > 0:
			grant := w.grants[0]
			w.grants = w.grants[1:]
			grant.try.unanswered = false
			w.receive(frames(answerTo(grant.message, code)...), w.clock)
		}
	}
	w.settle()
}

func (w *clientWorld) breaks() {
	w.there, w.questions, w.grants = false, nil, nil
	w.lost(w.clock)
}

// settle does what the loop does around each event.
func (w *clientWorld) settle() {
	w.tick(w.clock)
	w.closeDropped()
	if w.needsConnection() {
		w.open(w.send)
	}
	w.flush(w.clock)
	w.closeDropped()
	if w.err != nil && w.err != errWouldBlock && w.conn != nil && len(w.conn.inFlight) > 0 {
		w.err = nil
		w.breaks()
	}
}

// closeDropped closes a connection that the caller has dropped.
func (w *clientWorld) closeDropped() {
	if w.conn == nil {
		w.there, w.unsent, w.requests, w.questions, w.grants = false, nil, nil, nil, nil
	}
}

// check holds the caller to its invariants.
func (w *clientWorld) check() {
	w.t.Helper()
	for _, c := range w.takeEnded() {
		if w.ends[c]++; w.ends[c] > 1 {
			w.t.Fatalf("%+v ended twice", c)
		}
		if c.err != nil {
			if errors.Is(c.err, errCancelled) && !w.cancelled[c] {
				w.t.Fatalf("%+v ended as cancelled", c)
			}
			if !errors.Is(c.err, errCancelled) && failureOf(c.err).status < exitUsage {
				w.t.Fatalf("a call ended with %v, which has no status", c.err)
			}
			continue
		}
		reply := spell(c.reply.Output)
		if c.reply.Status == 0 && w.calls[strings.TrimPrefix(reply[0], "reply to ")] != c {
			w.t.Fatalf("%+v ended with the reply of another: %q", c, reply)
		}
	}

	places := map[*call][]string{}
	for _, c := range w.waiting {
		places[c] = append(places[c], "waiting")
	}
	for _, c := range w.pausing {
		places[c] = append(places[c], "pausing")
	}
	if w.conn != nil {
		for correlation, c := range w.conn.inFlight {
			if correlation != c.correlation {
				w.t.Fatalf("%+v is in flight as %q", c, correlation)
			}
			places[c] = append(places[c], "in flight")
		}
		if w.conn.failed != nil {
			places[w.conn.failed] = append(places[w.conn.failed], "failed")
		}
		if !w.correlated && len(w.conn.inFlight) > 1 {
			w.t.Fatal("several calls are in flight that nothing tells apart")
		}
	}
	deadline := w.deadline()
	for _, c := range w.calls {
		if n := len(places[c]) + w.ends[c]; n > 1 || n == 0 && !w.abandoned {
			w.t.Fatalf("%+v is %q, and ended %d times", c, places[c], w.ends[c])
		}
		due := c.due
		if len(places[c]) == 1 && places[c][0] == "pausing" {
			due = c.resume
		}
		if len(places[c]) == 1 && places[c][0] != "failed" && !due.IsZero() && (deadline.IsZero() || deadline.After(due)) {
			w.t.Fatalf("%+v is due, but tick is at %v", c, deadline)
		}
	}
}
