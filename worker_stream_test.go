package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

const streamToken = "01234567.7~4"

// expectPart takes a part at a time after the begin of the request.
func (s *stream) expectPart(t *testing.T, at time.Duration, want ...string) {
	t.Helper()
	body, _ := s.take(time.Unix(0, int64(at)))
	if got := spell(body); len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Fatalf("after %v the part is %.99q, want %.99q", at, got, want)
	}
}

func TestOutputAfterAPauseIsDueAtOnceAndWhatFollowsGoesTogether(t *testing.T) {
	woken := 0
	s := newStream(func() { woken++ })
	s.expectPart(t, time.Second)
	s.stdout().Write([]byte("a"))
	s.expectPart(t, time.Second, "a")
	s.stdout().Write([]byte("b"))
	if _, due := s.take(time.Unix(1, 0)); due != time.Unix(1, 0).Add(gatherTime) {
		t.Errorf("the next part is due at %v", due)
	}
	s.stdout().Write([]byte("c"))
	s.expectPart(t, time.Second+gatherTime-1)
	s.expectPart(t, time.Second+gatherTime, "bc")
	if _, due := s.take(time.Unix(2, 0)); !due.IsZero() {
		t.Errorf("a part without output is due at %v", due)
	}
	if woken != 2 {
		t.Errorf("the session was woken %d times for 2 parts", woken)
	}
}

func TestWriterWaitsWhileAFullPartWasNotTaken(t *testing.T) {
	full := make(chan struct{}, 9)
	s := newStream(func() { full <- struct{}{} })
	text := strings.Repeat("0123456789", maxPart/4) // between two and three parts
	written := make(chan struct{})
	go func() {
		s.stdout().Write([]byte(text))
		close(written)
	}()
	for i := range 2 {
		<-full
		select {
		case <-written:
			t.Fatalf("the writer did not wait after %d parts", i)
		default:
		}
		s.expectPart(t, 0, text[i*maxPart:(i+1)*maxPart])
	}
	<-written
	s.expectPart(t, 0)
	if rest := string(s.stdout().Bytes()); rest != text[2*maxPart:] {
		t.Errorf("%d bytes are left, want %d", len(rest), len(text)-2*maxPart)
	}
	if s.passed() != 2*maxPart {
		t.Errorf("%d bytes were passed", s.passed())
	}
}

func TestPartHasStandardErrorBesideOutput(t *testing.T) {
	s := newStream(func() {})
	s.stderr().Write([]byte("careful"))
	s.expectPart(t, time.Second, "", "careful", "exit status 0")
	s.stdout().Write([]byte("out"))
	s.stderr().Write([]byte("err"))
	s.expectPart(t, 2*time.Second, "out", "err", "exit status 0")
	s.stdout().Write([]byte("rest"))
	if rest := s.stdout().Bytes(); string(rest) != "rest" || len(s.stderr().Bytes()) > 0 {
		t.Errorf("%q is left", rest)
	}
	s.expectPart(t, 3*time.Second)
}

func TestWritersOfAStreamThatNobodyWantsFail(t *testing.T) {
	woken := make(chan struct{}, 9)
	s := newStream(func() { woken <- struct{}{} })
	failed := make(chan error)
	go func() {
		_, err := s.stdout().Write(make([]byte, maxPart+1))
		failed <- err
	}()
	<-woken
	s.close()
	if err := <-failed; err != errUnread {
		t.Errorf("the writer that waited got %v", err)
	}
	if _, err := s.stderr().Write([]byte("x")); err != errUnread {
		t.Errorf("the next one got %v", err)
	}
}

// A streamBroker is a raw ROUTER with a worker of the service echo.
type streamBroker struct {
	peer
	worker string
}

// startStreams runs the service echo with a command in this process.
func startStreams(t *testing.T, c *CmdService, cancel bool, ready ...string) *streamBroker {
	t.Helper()
	broker, endpoint := bindPeer(t)
	s := newService("echo", endpoint, nil)
	s.Slots, s.Cancel = newSlots(c.Handle), cancel
	serve(t, s)
	b := &streamBroker{peer: broker}
	b.register(ready...)
	return b
}

func (b *streamBroker) register(ready ...string) {
	b.t.Helper()
	worker, message := b.nextFromWorker()
	b.want(message, append([]string{"", "MDPW01", "\x01", "echo"}, ready...)...)
	b.worker = worker
}

