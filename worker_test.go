package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
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
	startService(t, endpoint, func(_ string, body [][]byte) [][]byte {
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
	stop := startService(t, endpoint, func(_ string, body [][]byte) [][]byte {
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

// testCommand runs a command by the rules that bservice has without flags.
func testCommand(command ...string) *CmdService {
	return &CmdService{
		Name:         "svc",
		Endpoint:     "tcp://broker:5555",
		Command:      command,
		Now:          context.Background(),
		commandRules: commandRules{KillAfter: duration(2 * time.Second), MaxOutput: 64 << 20, Stderr: "log"},
	}
}

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
			c := CmdService{Command: test.command}
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
			c := testCommand(test.command...)
			got := spell(c.Handle("token", test.body))
			if len(got) == 3 && len(test.want) == 3 {
				got[1] = got[1][:min(len(got[1]), len(test.want[1]))]
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestCommandKnowsItsServiceAndItsRequest(t *testing.T) {
	c := testCommand("sh", "-c", `printf '%s %s %s %s' "$BACKBONE_SERVICE" "$BACKBONE_ENDPOINT" "$BACKBONE_REQUEST" "$GREETING in $PWD"`)
	c.Env = []string{"GREETING=hello"}
	c.Cwd = "/"
	if got := spell(c.Handle("abc.1", nil)); !reflect.DeepEqual(got, []string{"svc tcp://broker:5555 abc.1 hello in /"}) {
		t.Errorf("got %q", got)
	}
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

func TestLastFrameIsTheStandardInputWhereAskedFor(t *testing.T) {
	c := testCommand("sh", "-c", `cat; printf ' %s' "$@"`, "sh")
	c.Stdin = true
	for _, test := range []struct {
		body []string
		want string
	}{
		{nil, " "},
		{[]string{"in\x00\xff\n"}, "in\x00\xff\n "},
		{[]string{"a", "b", "in"}, "in a b"},
		{[]string{"a", ""}, " a"},
	} {
		if got := spell(c.Handle("token", frames(test.body...))); !reflect.DeepEqual(got, []string{test.want}) {
			t.Errorf("%q: got %q, want %q", test.body, got, test.want)
		}
	}
}

func TestCommandNeedNotReadItsStandardInput(t *testing.T) {
	c := testCommand("echo", "done")
	c.Stdin = true
	if got := spell(c.Handle("token", [][]byte{make([]byte, 1<<22)})); !reflect.DeepEqual(got, []string{"done\n"}) {
		t.Errorf("got %.99q", got)
	}
}

func TestStandardErrorGoesWhereItIsWanted(t *testing.T) {
	const fine, wrong = "echo 1; echo 2 >&2; echo 3", "echo 1; echo 2 >&2; echo 3; exit 4"
	for _, test := range []struct {
		stderr, line string
		log          string
		want         []string
	}{
		{"log", fine, "2\n", []string{"1\n3\n"}},
		{"log", wrong, "2\n", []string{"1\n3\n", "2\n", "exit status 4"}},
		{"reply", fine, "", []string{"1\n3\n", "2\n", "exit status 0"}},
		{"reply", wrong, "", []string{"1\n3\n", "2\n", "exit status 4"}},
		{"merge", fine, "", []string{"1\n2\n3\n"}},
		{"merge", wrong, "", []string{"1\n2\n3\n", "", "exit status 4"}},
	} {
		c := testCommand("sh", "-c", test.line)
		c.Stderr = test.stderr
		var got []string
		log := ours(t, func() { got = spell(c.Handle("token", nil)) })
		if !reflect.DeepEqual(got, test.want) || log != test.log {
			t.Errorf("--stderr %s, %s: got %q and the log %q, want %q and %q", test.stderr, test.line, got, log, test.want, test.log)
		}
	}
}

// ours is what this process says on standard error while f runs.
func ours(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	defer func(stderr *os.File) { os.Stderr = stderr }(os.Stderr)
	os.Stderr = file
	f()
	said, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(said)
}

func TestFailureTellsTheEndOfALongStandardError(t *testing.T) {
	c := testCommand("sh", "-c", "seq 1 100000 >&2; exit 1")
	var got [][]byte
	log := ours(t, func() { got = c.Handle("token", nil) })
	if stderr := string(got[1]); len(stderr) < 64<<10 || len(stderr) > 128<<10 || !strings.HasSuffix(log, stderr) {
		t.Errorf("%d bytes of standard error that end in %q", len(stderr), stderr[len(stderr)-10:])
	}
}

func TestOutputBeyondItsBoundEndsTheCommand(t *testing.T) {
	for _, test := range []struct{ stderr, line string }{
		{"log", "yes"},
		{"merge", "yes >&2"},
		{"reply", "yes >&2"},
	} {
		c := testCommand("sh", "-c", test.line)
		c.MaxOutput, c.Stderr = 1000, test.stderr
		got := spell(c.Handle("token", nil))
		if len(got) != 3 || len(got[0])+len(got[1]) > 1200 || got[2] != "exit status 74" ||
			!strings.Contains(got[1], "bservice: svc: ended, since it printed more than --max-output 1000 bytes\n") {
			t.Errorf("--stderr %s: %.1500q", test.stderr, got)
		}
	}
}

func TestEndedCommandTakesItsGroupAlong(t *testing.T) {
	for _, test := range []struct {
		name, line string
		status     string
	}{
		{"both heed SIGTERM", `sleep 1000 3>"$0" & wait`, "exit status 143"},
		{"both ignore it", `trap "" TERM; sleep 1000 3>"$0" & wait`, "exit status 137"},
		{"the child ignores it and holds the output", `(trap "" TERM; exec sleep 1000 3>"$0") & wait`, "exit status 143"},
		{"the child ignores it and holds no output", `(trap "" TERM; exec sleep 1000 3>"$0" >&3 2>&3) & wait`, "exit status 143"},
		{"the child outlives the command", `trap "exit 0" TERM; (trap "" TERM; exec sleep 1000 3>"$0") & wait`, ""},
	} {
		for _, timeout := range []bool{false, true} {
			t.Run(fmt.Sprint(test.name, "/timeout=", timeout), func(t *testing.T) {
				now, end := context.WithCancel(context.Background())
				defer end()
				fifo := newFifo(t)
				c := testCommand("sh", "-c", test.line, fifo)
				c.Now, c.KillAfter = now, duration(100*time.Millisecond)
				if timeout {
					limit := duration(500 * time.Millisecond)
					c.Timeout, test.status = &limit, "exit status 124"
				}
				ended := make(chan [][]byte)
				go func() { ended <- c.Handle("token", nil) }()
				// The child holds it open until it dies.
				reader, err := os.Open(fifo)
				if err != nil {
					t.Fatal(err)
				}
				defer reader.Close()
				if !timeout {
					end()
				}
				got := spell(<-ended)
				if last := got[len(got)-1]; last != test.status {
					t.Errorf("got %q, want %s", got, test.status)
				}
				reader.SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := reader.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("reading from the child: %v, want EOF", err)
				}
			})
		}
	}
}

func newFifo(t *testing.T) string {
	t.Helper()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return fifo
}

func TestGrandchildThatKeepsTheOutputOpenDoesNotHoldBackTheReply(t *testing.T) {
	fifo := newFifo(t)
	c := testCommand("sh", "-c", `cat "$0" & echo done`, fifo)
	c.KillAfter = duration(100 * time.Millisecond)
	if got := spell(c.Handle("token", nil)); !reflect.DeepEqual(got, []string{"done\n"}) {
		t.Errorf("got %q", got)
	}
	// Lets the grandchild go.
	if f, err := os.OpenFile(fifo, os.O_WRONLY, 0); err == nil {
		f.Close()
	}
}

// The command that runs for longer than a request.

func newCoprocess(t *testing.T, command ...string) *coprocess {
	t.Helper()
	timeout := duration(20 * time.Second)
	c := &coprocess{CmdService: testCommand(command...), voice: voice{quiet: true}, terminator: '\n'}
	c.Timeout = &timeout
	t.Cleanup(c.close)
	return c
}

// asks has a coprocess answer a request. Of standard error the beginning is enough.
func (c *coprocess) asks(t *testing.T, body []string, want ...string) {
	t.Helper()
	got := spell(c.Handle("token", frames(body...)))
	if len(got) == 3 && len(want) == 3 {
		got[1] = got[1][:min(len(got[1]), len(want[1]))]
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%q: got %q, want %q", body, got, want)
	}
}

func TestCoprocessAnswersLineForLine(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.asks(t, nil, "\n")
	c.asks(t, []string{""}, "\n")
	c.asks(t, []string{"hello"}, "hello\n")
	c.asks(t, []string{"a", "", "b\x00\xff"}, "a\t\tb\x00\xff\n")
	long := strings.Repeat("x", 1<<22) // more than any pipe holds
	c.asks(t, []string{long}, long+"\n")
}

func TestCoprocessAnswersRecordForRecord(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.terminator = 0
	c.asks(t, []string{"two\nlines\n", "x"}, "two\nlines\n\tx")
	c.asks(t, []string{"a\x00"}, "", "bservice: svc: frame 1 holds a NUL byte, which ends a request\n", "exit status 126")
}

func TestCoprocessIsOneProcess(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", "while read x; do echo $$; done")
	c.open()
	first := fmt.Sprintln(c.running.Process.Pid)
	c.asks(t, nil, first)
	c.asks(t, nil, first)
}

func TestFramesThatWouldBeMistakenAreRefused(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.asks(t, []string{"a", "b\nc"}, "", "bservice: svc: frame 2 holds a newline, which ends a request\n", "exit status 126")
	c.asks(t, []string{"a\tb"}, "", "bservice: svc: frame 1 holds a tab, which separates arguments\n", "exit status 126")
	c.asks(t, []string{"fine"}, "fine\n")
}

// poisonable answers with its number among the processes, and does what it is told.
const poisonable = `echo >>"$0"; n=$(wc -l <"$0"); while read -r line; do
	case $line in
	"") echo $n ;;
	*) eval "$line" ;;
	esac
done`

func TestPoisonedRequestHurtsNobodyElse(t *testing.T) {
	for _, test := range []struct {
		poison string
		want   []string
	}{
		{"echo bad >&2; exit 3", []string{"", "bad\n", "exit status 3"}},
		{"printf half; exit 3", []string{"half", "", "exit status 3"}},
		{"kill -9 $$", []string{"", "", "exit status 137"}},
		{"exit", []string{"", "bservice: svc: ended without a reply\n", "exit status 69"}},
		{"exec >&-", []string{"", "bservice: svc: ended after --timeout 300ms\n", "exit status 124"}},
		{"read forever", []string{"", "bservice: svc: ended after --timeout 300ms\n", "exit status 124"}},
		{`printf 'one\ntwo\n'`, []string{"one\n", "bservice: svc: ended, since it printed more than a line for a request\n", "exit status 76"}},
		{"exec yes", []string{"y\n", "bservice: svc: ended, since it printed more than a line for a request\n", "exit status 76"}},
		{"exec tr '\\0' x </dev/zero", []string{strings.Repeat("x", 100_000), "bservice: svc: ended, since it printed more than --max-output 100000 bytes\n", "exit status 74"}},
	} {
		t.Run(test.poison, func(t *testing.T) {
			c := newCoprocess(t, "sh", "-c", poisonable, filepath.Join(t.TempDir(), "count"))
			c.MaxOutput = 100_000
			c.asks(t, nil, "1\n")
			*c.Timeout = duration(300 * time.Millisecond)
			c.asks(t, []string{test.poison}, test.want...)
			*c.Timeout = duration(20 * time.Second)
			c.asks(t, nil, "2\n")
			c.asks(t, nil, "2\n")
		})
	}
}

func TestLineThatNoRequestAskedForIsNobodysReply(t *testing.T) {
	dir := t.TempDir()
	fifo := newFifo(t)
	c := newCoprocess(t, "sh", "-c", poisonable, filepath.Join(dir, "count"))
	c.asks(t, []string{"echo first; read go <'" + fifo + "'; echo stray"}, "first\n")
	if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	for len(c.output.whole) == 0 {
		runtime.Gosched()
	}
	first := c.running
	c.asks(t, nil, "2\n")
	<-first.ended
}

func TestCoprocessThatDiedWhileIdleIsReplacedUnnoticed(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", poisonable, filepath.Join(t.TempDir(), "count"))
	c.asks(t, nil, "1\n")
	c.running.Process.Kill()
	<-c.running.ended
	c.asks(t, nil, "2\n")
}

func TestCoprocessThatEndsAgainAndAgainIsGivenPauses(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", "exit 5")
	c.asks(t, nil, "", "", "exit status 5")
	c.asks(t, nil, "", "", "exit status 5")
	c.asks(t, nil, "", "bservice: svc: sh ends again and again; it is given a pause of ", "exit status 75")
	c.pauses.until = time.Now()
	c.asks(t, nil, "", "", "exit status 5")
}

func TestPoisonDoesNotBringPausesToAProcessThatAnswers(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", poisonable, filepath.Join(t.TempDir(), "count"))
	for i := range 5 {
		c.asks(t, nil, fmt.Sprintln(i+1))
		c.asks(t, []string{"exit 3"}, "", "", "exit status 3")
	}
}

func TestPausesGrowToFiveSeconds(t *testing.T) {
	var p pauses
	now := time.Unix(1000, 0)
	var got []time.Duration
	for range 9 {
		p.grow(now)
		got = append(got, max(0, p.until.Sub(now)))
	}
	want := []time.Duration{0, 100, 200, 400, 800, 1600, 3200, 5000, 5000}
	for i := range want {
		want[i] *= time.Millisecond
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("pauses of %v, want %v", got, want)
	}
	for range 1000 {
		p.grow(now)
	}
	if pause := p.until.Sub(now); pause != longestPause {
		t.Errorf("after very many a pause of %v", pause)
	}
}

func TestCoprocessEndsWithItsInputOrElseByTheLadder(t *testing.T) {
	for _, test := range []struct {
		line string
		want string
	}{
		{"cat; exit 7", "exit status 7"},
		{"read x; exec sleep 1000", "signal: terminated"},
		{"trap '' TERM; read x; exec sleep 1000", "signal: killed"},
	} {
		c := newCoprocess(t, "sh", "-c", test.line)
		c.KillAfter = duration(100 * time.Millisecond)
		c.open()
		c.close()
		if got := c.running.ProcessState.String(); got != test.want {
			t.Errorf("%s: %s, want %s", test.line, got, test.want)
		}
	}
}

// Whole services, for a long time and under load.

// expectNoDescendants looks for processes in the site's folder, besides our tools.
func (s *site) expectNoDescendants() {
	s.t.Helper()
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.broker.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	s.expectNoProcess(func(_ int, exe string) bool { return filepath.Dir(exe) == filepath.Dir(ours) })
}

// expectNoProcess looks for processes in the site's folder but those to keep. What was
// just killed may take a moment to go.
func (s *site) expectNoProcess(keep func(pid int, exe string) bool) {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; {
		var left []string
		dirs, _ := filepath.Glob("/proc/[0-9]*")
		for _, dir := range dirs {
			cwd, _ := os.Readlink(dir + "/cwd")
			exe, _ := os.Readlink(dir + "/exe")
			if pid, _ := strconv.Atoi(filepath.Base(dir)); cwd == s.dir && !keep(pid, exe) {
				left = append(left, exe)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("these processes are left: %v", left)
		}
	}
}

func TestJobsRunEachRequestOnce(t *testing.T) {
	const total = 200
	s := newSite(t)
	s.start("bservice", "--heartbeat", "100ms", "-j8", "record", "sh", "-c", `echo "$1" >>runs; sleep "0.0$2"; echo "$1"`, "sh")
	s.becomes("backbone_workers", 8)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	for i := range total {
		client.send(fmt.Sprint(i), "", "MDPC01", "record", fmt.Sprint(i), fmt.Sprint(rand.IntN(10)))
	}
	for range total {
		reply := client.recv()
		client.want(reply, reply[0], "", "MDPC01", "record", reply[0]+"\n")
	}
	runs := s.runs("runs")
	if len(runs) != total || len(slices.Compact(runs)) != total {
		t.Errorf("%d runs, %d different ones, want %d", len(s.runs("runs")), len(slices.Compact(runs)), total)
	}
}

func TestServiceUnderLoadThatIsTerminatedLeavesNoProcess(t *testing.T) {
	s := newSite(t)
	service := s.start("bservice", "--heartbeat", "100ms", "-j4", "--timeout", "0.2", "--kill-after", "0.1", "--grace", "0.5", "work",
		"sh", "-c", `case $1 in
		fine) true ;;
		kill) kill -9 $$ ;;
		slow) sleep 1000 ;;
		deaf) trap "" TERM; sleep 1000 & wait ;;
		esac`, "sh")
	s.becomes("backbone_workers", 4)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	const rounds = 5
	for i := range 100 * rounds {
		client.send("", "MDPC01", "work", []string{"fine", "kill", "slow", "deaf"}[i%4])
	}
	statuses := map[string]int{}
	for range 4 * rounds {
		reply := client.recv()
		statuses[reply[len(reply)-1]]++
	}
	if statuses["exit status 124"] == 0 || statuses["exit status 137"] == 0 || statuses[""] == 0 {
		t.Errorf("the load is none: %v", statuses)
	}
	service.signal(syscall.SIGTERM)
	if got := service.status(); got != 0 {
		t.Errorf("the service ended with %d", got)
	}
	s.expectNoDescendants()
	s.becomes("backbone_workers", 0)
}

func TestBombOfOutputTakesLittleMemory(t *testing.T) {
	s := newSite(t)
	service := s.start("bservice", "--heartbeat", "100ms", "-j4", "--max-output", "1M", "bomb", "sh", "-c", "yes & yes >&2 & yes")
	s.becomes("backbone_workers", 4)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	for range 20 {
		client.send("", "MDPC01", "bomb")
	}
	for range 20 {
		if reply := client.recv(); len(reply) != 6 || len(reply[3]) != 1<<20 || reply[5] != "exit status 74" {
			t.Fatalf("got %d frames, the last of them %q", len(reply), reply[len(reply)-1])
		}
	}
	// The race detector takes several times as much as the tool itself.
	if peak := memory(t, service.Process.Pid, "VmHWM"); peak > 200<<20 {
		t.Errorf("the service took %d MiB", peak>>20)
	}
	s.expectNoDescendants()
}

// How fast it is.

// pipeline has count requests answered by a service, at most 64 of them at a time.
func pipeline(b testing.TB, s *site, name string, count int) {
	client := connectPeer(b, zmq.DEALER, s.endpoint)
	for sent, received := 0, 0; received < count; {
		if sent < count && sent-received < 64 {
			client.send("", "MDPC01", name, "x")
			sent++
			continue
		}
		if reply := client.recv(); len(reply) != 4 {
			b.Fatalf("reply %q", reply)
		}
		received++
	}
}

// BenchmarkCommands has true run twice at a time: by bservice, through a broker, and by
// xargs.
func BenchmarkCommands(b *testing.B) {
	b.Run("bservice", func(b *testing.B) {
		s := newSite(b)
		s.start("bservice", "--heartbeat", "100ms", "-j2", "true", "/bin/true")
		s.becomes("backbone_workers", 2)
		b.ResetTimer()
		pipeline(b, s, "true", b.N)
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
	})
	b.Run("xargs", func(b *testing.B) {
		xargs := exec.Command("xargs", "-P2", "-n1", "/bin/true")
		xargs.Stdin = strings.NewReader(strings.Repeat("x\n", b.N))
		if err := xargs.Run(); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
	})
}

// BenchmarkCoprocess has four of cat answer one client, which pipelines, and beside them
// four workers that do nothing: what is left then is the broker and the client.
func BenchmarkCoprocess(b *testing.B) {
	for _, test := range []struct {
		name  string
		start func(*site)
	}{
		{"cat", func(s *site) { s.start("bservice", "--heartbeat", "100ms", "-j4", "--coproc", "echo", "cat") }},
		{"nothing", func(s *site) {
			for range 4 {
				s.start("echoworker", "echo")
			}
		}},
	} {
		b.Run(test.name, func(b *testing.B) {
			s := newSite(b)
			test.start(s)
			s.becomes("backbone_workers", 4)
			b.ResetTimer()
			pipeline(b, s, "echo", b.N)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}
