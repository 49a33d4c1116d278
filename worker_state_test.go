package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// noHandler is a slot in which no command runs.
func noHandler(brokerAddress, string, [][]byte) Reply { return Reply{} }

// A fakeSession is a session without a socket and a command: it records what the session sends and
// which requests it starts, and its clock goes only when told to.
type fakeSession struct {
	*session
	t       *testing.T
	sent    [][]string // since the last call of expect
	started [][]string // bodies of requests
	failure error      // of every send
	bytes   uint64     // received
	woken   bool       // since the last claim
	clock   time.Time
}

func newFakeSession(t *testing.T) *fakeSession { return newFakeSessionWith(t, newSlots(noHandler)) }

// newFakeSessionWith returns a session that shares slots with others.
func newFakeSessionWith(t *testing.T, slots *slots) *fakeSession {
	s := &fakeSession{t: t, clock: time.Unix(0, 0)}
	s.session = &session{
		Service: &Service{
			Name:           "echo",
			Slots:          slots,
			heartbeatFlags: heartbeatFlags{Heartbeat: time.Second, Liveness: 5},
		},
		send: func(frames [][]byte) error {
			if s.failure == nil {
				s.sent = append(s.sent, spell(frames))
			}
			return s.failure
		},
		received: func() uint64 { return s.bytes },
		wake:     func() { s.woken = true },
		start:    func(_ Handler, _ string, body [][]byte) { s.started = append(s.started, spell(body)) },
	}
	s.logTo(noLog, true, false)
	s.Tick(s.clock)
	return s
}

// register makes the session send READY, after which it waits for requests.
func (s *fakeSession) register() {
	s.t.Helper()
	s.Flush()
	s.expect([]string{"", "MDPW01", "\x01", "echo"})
}

func (s *fakeSession) from(spelled ...string) {
	s.t.Helper()
	s.Receive(frames(spelled...))
	s.Start(s.clock)
}

// claim lets the session do what its loop does when the session has been woken.
func (s *fakeSession) claim() {
	s.t.Helper()
	if !s.woken {
		s.t.Fatal("the session was not woken")
	}
	s.woken = false
	s.Claim(s.clock)
}

// pass advances the clock by n heartbeat intervals.
func (s *fakeSession) pass(n int) {
	for range n {
		s.clock = s.clock.Add(time.Second)
		s.Tick(s.clock)
	}
}

// expect checks the messages sent since its last call.
func (s *fakeSession) expect(want ...[]string) {
	s.t.Helper()
	if len(s.sent) != len(want) || len(want) > 0 && !reflect.DeepEqual(s.sent, want) {
		s.t.Fatalf("the worker sent %q, want %q", s.sent, want)
	}
	s.sent = nil
}

func (s *fakeSession) expectOver(over bool) {
	s.t.Helper()
	if (s.over != nil) != over {
		s.t.Fatalf("the session is over: %v, want %v (%v)", s.over != nil, over, s.over)
	}
}

func TestReadyIsTheFirstThingThatIsSent(t *testing.T) {
	s := newFakeSession(t)
	if !s.unsent() {
		t.Error("the session has nothing to send")
	}
	s.failure = errWouldBlock
	s.Flush()
	s.Tick(s.clock)
	s.expectOver(false)
	s.failure = nil
	s.register()
	if s.unsent() {
		t.Error("the session has more to send")
	}
}

func TestReplyGoesToTheAddressOfItsRequest(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "7", "", "hello", "")
	if want := [][]string{{"hello", ""}}; !reflect.DeepEqual(s.started, want) {
		t.Fatalf("started %q, want %q", s.started, want)
	}
	s.Finish(frames("good", "bye"))
	s.expect([]string{"", "MDPW01", "\x03", "A", "7", "", "good", "bye"})
}