func (b *streamBroker) request(token string, body ...string) {
	b.t.Helper()
	b.send(toWorker(b.worker, token, body...)...)
}

func (b *streamBroker) grant(token string, n int) {
	b.t.Helper()
	b.send(b.worker, "", "MDPW02", "\x07", token, "", strconv.Itoa(n))
}

func (b *streamBroker) expect(want ...string) {
	b.t.Helper()
	_, message := b.nextFromWorker()
	b.want(message, want...)
}

// receiveStream receives the rest of a stream, for which it gives credit, and returns all of it.
func (b *streamBroker) receiveStream(token string) (output string, parts int, final Reply) {
	b.t.Helper()
	var received strings.Builder
	for {
		_, message := b.nextFromWorker()
		if len(message) < 5 || message[0] != "MDPW02" || message[2] != token || message[3] != "" {
			b.t.Fatalf("got %.99q", message)
		}
		final = ParseReply(frames(message[4:]...))
		received.WriteString(string(final.Output[0]))
		if len(final.Output[0]) > maxPart {
			b.t.Fatalf("a part has %d bytes", len(final.Output[0]))
		}
		if message[1] == "\x04" {
			return received.String(), parts, final
		}
		parts++
		b.grant(token, 1)
	}
}

// expectSilence checks that nothing but heartbeats comes for some of them.
func (b *streamBroker) expectSilence() {
	b.t.Helper()
	for range 3 {
		b.want(b.recv(), append([]string{b.worker}, heartbeatFrames...)...)
	}
}

