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
func noHandler(Request) Reply { return Reply{} }

// A fakeSession is a session without a socket and a command: it records what the session sends and
// which requests it starts, and its clock goes only when told to.
type fakeSession struct {
	*session
	t       *testing.T
	sent    [][]string // since the last call of expect
	started [][]string // bodies of requests
	running Request    // the last one
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
		start: func(_ Handler, r Request) {
			s.started = append(s.started, spell(r.Body))
			s.running = r
		},
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

// beginStream gives the session a request whose client takes two parts.
func (s *fakeSession) beginStream() {
	s.t.Helper()
	s.register()
	s.from("", "MDPW01", "\x02", sessionToken, "", "x")
}

const sessionToken = "01234567.7~2"

// print lets the command of a stream print something, which is due at once.
func (s *fakeSession) print(text string) {
	s.running.Stream.stdout().Write([]byte(text))
	s.clock = s.clock.Add(gatherTime)
	s.Tick(s.clock)
}

func partOf(token, output string) []string  { return []string{"MDPW02", "\x03", token, "", output} }
func finalOf(token, output string) []string { return []string{"MDPW02", "\x04", token, "", output} }

func TestPartsGoOutWithCreditOnlyAndBeforeTheFinalReply(t *testing.T) {
	s := newFakeSession(t)
	s.beginStream()
	s.print("1")
	s.print("2")
	s.print("3")
	s.expect(partOf(sessionToken, "1"), partOf(sessionToken, "2"))
	for _, late := range [][]string{{"01234567.6~2", "", "5"}, {sessionToken, "7", "", "5"}, {"", "5"}} {
		s.from(append([]string{"", "MDPW02", "\x07"}, late...)...)
		s.Tick(s.clock)
		s.expect()
	}
	s.print("4")
	s.from("", "MDPW02", "\x07", sessionToken, "", "1")
	s.Tick(s.clock)
	s.expect(partOf(sessionToken, "34"))
	s.Finish(frames("end"))
	s.expect(finalOf(sessionToken, "end"))

	s.from("", "MDPW02", "\x07", sessionToken, "", "1") // It comes late.
	s.from("", "MDPW01", "\x02", "01234567.8~1", "", "y")
	s.print("1")
	s.print("2")
	s.expect(partOf("01234567.8~1", "1"))
}

func TestStreamThatIsCancelledAsItEndsIsNoReasonToWait(t *testing.T) {
	for name, test := range map[string]struct {
		before func(s *fakeSession)
		quiet  bool
	}{
		"right after the reply": {func(s *fakeSession) { s.Finish(frames("end")) }, true},
		"later": {func(s *fakeSession) {
			s.Finish(frames("end"))
			s.from("", "MDPW01", "\x04")
		}, false},
	} {
		s := newFakeSession(t)
		s.beginStream()
		test.before(s)
		s.from("", "MDPW01", "\x05")
		if got := s.over == errUnwanted; got != test.quiet {
			t.Errorf("%s: the session is over because of %v", name, s.over)
		}
	}
}

func TestTickReturnsWhenAPartIsDue(t *testing.T) {
	s := newFakeSession(t)
	s.beginStream()
	s.print("1")
	s.running.Stream.stdout().Write([]byte("2"))
	if due, want := s.Tick(s.clock), s.clock.Add(gatherTime); due != want {
		t.Errorf("the next tick is due at %v, want %v", due, want)
	}
	s.print("3")
	s.print("without credit")
	if due := s.Tick(s.clock); due != s.due {
		t.Errorf("without credit the next tick is due at %v, want %v with the next heartbeat", due, s.due)
	}
}

func TestBadCreditIsReportedAndChangesNothing(t *testing.T) {
	for _, number := range [][]string{{}, {""}, {"-1"}, {"+1"}, {"1.5"}, {"x"}, {"1", "2"}} {
		s := newFakeSession(t)
		var log bytes.Buffer
		s.beginStream()
		s.logTo(slog.New(slog.NewTextHandler(&log, nil)), true, false)
		s.from(append([]string{"", "MDPW02", "\x07", sessionToken, ""}, number...)...)
		if said := log.String(); s.credit != 2 || !strings.Contains(said, `level=ERROR msg="bad message"`) || !strings.Contains(said, "a CREDIT") {
			t.Errorf("CREDIT %q: the credit is %d, and the log has %q", number, s.credit, said)
		}
		s.expectOver(false)
	}
}

func TestCreditDoesNotOverflow(t *testing.T) {
	s := newFakeSession(t)
	s.register()
	s.from("", "MDPW01", "\x02", "01234567.7~99999999999999999999999", "", "x")
	for _, n := range []string{"9223372036854775807", "18446744073709551615", "99999999999999999999999"} {
		s.from("", "MDPW02", "\x07", "01234567.7~99999999999999999999999", "", n)
		if s.credit != maxCredit {
			t.Errorf("after CREDIT %s the credit is %d", n, s.credit)
		}
	}
}

func TestReadyAnnouncesCancel(t *testing.T) {
	s := newFakeSession(t)
	s.Cancel = true
	s.Flush()
	s.expect([]string{"", "MDPW01", "\x01", "echo", "cancel"})
}

// TestEndOfTheSessionEndsTheCommandOfAStream has all reasons why a session ends, and all kinds of requests.
func TestEndOfTheSessionEndsTheCommandOfAStream(t *testing.T) {
	for how, end := range map[string]func(*fakeSession){
		"DISCONNECT":        func(s *fakeSession) { s.from("", "MDPW01", "\x05") },
		"connection breaks": func(s *fakeSession) { s.Lose() },
		"silence":           func(s *fakeSession) { s.pass(10) },
		"part fails": func(s *fakeSession) {
			s.failure = errWouldBlock
			if s.running.Stream != nil {
				s.print("x")
			}
		},
	} {
		for _, test := range []struct {
			token       string
			cancel, all bool // all: whatever the reason
		}{{sessionToken, false, true}, {sessionToken, true, true}, {"01234567.7", true, false}, {"01234567.7", false, false}} {
			t.Run(fmt.Sprint(how, "/", test.token, "/", test.cancel), func(t *testing.T) {
				s := newFakeSession(t)
				var log bytes.Buffer
				s.register()
				s.Cancel = test.cancel
				s.requestLog = slog.New(slog.NewTextHandler(&log, nil))
				s.from("", "MDPW01", "\x02", test.token, "", "x")
				end(s)
				ends := test.all || test.cancel && how == "DISCONNECT"
				if ended := s.running.Context.Err() != nil; ended != ends {
					t.Fatalf("the command has to end: %v, want %v", ended, ends)
				}
				s.expectOver(ends || how == "DISCONNECT")
				if !ends {
					return
				}
				if s.running.Stream != nil {
					if _, err := s.running.Stream.stdout().Write([]byte("x")); err != errUnread {
						t.Errorf("the writer got %v", err)
					}
				}
				s.sent = nil
				s.expectBusy(true)
				s.Finish(frames("rest"))
				s.expectBusy(false)
				s.expect()
				if log.Len() > 0 {
					t.Errorf("it logged %q", log.String())
				}
				expectFree(t, s.Slots, 1)
			})
		}
	}
}

// expectBusy checks whether the loop has to wait for a command.
func (s *fakeSession) expectBusy(busy bool) {
	s.t.Helper()
	if s.working != busy {
		s.t.Fatalf("a command runs: %v, want %v", s.working, busy)
	}
}

func TestFinalReplyThatCannotBeSentDoesNotOutliveTheConnection(t *testing.T) {
	s := newFakeSession(t)
	s.beginStream()
	s.failure = errWouldBlock
	s.Finish(frames("end"))
	s.expectOver(false)
	s.Lose()
	s.expectOver(true)
}

// FuzzSession lets a broker, a connection and commands do what they like, and checks that parts are those of the
// request in hand, in order and never more than there is credit for, and that nothing follows the end of a
// reply. Two bytes of the input are a step.
func FuzzSession(f *testing.F) {
	f.Add([]byte("\x00\x02\x02\x00\x02\x01\x03\x00"))                 // a stream, parts, its end
	f.Add([]byte("\x00\x01\x02\x00\x02\x01\x02\x02\x01\x05\x03\x00")) // without credit, and with more
	f.Add([]byte("\x00\x02\x02\x00\x05\x00\x02\x00\x03\x00"))         // cancelled
	f.Add([]byte("\x00\x00\x07\x01\x03\x00\x06\x00\x07\x00\x04\x03")) // a reply that cannot be sent, a lost connection
	f.Fuzz(func(t *testing.T, steps []byte) {
		w := &sessionWorld{fakeSession: newFakeSession(t)}
		w.session.send = w.record
		w.Cancel = len(steps)%2 == 1
		w.Flush()
		for ; len(steps) >= 2; steps = steps[2:] {
			w.step(steps[0], int(steps[1]))
			w.check()
		}
		w.finish()
		w.check()
		w.Leave()
		expectFree(t, w.Slots, 1)
	})
}

// A sessionWorld is the world around a session. Each request gets parts that count up.
type sessionWorld struct {
	*fakeSession
	count           int    // requests so far
	token           string // of the request that the broker gave last and that has not ended
	granted         int    // parts that may still come for it
	printed, passed int    // bytes
}

// record stands for the broker, which checks what it gets.
func (w *sessionWorld) record(frames [][]byte) error {
	if w.failure != nil {
		return w.failure
	}
	m, err := Parse(frames)
	if err != nil {
		w.t.Fatalf("the session sent %q: %v", frames, err)
	}
	if m.Kind != KindPartial && m.Kind != KindReply {
		return nil
	}
	streams := strings.Contains(w.token, "~")
	if w.token == "" || tokenOf(m.Client) != w.token || (m.Dialect == worker02) != streams {
		w.t.Fatalf("the session sent %q, but the request in hand is %q", frames, w.token)
	}
	if !streams {
		w.token = ""
		return nil
	}
	output := ParseReply(m.Body).Output[0]
	for _, b := range output {
		if b != byte(w.passed) {
			w.t.Fatalf("byte %d of a stream is %d", w.passed, b)
		}
		w.passed++
	}
	if m.Kind == KindPartial {
		if w.granted--; w.granted < 0 || len(output) == 0 || len(output) > maxPart {
			w.t.Fatalf("a part of %d bytes with credit for %d", len(output), w.granted+1)
		}
		return nil
	}
	if w.passed != w.printed {
		w.t.Fatalf("%d bytes came, want %d", w.passed, w.printed)
	}
	w.token = ""
	return nil
}

func (w *sessionWorld) step(what byte, n int) {
	switch what % 9 {
	case 0:
		token := fmt.Sprintf("01234567.%d", w.count)
		if n%3 > 0 {
			token += fmt.Sprintf("~%d", n%3)
		}
		if w.over == nil && !w.busy() {
			w.token, w.granted, w.printed, w.passed = token, n%3, 0, 0
		}
		w.count++
		w.Receive(frames("", "MDPW01", "\x02", token, "", "x"))
		if n < 200 {
			w.Start(w.clock)
		}
	case 1:
		if w.over == nil {
			w.granted += n % 4
		}
		w.Receive(frames("", "MDPW02", "\x07", w.token, "", fmt.Sprint(n%4)))
		w.Receive(frames("", "MDPW02", "\x07", "01234567.0~1", "x", "", fmt.Sprint(n)))
	case 2:
		if stream := w.running.Stream; w.working && stream != nil && stream.part.size() < maxPart {
			text := make([]byte, min(64*n, maxPart-stream.part.size()))
			for i := range text {
				text[i] = byte(w.printed + i)
			}
			written, _ := stream.stdout().Write(text)
			w.printed += written
		}
	case 3:
		w.finish()
	case 4:
		w.clock = w.clock.Add(time.Duration(n) * gatherTime)
		w.Tick(w.clock)
	case 5:
		w.Receive(frames("", "MDPW01", "\x05"))
	case 6:
		w.Lose()
	case 7:
		w.failure = []error{nil, errWouldBlock, syscall.ECONNRESET}[n%3]
		if w.unsent() {
			w.Flush()
		}
	case 8:
		bad := [][]string{{}, {"", "MDPW01"}, {"", "MDPW02", "\x07", w.token, "", "-1"}, {"", "MDPW02", "\x07", w.token, ""}, {"", "MDPW02", "\x03", w.token, "", "x"},
			{"", "MDPW01", "\x04"}, {"", "MDPC01", "echo"}}
		w.Receive(frames(bad[n%len(bad)]...))
	}
}

// finish ends the command, if one runs.
func (w *sessionWorld) finish() {
	if !w.working {
		return
	}
	body := frames("end")
	if w.running.Stream != nil {
		body = [][]byte{w.running.Stream.stdout().Bytes()}
	}
	w.Finish(body)
}

// check checks the invariants of the session.
func (w *sessionWorld) check() {
	w.t.Helper()
	if w.credit < 0 || w.credit > maxCredit {
		w.t.Fatalf("the credit is %d", w.credit)
	}
	if w.stream != nil && !w.working || w.working && (w.stream != nil) != w.streams {
		w.t.Fatalf("a command runs: %v, but there is a stream: %v", w.working, w.stream != nil)
	}
	if w.over != nil && w.working && (w.streams || w.Cancel) && w.running.Context.Err() == nil {
		w.t.Fatal("a command that nobody wants goes on")
	}
	if w.over != nil && (w.reply != nil || w.unsent()) {
		w.t.Fatal("a session that is over keeps a reply")
	}
}