func TestMissingBrokerIsReportedEveryHalfMinute(t *testing.T) {
	s := newFakeSession(t)
	var log bytes.Buffer
	s.Broker.endpoint = "tcp://nowhere:5555"
	s.logTo(slog.New(slog.NewTextHandler(&log, nil)), true, false)
	const waits = `level=WARN msg="waiting for a broker" broker=tcp://nowhere:5555 why="no broker is there"`
	for _, want := range []struct {
		seconds int
		logged  string
	}{{0, ""}, {1, waits}, {29, ""}, {1, waits}, {29, ""}, {1, waits}} {
		log.Reset()
		s.pass(want.seconds)
		if got := log.String(); (got != "") != (want.logged != "") || !strings.Contains(got, want.logged) {
			t.Errorf("after %d s more it logged %q, want %q", want.seconds, got, want.logged)
		}
		// Each time the session ends, since the name of the broker may now have another address.
		if over := s.over != nil; over != (want.logged != "") {
			t.Errorf("after %d s more the session is over: %v", want.seconds, s.over)
		}
		s.over = nil
	}
	s.register()
	log.Reset()
	s.pass(3)
	if got := log.String(); got != "" {
		t.Errorf("with a broker it logged %q", got)
	}
}

func TestHeartbeatsGoOnWhileTheCommandRuns(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "")
	s.pass(3)
	s.expect(heartbeatFrames, heartbeatFrames, heartbeatFrames)
}

func TestHeartbeatOfTheBrokerIsNotAnswered(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from(heartbeatFrames...)
	s.expect()
}

func TestSessionEndsWhenTheBrokerFallsSilent(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.pass(5)
	s.from(heartbeatFrames...)
	s.pass(5)
	s.expectOver(false)
	s.pass(1)
	s.expectOver(true)
}

func TestSessionEndsWhenAnIdleWorkerLosesItsConnection(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.Lose()
	s.expectOver(true)
}

func TestSessionOutlivesASilentOrAbsentBrokerWhileTheCommandRuns(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "")
	s.pass(100)
	s.failure = errWouldBlock
	s.Lose()
	s.pass(100)
	s.sent = nil
	s.Finish(frames("done"))
	s.pass(1)
	s.expectOver(false)
	if !s.unsent() {
		t.Fatal("the reply is lost")
	}
	s.failure = nil
	s.Flush()
	s.expect([]string{"", "MDPW01", "\x03", "A", "", "done"})
}

func TestDisconnectEndsTheSession(t *testing.T) {
	for _, disconnect := range [][]string{{"", "MDPW01", "\x05"}, {"MDPW01", "\x05"}} {
		s := newFakeSession(t)
		s.register()
		s.from(disconnect...)
		s.expectOver(true)
		s.pass(10)
		s.expect()
	}
}

func TestRequestBeforeADisconnectIsNotStarted(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.Receive(frames("", "MDPW01", "\x02", "token", "", "x"))
	s.Receive(frames("", "MDPW01", "\x05"))
	s.Start(s.clock)
	s.expectOver(true)
	if s.started != nil || s.working {
		t.Errorf("started %q", s.started)
	}
}

func TestRequestOfAWorkerThatStoodStillIsReturnedAndNotStarted(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.clock = s.clock.Add(5 * time.Second)
	s.from("", "MDPW01", "\x02", "token", "", "x")
	s.expectOver(false)
	if len(s.started) != 1 {
		t.Fatal("a short delay kept the request from starting")
	}

	s = newFakeSession(t)
	s.register()
	s.clock = s.clock.Add(7 * time.Second)
	s.from("", "MDPW01", "\x02", "token", "", "x")
	s.expect([]string{"", "MDPW01", "\x05"})
	s.expectOver(true)
	if s.started != nil {
		t.Errorf("started %q", s.started)
	}
}

func TestBytesFromTheBrokerAreASignOfLife(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	for range 20 {
		s.bytes += 1000
		s.pass(1)
	}
	s.expectOver(false)
	s.pass(6)
	s.expectOver(true)
}

func TestReplyThatCannotBeSentEndsASilentSession(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "token", "", "x")
	s.pass(20)
	s.failure = errWouldBlock
	s.Finish(frames("y"))
	s.pass(5)
	s.expectOver(false)
	s.pass(1)
	s.expectOver(true)
}