func openFifo(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestEachByteArrivesBeforeTheNextIsWritten(t *testing.T) {
	fifo := newFifo(t)
	b := startStreams(t, testCommand("sh", "-c", `cat "$0"; exit 3`, fifo), false)
	b.request(streamToken)
	out := openFifo(t, fifo, os.O_WRONLY)
	for i := range 20 { // with credit for 4
		fmt.Fprint(out, i)
		b.expect("MDPW02", "\x03", streamToken, "", strconv.Itoa(i))
		b.grant(streamToken, 1)
	}
	out.Close()
	b.expect("MDPW02", "\x04", streamToken, "", "", "", "exit status 3")
}

func TestShortOutputIsTheFinalReply(t *testing.T) {
	b := startStreams(t, testCommand("echo"), false)
	for _, body := range []string{"hello", ""} {
		b.request(streamToken, body)
		if output, _, final := b.receiveStream(streamToken); output != body+"\n" || final.Status != 0 {
			t.Errorf("the output is %q, with status %d", output, final.Status)
		}
	}
}

func TestRequestsOfOtherClientsHaveOneReplyOfMDP01(t *testing.T) {
	b := startStreams(t, testCommand("sh", "-c", "echo 1; sleep 0.02; echo 2"), false)
	for _, token := range []string{"01234567.7", "01234567.7@~4", "1234567.7~4", "0123456x.7~4", "01234567.~4", "01234567.7~0", "01234567.7~04",
		"01234567.7~", "01234567.7~4x", "01234567.7~-4", "01234567.7~+4", "01234567~4"} {
		b.request(token)
		b.expect("", "MDPW01", "\x03", token, "", "1\n2\n")
	}
	b.send(b.worker, "", "MDPW01", "\x02", streamToken, "more", "", "x")
	b.expect("", "MDPW01", "\x03", streamToken, "more", "", "1\n2\n")
}

func TestTimeoutDoesNotFailACommandThatEndedAndWasNotRead(t *testing.T) {
	c := testCommand("head", "-c", strconv.Itoa(2*maxPart+100), "/dev/zero")
	timeout := 200 * time.Millisecond
	c.Timeout = &timeout
	b := startStreams(t, c, false)
	b.request("01234567.7~1")
	b.recv()
	for range 6 {
		b.recv() // a heartbeat
	}
	b.grant("01234567.7~1", 1)
	if _, _, final := b.receiveStream("01234567.7~1"); final.Status != 0 {
		t.Errorf("the status is %d: %s", final.Status, final.Stderr)
	}
}

func TestLogHasAllBytesOfAStream(t *testing.T) {
	s := newService("echo", "", nil)
	var log bytes.Buffer
	s.requestLog = slog.New(slog.NewTextHandler(&log, nil))
	r := testRequest(streamToken, frames("hello"))
	r.Stream = newStream(func() {})
	s.answer(func(r Request) Reply {
		r.Stream.stdout().Write([]byte("123"))
		r.Stream.take(time.Now())
		r.Stream.stdout().Write([]byte("4567"))
		return Reply{Output: [][]byte{r.Stream.stdout().Bytes()}, Status: 3}
	}, r)
	// The last frames are 4567, nothing and "exit status 3".
	if want := "in=5 out=20\n"; !strings.HasSuffix(log.String(), want) {
		t.Errorf("it logged %q, want %q at the end", log.String(), want)
	}
}

func TestStreamThroughTheBrokerIsCompleteAndEndsWithItsClient(t *testing.T) {
	s := newSystem(t)
	s.start("bservice", "--heartbeat", "100ms", "--max-output", "0", "echo", "sh", "-c", `exec 3>"$1"; shift; exec "$@"`, "sh")
	s.waitForMetric("backbone_workers", 1)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	begin := func(command ...string) *os.File {
		fifo := newFifo(t)
		client.send(append([]string{"MDPC02", "\x01", "echo", fifo}, command...)...)
		return openFifo(t, fifo, os.O_RDONLY)
	}
	begin("head", "-c", "50000000", "/dev/zero")
	for received := 0; ; {
		message := client.recv()
		received += len(message[3])
		if message[1] == "\x03" {
			if len(message) != 4 || received != 50000000 {
				t.Errorf("%d bytes came, and %d frames at the end", received, len(message))
			}
			break
		}
	}
	held := begin("yes")
	client.recv()
	client.Close()
	expectEnd(t, held)
	s.waitForMetric("backbone_idle_workers", 1)
}

func TestTokenWithANameStreams(t *testing.T) {
	b := startStreams(t, testCommand("echo", "x"), false)
	b.request("01234567.7~64@a ~\n@b")
	if output, _, _ := b.receiveStream("01234567.7~64@a ~\n@b"); output != "x\n" {
		t.Errorf("the output is %q", output)
	}
}

func TestPartsStopWithoutCreditAndGoOnWithIt(t *testing.T) {
	const length = 40 * maxPart
	b := startStreams(t, testCommand("sh", "-c", `seq 1 1000000 | head -c "$1"`, "sh"), false)
	b.request(streamToken, strconv.Itoa(length))
	var received strings.Builder
	for _, credit := range []int{4, 2, 1} {
		for range credit {
			_, message := b.nextFromWorker()
			b.want(message[:4], "MDPW02", "\x03", streamToken, "")
			received.WriteString(message[4])
		}
		b.grant("01234567.6~4", 9) // of an earlier request
		b.expectSilence()
		b.grant(streamToken, map[int]int{4: 2, 2: 1, 1: 4}[credit])
	}
	rest, _, final := b.receiveStream(streamToken)
	var want bytes.Buffer
	for i := 1; want.Len() < length; i++ {
		fmt.Fprintln(&want, i)
	}
	if received.WriteString(rest); received.String() != want.String()[:length] || final.Status != 0 {
		t.Errorf("%d bytes came, with status %d, want %d and 0", received.Len(), final.Status, length)
	}
}

// TestOutputOfACommandThatEndedLongAgoIsAllThere has a reader that waits much longer than --kill-after.
func TestOutputOfACommandThatEndedLongAgoIsAllThere(t *testing.T) {
	for _, killAfter := range []time.Duration{0, time.Millisecond, 50 * time.Millisecond} {
		const length = 2*maxPart + 100
		// More than there is credit for, and no more than the part, the copy and the pipe hold.
		c := testCommand("sh", "-c", `head -c "$1" /dev/zero; echo end; echo >"$2"`, "sh")
		c.KillAfter = killAfter
		b := startStreams(t, c, false)
		fifo := newFifo(t)
		b.request("01234567.7~1", strconv.Itoa(length), fifo)
		openFifo(t, fifo, os.O_RDONLY).Read(make([]byte, 1)) // It has written all.
		b.recv()
		for range 6 {
			b.recv() // a heartbeat
		}
		b.grant("01234567.7~1", 1)
		output, _, final := b.receiveStream("01234567.7~1")
		if final.Status != 0 || !strings.HasSuffix(output, "\x00end\n") {
			t.Errorf("--kill-after %v: %d bytes came, which end in %.9q, with status %d", killAfter, len(output), output[len(output)-4:], final.Status)
		}
	}
}

func TestChildThatGoesOnPrintingIsReadForKillAfter(t *testing.T) {
	c := testCommand("sh", "-c", "yes & head -c 30000 /dev/zero")
	c.KillAfter = 50 * time.Millisecond
	b := startStreams(t, c, false)
	b.request("01234567.7~1")
	time.Sleep(4 * c.KillAfter) // Until the command has ended and --kill-after is over, nobody reads.
	b.grant("01234567.7~1", 1)
	if output, _, _ := b.receiveStream("01234567.7~1"); strings.Count(output, "\x00") != 30000 {
		t.Errorf("%d bytes came, %d from the command", len(output), strings.Count(output, "\x00"))
	}
}

func TestStandardErrorOfAStreamGoesWhereItIsWanted(t *testing.T) {
	const line = "echo 1; echo 2 >&2; echo 3; exit 4"
	for stderr, want := range map[string]Reply{
		"log":   {Output: frames("1\n3\n"), Stderr: []byte("2\n")},
		"reply": {Output: frames("1\n3\n"), Stderr: []byte("2\n")},
		"merge": {Output: frames("1\n2\n3\n")},
	} {
		c := testCommand("sh", "-c", line)
		c.StderrTo = stderr
		b := startStreams(t, c, false)
		b.request("01234567.7~1000")
		var output, errors []byte
		for kind := ""; kind != "\x04"; {
			_, message := b.nextFromWorker()
			reply := ParseReply(frames(message[4:]...))
			output, errors, kind = append(output, reply.Output[0]...), append(errors, reply.Stderr...), message[1]
			if kind == "\x04" && reply.Status != 4 {
				t.Errorf("--stderr %s: status %d", stderr, reply.Status)
			}
		}
		if string(output) != string(want.Output[0]) || string(errors) != string(want.Stderr) {
			t.Errorf("--stderr %s: got %q and %q", stderr, output, errors)
		}
	}
}

func TestStandardErrorStreamsBesideTheOutput(t *testing.T) {
	fifo := newFifo(t)
	c := testCommand("sh", "-c", `while read -r line; do echo "$line"; echo "$line" >&2; done <"$0"`, fifo)
	c.StderrTo = "reply"
	b := startStreams(t, c, false)
	b.request("01234567.7~100")
	in := openFifo(t, fifo, os.O_WRONLY)
	for _, line := range []string{"a\n", "b\n"} {
		in.WriteString(line)
		for output, errors := "", ""; output+errors != line+line; {
			_, message := b.nextFromWorker()
			reply := ParseReply(frames(message[4:]...))
			output, errors = output+string(reply.Output[0]), errors+string(reply.Stderr)
			if message[1] != "\x03" || reply.Status != 0 || !strings.HasPrefix(line, output) || !strings.HasPrefix(line, errors) {
				t.Fatalf("got %q", message)
			}
		}
	}
}

func TestBoundOfAStreamIsThatOfItsTotal(t *testing.T) {
	for _, test := range []struct {
		bound  size
		length int
		status int
	}{{0, 8 << 20, 0}, {8 << 20, 8 << 20, 0}, {1 << 20, 1<<20 + 1, exitIO}} {
		c := testCommand("sh", "-c", `exec head -c "$1" /dev/zero`, "sh")
		c.MaxOutput = test.bound
		b := startStreams(t, c, false)
		b.request("01234567.7~64", strconv.Itoa(test.length))
		output, _, final := b.receiveStream("01234567.7~64")
		if want := test.length; final.Status != test.status || test.status == 0 && len(output) != want || test.status != 0 && len(output) != int(test.bound) {
			t.Errorf("--max-output %d: %d bytes came, with status %d", test.bound, len(output), final.Status)
		}
		if said := fmt.Sprintf("bservice: svc: ended because it printed more than --max-output %d bytes\n", test.bound); test.status != 0 && string(final.Stderr) != said {
			t.Errorf("it said %q", final.Stderr)
		}
	}
}

func TestOutputWithoutBoundIsAllInTheReply(t *testing.T) {
	c := testCommand("head", "-c", "70000000", "/dev/zero")
	c.MaxOutput = 0
	if reply := c.Handle(testRequest("token", nil)); reply.Status != 0 || len(reply.Output[0]) != 70000000 {
		t.Errorf("%d bytes came, with status %d", len(reply.Output[0]), reply.Status)
	}
}

// holdOpen is a shell command that holds the FIFO $1 open until it and its child have ended.
const holdOpen = `exec 3>"$1"; sleep 1000 & `

// expectEnd waits until all commands that hold a FIFO open have ended.
func expectEnd(t *testing.T, held *os.File) {
	t.Helper()
	held.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := held.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatalf("the command goes on: %v", err)
	}
}

