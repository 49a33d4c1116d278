package main

import (
	"reflect"
	"syscall"
	"testing"
	"time"
)

// A fakeLink is a session without a socket and without a command: it records what the
// session sends and starts, and its clock goes only when told to.
type fakeLink struct {
	*session
	t       *testing.T
	sent    [][]string // since the last call of expect
	started [][]string // the bodies of the requests that were started
	failure error      // of every send
	clock   time.Time
}

func newFakeLink(t *testing.T) *fakeLink {
	l := &fakeLink{t: t, clock: time.Unix(0, 0)}
	l.session = &session{
		Service: &Service{
			Name:           "echo",
			heartbeatFlags: heartbeatFlags{Heartbeat: time.Second, Liveness: 5},
			console:        console{quiet: true},
		},
		send: func(frames [][]byte) error {
			if l.failure == nil {
				l.sent = append(l.sent, spell(frames))
			}
			return l.failure
		},
		start: func(_ string, body [][]byte) { l.started = append(l.started, spell(body)) },
	}
	l.Tick(l.clock)
	return l
}

// register brings the session to where it waits for requests.
func (l *fakeLink) register() {
	l.t.Helper()
	l.Flush()
	l.expect([]string{"", "MDPW01", "\x01", "echo"})
}

func (l *fakeLink) from(spelled ...string) {
	l.t.Helper()
	l.Receive(frames(spelled...))
}

func (l *fakeLink) pass(n int) {
	for range n {
		l.clock = l.clock.Add(time.Second)
		l.Tick(l.clock)
	}
}

func (l *fakeLink) expect(want ...[]string) {
	l.t.Helper()
	if len(l.sent) != len(want) || len(want) > 0 && !reflect.DeepEqual(l.sent, want) {
		l.t.Fatalf("the worker sent %q, want %q", l.sent, want)
	}
	l.sent = nil
}

func (l *fakeLink) expectOver(over bool) {
	l.t.Helper()
	if (l.over != nil) != over {
		l.t.Fatalf("the session is over: %v, want %v (%v)", l.over != nil, over, l.over)
	}
}

func TestReadyIsTheFirstThingThatIsSent(t *testing.T) {
	l := newFakeLink(t)
	if !l.unsent() {
		t.Error("the session does not wait for the broker")
	}
	l.failure = errWouldBlock
	l.Flush()
	l.Tick(l.clock)
	l.expectOver(false)
	l.failure = nil
	l.register()
	if l.unsent() {
		t.Error("the session waits to send more")
	}
}

func TestReplyGoesToTheAddressOfItsRequest(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "7", "", "hello", "")
	if want := [][]string{{"hello", ""}}; !reflect.DeepEqual(l.started, want) {
		t.Fatalf("started %q, want %q", l.started, want)
	}
	l.Finish(frames("good", "bye"))
	l.expect([]string{"", "MDPW01", "\x03", "A", "7", "", "good", "bye"})
}

func TestMissingBrokerIsToldOfEveryHalfMinute(t *testing.T) {
	l := newFakeLink(t)
	l.quiet, l.tool, l.Endpoint = false, "bservice", "tcp://nowhere:5555"
	const waits = "bservice: echo waits for a broker at tcp://nowhere:5555\n"
	for _, want := range []struct {
		seconds int
		said    string
	}{{0, ""}, {1, waits}, {29, ""}, {1, waits}, {29, ""}, {1, waits}} {
		if said := ours(t, func() { l.pass(want.seconds) }); said != want.said {
			t.Errorf("after %d s more it said %q, want %q", want.seconds, said, want.said)
		}
		// Each time it begins anew, since the broker's name may have another address.
		if over := l.over != nil; over != (want.said != "") {
			t.Errorf("after %d s more the session is over: %v", want.seconds, l.over)
		}
		l.over = nil
	}
	ours(t, func() { l.register() })
	if said := ours(t, func() { l.pass(3) }); said != "" {
		t.Errorf("with a broker it said %q", said)
	}
}

func TestHeartbeatsGoOnWhileTheCommandRuns(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "")
	l.pass(3)
	l.expect(heartbeatFrames, heartbeatFrames, heartbeatFrames)
}

func TestHeartbeatOfTheBrokerIsNotAnswered(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from(heartbeatFrames...)
	l.expect()
}

func TestSessionEndsWhenTheBrokerFallsSilent(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.pass(5)
	l.from(heartbeatFrames...)
	l.pass(5)
	l.expectOver(false)
	l.pass(1)
	l.expectOver(true)
}

func TestSessionEndsWhenAnIdleWorkerLosesItsConnection(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.Lose()
	l.expectOver(true)
}

func TestSessionOutlivesASilentOrAbsentBrokerWhileTheCommandRuns(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "")
	l.pass(100)
	l.failure = errWouldBlock
	l.Lose()
	l.pass(100)
	l.sent = nil
	l.Finish(frames("done"))
	l.pass(1)
	l.expectOver(false)
	if !l.unsent() {
		t.Fatal("the reply is lost")
	}
	l.failure = nil
	l.Flush()
	l.expect([]string{"", "MDPW01", "\x03", "A", "", "done"})
}

func TestDisconnectEndsTheSession(t *testing.T) {
	for _, disconnect := range [][]string{{"", "MDPW01", "\x05"}, {"MDPW01", "\x05"}} {
		l := newFakeLink(t)
		l.register()
		l.from(disconnect...)
		l.expectOver(true)
		l.pass(10)
		l.expect()
	}
}

func TestReplyIsNotSentToABrokerThatDisconnectedMeanwhile(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "")
	l.from("", "MDPW01", "\x05")
	l.pass(10)
	if !l.working {
		t.Error("the command was forgotten")
	}
	l.Finish(frames("done"))
	l.expect()
	l.expectOver(true)
}

func TestConnectionLostInAMessageEndsTheSession(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "")
	l.failure = syscall.EAGAIN
	l.Finish(frames("done"))
	l.expectOver(true)
}

func TestBadMessagesOfABrokerChangeNothing(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	for _, bad := range [][]string{
		{}, {""}, {"hello"}, {"", "MDPW01"}, {"", "MDPW01", "\x09"},
		{"", "MDPW01", "\x01", "echo"}, {"", "MDPW01", "\x02", "A"},
		{"", "MDPW01", "\x03", "A", "", "x"}, {"", "MDPC01", "echo", "x"},
	} {
		l.from(bad...)
	}
	l.expect()
	l.expectOver(false)
	if l.started != nil {
		t.Errorf("started %q", l.started)
	}
}

func TestSecondRequestBeforeTheReplyIsNotStarted(t *testing.T) {
	l := newFakeLink(t)
	l.register()
	l.from("", "MDPW01", "\x02", "A", "", "1")
	l.from("", "MDPW01", "\x02", "B", "", "2")
	l.Finish(frames("one"))
	l.expect([]string{"", "MDPW01", "\x03", "A", "", "one"})
	if len(l.started) != 1 {
		t.Errorf("started %q", l.started)
	}
}

func TestLeaveSaysDisconnectOnlyToABrokerThatKnowsUs(t *testing.T) {
	l := newFakeLink(t)
	l.Leave()
	l.expect()
	l.register()
	l.Leave()
	l.expect([]string{"", "MDPW01", "\x05"})
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
