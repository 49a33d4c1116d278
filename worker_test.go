package main

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
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
			heartbeatFlags: heartbeatFlags{Heartbeat: duration(time.Second), Liveness: 5},
			voice:          voice{quiet: true},
		},
		send: func(frames [][]byte) error {
			if l.failure == nil {
				l.sent = append(l.sent, spell(frames))
			}
			return l.failure
		},
		start: func(body [][]byte) { l.started = append(l.started, spell(body)) },
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
	l.pass(100)
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

// The wire, against a raw ROUTER that is a broker of its own.

// startService runs a service until the end of the test, or until stop is called.
func startService(t testing.TB, endpoint string, handle Handle) (stop func()) {
	t.Helper()
	s := Service{
		Name:           "echo",
		Endpoint:       endpoint,
		Handle:         handle,
		heartbeatFlags: heartbeatFlags{Heartbeat: duration(50 * time.Millisecond), Liveness: 100},
		voice:          voice{quiet: true},
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Connect(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	return stop
}

// bindPeer makes a raw broker and tells where it is.
func bindPeer(t *testing.T) (peer, string) {
	t.Helper()
	p := newPeer(t, zmq.ROUTER)
	if err := p.Bind("tcp://127.0.0.1:*"); err != nil {
		t.Fatal(err)
	}
	endpoint, err := p.GetLastEndpoint()
	if err != nil {
		t.Fatal(err)
	}
	return p, endpoint
}

// next receives the next message of a worker that is no heartbeat.
func (p peer) next() (identity string, message []string) {
	p.t.Helper()
	for {
		message := p.recv()
		if !reflect.DeepEqual(message[1:], heartbeatFrames) {
			return message[0], message[1:]
		}
	}
}

func TestServiceSpeaksWithABrokerThatIsNotOurs(t *testing.T) {
	broker, endpoint := bindPeer(t)
	release := make(chan struct{})
	startService(t, endpoint, func(body [][]byte) [][]byte {
		<-release
		return append(body, []byte("\x00\xff"))
	})

	worker, ready := broker.next()
	broker.want(ready, "", "MDPW01", "\x01", "echo")
	if !strings.HasPrefix(worker, "bservice.") {
		t.Errorf("the identity %q does not tell who it is", worker)
	}

	// Heartbeats come while it works, in which this broker sends none.
	broker.send(worker, "", "MDPW01", "\x02", "\x00client", "stack", "", "hello", "")
	for range 3 {
		broker.want(broker.recv(), append([]string{worker}, heartbeatFrames...)...)
	}
	close(release)
	_, reply := broker.next()
	broker.want(reply, "", "MDPW01", "\x03", "\x00client", "stack", "", "hello", "", "\x00\xff")

	// DISCONNECT, here without the empty frame, makes it register as somebody else.
	broker.send(worker, "MDPW01", "\x05")
	again, ready := broker.next()
	broker.want(ready, "", "MDPW01", "\x01", "echo")
	if again == worker {
		t.Errorf("the identity %q was used twice", worker)
	}
}

func TestServiceWhoseConnectionBrokeRegistersAnewAsSomebodyElse(t *testing.T) {
	endpoint := "ipc://" + t.TempDir() + "/broker"
	bind := func() peer {
		broker := newPeer(t, zmq.ROUTER)
		if err := broker.Bind(endpoint); err != nil {
			t.Fatal(err)
		}
		return broker
	}
	broker := bind()
	startService(t, endpoint, nil)
	worker, _ := broker.next()
	broker.Close()
	broker = bind()
	again := broker.recv()
	broker.want(again[1:], "", "MDPW01", "\x01", "echo")
	if again[0] == worker {
		t.Errorf("the identity %q was used twice", worker)
	}
}

func TestServiceThatIsStoppedRepliesAndTakesItsLeave(t *testing.T) {
	broker, endpoint := bindPeer(t)
	started, release := make(chan struct{}), make(chan struct{})
	stop := startService(t, endpoint, func(body [][]byte) [][]byte {
		close(started)
		<-release
		return body
	})
	worker, _ := broker.next()
	broker.send(worker, "", "MDPW01", "\x02", "C", "", "x")
	<-started
	go stop()
	broker.recv() // it still sends heartbeats
	close(release)
	_, reply := broker.next()
	broker.want(reply, "", "MDPW01", "\x03", "C", "", "x")
	_, leave := broker.next()
	broker.want(leave, "", "MDPW01", "\x05")
}

func TestServiceTurnedAwayAgainAndAgainDoesNotHammer(t *testing.T) {
	broker, endpoint := bindPeer(t)
	startService(t, endpoint, nil)
	begin := time.Now()
	for range 5 {
		worker, ready := broker.next()
		broker.want(ready, "", "MDPW01", "\x01", "echo")
		broker.send(worker, "", "MDPW01", "\x05")
	}
	// Four heartbeats of 50 ms must have passed between five sessions.
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("it registered five times within %v", took)
	}
}

// The command.

func TestFramesBecomeArgumentsByteForByte(t *testing.T) {
	for _, test := range []struct {
		name    string
		command []string
		body    [][]byte
		argv    []string
	}{
		{"none", []string{"ls"}, nil, []string{"ls"}},
		{"at the end", []string{"ls", "-l"}, frames("a b", "", "$x;`y`", "\xff\n"),
			[]string{"ls", "-l", "a b", "", "$x;`y`", "\xff\n"}},
		{"in the place of {}", []string{"cp", "{}", "/dest"}, frames("a", "b"), []string{"cp", "a", "b", "/dest"}},
		{"nothing in the place of {}", []string{"cp", "{}", "/dest"}, nil, []string{"cp", "/dest"}},
		{"{} that does not stand alone", []string{"echo", "<{}>"}, frames("a"), []string{"echo", "<{}>", "a"}},
		{"a {} of the request", []string{"echo"}, frames("{}"), []string{"echo", "{}"}},
		{"a command named {}", []string{"{}"}, frames("a"), []string{"{}", "a"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := CmdService{Name: "x", Command: test.command}
			argv, err := c.argv(test.body)
			if err != nil || !reflect.DeepEqual(argv, test.argv) {
				t.Errorf("argv(%q) = %q, %v, want %q", test.body, argv, err, test.argv)
			}
		})
	}
}

func TestCommandsEndInTheReplyThatTheyDeserve(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("not executable"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		command []string
		body    [][]byte
		want    []string // of a status reply's standard error, the beginning is enough
	}{
		{"success", []string{"printf", `a\000\377`}, nil, []string{"a\x00\xff"}},
		{"success in silence", []string{"true"}, nil, []string{""}},
		{"empty standard input", []string{"cat"}, nil, []string{""}},
		{"environment", []string{"sh", "-c", "printf %s $BACKBONE_SERVICE"}, nil, []string{"svc"}},
		{"failure", []string{"sh", "-c", "printf out; printf err >&2; exit 3"}, nil, []string{"out", "err", "exit status 3"}},
		{"killed", []string{"sh", "-c", "kill -9 $$"}, nil, []string{"", "", "exit status 137"}},
		{"not found", []string{"no-such-command"}, nil, []string{"", "bservice: svc: ", "exit status 127"}},
		{"no such file", []string{"/no/such/file"}, nil, []string{"", "bservice: svc: ", "exit status 127"}},
		{"not executable", []string{plain}, nil, []string{"", "bservice: svc: ", "exit status 126"}},
		{"NUL byte", []string{"echo"}, frames("a", "b\x00c"), []string{"", "bservice: svc: frame 2 holds a NUL byte", "exit status 126"}},
		{"too long", []string{"echo"}, [][]byte{make([]byte, 0), []byte(strings.Repeat("x", 1<<20))},
			[]string{"", "bservice: svc: ", "exit status 126"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := CmdService{Name: "svc", Command: test.command, Killed: context.Background()}
			got := spell(c.Handle(test.body))
			if len(got) == 3 && len(test.want) == 3 {
				got[1] = got[1][:min(len(got[1]), len(test.want[1]))]
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestKilledCommandTakesItsChildrenAlong(t *testing.T) {
	killed, kill := context.WithCancel(context.Background())
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// The child holds the fifo open for writing until it dies.
	c := CmdService{Name: "svc", Command: []string{"sh", "-c", `sleep 1000 >"$0" & wait`, fifo}, Killed: killed}
	ended := make(chan [][]byte)
	go func() { ended <- c.Handle(nil) }()
	reader, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	kill()
	if _, err := reader.Read(make([]byte, 1)); err == nil || err.Error() != "EOF" {
		t.Errorf("reading from the child: %v, want EOF", err)
	}
	if got := spell(<-ended); len(got) != 3 || got[2] != "exit status 137" {
		t.Errorf("got %q", got)
	}
}

func TestGrandchildThatKeepsTheOutputOpenDoesNotHoldBackTheReply(t *testing.T) {
	t.Parallel() // it takes the two seconds that such a grandchild is given
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	c := CmdService{Name: "svc", Command: []string{"sh", "-c", `cat "$0" & echo done`, fifo}, Killed: context.Background()}
	ended := make(chan [][]byte)
	go func() { ended <- c.Handle(nil) }()
	select {
	case got := <-ended:
		if spelled := spell(got); len(spelled) != 1 || spelled[0] != "done\n" {
			t.Errorf("got %q", spelled)
		}
	case <-time.After(20 * time.Second):
		t.Error("the reply is held back")
	}
	// Lets the grandchild go.
	if f, err := os.OpenFile(fifo, os.O_WRONLY, 0); err == nil {
		f.Close()
	}
}