// registerAnew takes READY of the next session, with further frames. Before it may come what the last one had to say.
func (b *streamBroker) registerAnew(more ...string) {
	b.t.Helper()
	for last := b.worker; b.worker == last; {
		if worker, message := b.nextFromWorker(); worker != last {
			b.want(message, append([]string{"", "MDPW01", "\x01", "echo"}, more...)...)
			b.worker = worker
		}
	}
}

func TestDisconnectEndsTheCommandThatNobodyWants(t *testing.T) {
	for name, test := range map[string]struct {
		token, line string
		cancel      bool
	}{
		"stream":                  {streamToken, holdOpen + "wait", false},
		"stream that is blocked":  {streamToken, holdOpen + "yes", false},
		"stream, SIGTERM ignored": {streamToken, `trap "" TERM; ` + holdOpen + "wait", false},
		"--cancel":                {"01234567.7", holdOpen + "wait", true},
	} {
		t.Run(name, func(t *testing.T) {
			c := testCommand("sh", "-c", test.line, "sh")
			c.KillAfter = 100 * time.Millisecond
			var ready []string
			if test.cancel {
				ready = []string{"cancel"}
			}
			b := startStreams(t, c, test.cancel, ready...)
			fifo := newFifo(t)
			b.request(test.token, fifo)
			held := openFifo(t, fifo, os.O_RDONLY)
			b.send(disconnectTo(b.worker)...)
			expectEnd(t, held)
			b.registerAnew(ready...)
		})
	}
}