func TestReplyIsNotSentToABrokerThatDisconnectedMeanwhile(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "")
	s.from("", "MDPW01", "\x05")
	s.pass(10)
	if !s.working {
		t.Error("the session no longer waits for the command")
	}
	s.Finish(frames("done"))
	s.expect()
	s.expectOver(true)
}

func TestReplyThatIsDroppedIsLoggedOnce(t *testing.T) {
	disconnect := func(s *fakeSession) { s.from("", "MDPW01", "\x05") }
	unsent := func(s *fakeSession) {
		s.failure = errWouldBlock
		s.Finish(frames("reply"))
	}
	broken := func(s *fakeSession) {
		s.failure = syscall.ECONNRESET
		s.Finish(frames("reply"))
	}
	for _, test := range []struct {
		why    string
		events []func(*fakeSession)
	}{
		{"the broker sent DISCONNECT", []func(*fakeSession){disconnect, func(s *fakeSession) { s.Finish(frames("reply")) }}},
		{"the broker sent DISCONNECT", []func(*fakeSession){unsent, disconnect}},
		{"the broker was silent for 5 heartbeats", []func(*fakeSession){unsent, func(s *fakeSession) { s.pass(10) }}},
		{"the broker is gone", []func(*fakeSession){unsent, func(s *fakeSession) { s.Leave() }}},
		{"connection reset by peer", []func(*fakeSession){broken}},
	} {
		s := newFakeSession(t)
		var log bytes.Buffer
		s.requestLog = slog.New(slog.NewTextHandler(&log, nil))
		s.register()
		s.from("", "MDPW01", "\x02", "C.7", "", "hello")
		for _, event := range test.events {
			event(s)
		}
		want := fmt.Sprintf("level=ERROR msg=\"reply dropped\" request=C.7 why=%q\n", test.why)
		if got := log.String(); !strings.HasSuffix(got, want) || strings.Count(got, "\n") != 1 {
			t.Errorf("it logged %q, want %q", got, want)
		}
	}
}

func TestConnectionLostInAMessageEndsTheSession(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "")
	s.failure = syscall.EAGAIN
	s.Finish(frames("done"))
	s.expectOver(true)
}

func TestBadMessagesOfABrokerChangeNothing(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	for _, bad := range [][]string{
		{}, {""}, {"hello"}, {"", "MDPW01"}, {"", "MDPW01", "\x09"},
		{"", "MDPW01", "\x01", "echo"}, {"", "MDPW01", "\x02", "A"},
		{"", "MDPW01", "\x03", "A", "", "x"}, {"", "MDPC01", "echo", "x"},
	} {
		s.from(bad...)
	}
	s.expect()
	s.expectOver(false)
	if s.started != nil {
		t.Errorf("started %q", s.started)
	}
}

func TestSecondRequestBeforeTheReplyIsNotStarted(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "A", "", "1")
	s.from("", "MDPW01", "\x02", "B", "", "2")
	s.Finish(frames("one"))
	s.expect([]string{"", "MDPW01", "\x03", "A", "", "one"})
	if len(s.started) != 1 {
		t.Errorf("started %q", s.started)
	}
}

func TestLeaveSendsDisconnectOnlyAfterReady(t *testing.T) {
	s := newFakeSession(t)
	s.Leave()
	s.expect()
	s.register()
	s.Leave()
	s.expect([]string{"", "MDPW01", "\x05"})
}

func TestTokensArePrintable(t *testing.T) {
	for _, test := range []struct{ address, token string }{
		{"631fbbb0.1", "631fbbb0.1"},
		{"\x00A\n", `\x00A\n`},
		{"a b\xff", `a b\xff`},
	} {
		if got := tokenOf([][]byte{[]byte(test.address)}); got != test.token {
			t.Errorf("tokenOf(%q) = %q, want %q", test.address, got, test.token)
		}
	}
	if got := tokenOf(frames("proxy", "7")); got != "proxy/7" {
		t.Errorf("the token of two frames is %q", got)
	}
}