func TestCommandWithoutStreamOrCancelFinishesAfterADisconnect(t *testing.T) {
	fifo, done := newFifo(t), newFifo(t)
	b := startStreams(t, testCommand("sh", "-c", `read -r line <"$1"; echo done >"$2"`, "sh"), false)
	b.request("01234567.7", fifo, done)
	in := openFifo(t, fifo, os.O_WRONLY)
	b.send(disconnectTo(b.worker)...)
	b.send(disconnectTo(b.worker)...)
	in.WriteString("go\n")
	if got, err := os.ReadFile(done); string(got) != "done\n" {
		t.Errorf("the command wrote %q, %v", got, err)
	}
	b.registerAnew()
}

func TestStreamWhoseConnectionBreaksEndsItsCommand(t *testing.T) {
	endpoint := "ipc://" + t.TempDir() + "/broker"
	broker := newPeer(t, zmq.ROUTER)
	if err := broker.Bind(endpoint); err != nil {
		t.Fatal(err)
	}
	s := newService("echo", endpoint, nil)
	s.Slots = newSlots(testCommand("sh", "-c", holdOpen+"wait", "sh").Handle)
	var log bytes.Buffer
	s.requestLog = slog.New(slog.NewTextHandler(&log, nil))
	stop := serve(t, s)
	worker, _ := broker.nextFromWorker()
	fifo := newFifo(t)
	broker.send(toWorker(worker, streamToken, fifo)...)
	held := openFifo(t, fifo, os.O_RDONLY)
	broker.Close()
	expectEnd(t, held)
	stop()
	if said := log.String(); strings.Contains(said, "reply dropped") || !strings.Contains(said, `level=INFO msg="request cancelled" request=`+streamToken+" status=143") ||
		!strings.Contains(said, `why="the connection to the broker broke"`) {
		t.Errorf("the log has %q", said)
	}
}

func TestCoprocessThatWorksForACancelledRequestIsStartedAnew(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", `while read -r line; do [ "$line" ] && sleep 1000; echo $$; done`)
	first := c.Handle(testRequest("token", nil))
	gone, cancel := context.WithCancelCause(context.Background())
	r := testRequest("token", frames("stuck"))
	r.Context = gone
	time.AfterFunc(50*time.Millisecond, func() { cancel(errUnwanted) })
	if reply := c.Handle(r); reply.Reason != errUnwanted {
		t.Errorf("the reply is %v", reply)
	}
	if second := c.Handle(testRequest("token", nil)); second.Status != 0 || string(second.Output[0]) == string(first.Output[0]) {
		t.Errorf("the replies are %q and %q", first.Output, second.Output)
	}
}

func TestLineOfACoprocessIsOneFinalReply(t *testing.T) {
	c := newCoprocess(t, "cat")
	broker, endpoint := bindPeer(t)
	s := newService("echo", endpoint, nil)
	s.Slots = newSlots(c.Handle)
	serve(t, s)
	b := &streamBroker{peer: broker}
	b.register()
	line := strings.Repeat("x", 3*maxPart)
	b.request(streamToken, line)
	b.expect("MDPW02", "\x04", streamToken, "", line+"\n")
}

func TestStoppedServiceStreamsToTheEnd(t *testing.T) {
	s := newSystemWithoutBroker(t)
	broker := newPeer(t, zmq.ROUTER)
	if err := broker.Bind(s.endpoint); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		grace  string
		status int
	}{{"10", 0}, {"0.2", exitSignal + int(syscall.SIGTERM)}} {
		fifo := newFifo(t)
		service := s.start("bservice", "--heartbeat", "100ms", "--grace", test.grace, "echo", "sh", "-c", `cat "$1"`, "sh")
		b := &streamBroker{peer: broker}
		b.register()
		b.request("01234567.7~64", fifo)
		out := openFifo(t, fifo, os.O_WRONLY)
		service.signal(syscall.SIGTERM)
		service.waitForLines(1, "waiting for a command")
		out.WriteString("more")
		b.expect("MDPW02", "\x03", "01234567.7~64", "", "more")
		if test.status == 0 {
			out.Close()
		}
		if _, _, final := b.receiveStream("01234567.7~64"); final.Status != test.status {
			t.Errorf("--grace %s: the status is %d, want %d", test.grace, final.Status, test.status)
		}
		b.expect("", "MDPW01", "\x05")
		if got := service.waitForExit(); got != 0 {
			t.Errorf("--grace %s: the service ended with status %d", test.grace, got)
		}
	}
}

// TestStreamIsByteForByteAndTakesLittleMemory has a reader that stops at times.
func TestStreamIsByteForByteAndTakesLittleMemory(t *testing.T) {
	s := newSystemWithoutBroker(t)
	broker := newPeer(t, zmq.ROUTER)
	if err := broker.Bind(s.endpoint); err != nil {
		t.Fatal(err)
	}
	service := s.start("bservice", "--max-output", "0", "echo", "seq", "1")
	b := &streamBroker{peer: broker}
	b.register()
	idle := processMemory(t, service.Process.Pid, "VmHWM")
	const last = 10_000_000
	b.request("01234567.7~64", strconv.Itoa(last))
	got, want := sha256.New(), sha256.New()
	for kind, parts := "", 0; kind != "\x04"; parts++ {
		_, message := b.nextFromWorker()
		kind = message[1]
		got.Write([]byte(message[4]))
		if parts%500 == 499 {
			time.Sleep(100 * time.Millisecond)
		}
		b.grant("01234567.7~64", 1)
	}
	line := make([]byte, 0, 10)
	for i := 1; i <= last; i++ {
		want.Write(append(strconv.AppendInt(line[:0], int64(i), 10), '\n'))
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("the output is not that of the command")
	}
	if grown := processMemory(t, service.Process.Pid, "VmHWM") - idle; grown > 32<<20 {
		t.Errorf("the service took %d MiB more than when it was idle", grown>>20)
	}
}

// BenchmarkStream measures how fast a service sends the output of a command to a broker that only counts it.
func BenchmarkStream(b *testing.B) {
	broker := newPeer(b, zmq.ROUTER)
	if err := broker.Bind("tcp://127.0.0.1:*"); err != nil {
		b.Fatal(err)
	}
	endpoint, _ := broker.GetLastEndpoint()
	service := start(b, b.TempDir(), endpoint, "bservice", "--max-output", "0", "dump", "head", "/dev/zero", "-c")
	worker, _ := broker.nextFromWorker()
	idle := processMemory(b, service.Process.Pid, "VmHWM")
	b.SetBytes(maxPart)
	b.ResetTimer()
	broker.send(toWorker(worker, "01234567.1~64", fmt.Sprint(b.N*maxPart))...)
	for received, ungranted := 0, 0; received < b.N*maxPart; {
		_, message := broker.nextFromWorker()
		received += len(message[4])
		if ungranted++; ungranted == 32 {
			broker.send(worker, "", "MDPW02", "\x07", "01234567.1~64", "", fmt.Sprint(ungranted))
			ungranted = 0
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(processMemory(b, service.Process.Pid, "VmHWM")-idle)/(1<<20), "MiB")
}
