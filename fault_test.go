package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// The tests in this file run real processes. They check what the broker guarantees when workers,
// clients or the broker itself are killed or stopped, and when peers are hostile.

func TestIdleWorkerThatIsKilledFailsNoRequest(t *testing.T) {
	s := newSystem(t)
	victim := s.startShellService("echo", `printf %s "$1"`)
	s.startShellService("echo", `printf %s "$1"`)
	s.waitForMetric("backbone_workers", 2)
	victim.signal(syscall.SIGKILL)
	// Until ZeroMQ notices that the connection is closed, a request can be lost in it.
	s.waitForMetric("backbone_workers", 1)
	for i := range 20 {
		s.expect("echo", []string{fmt.Sprint(i)}, fmt.Sprint(i))
	}
	if lost, replies := s.metric("backbone_lost_workers_total"), s.metric("backbone_replies_total"); lost != 1 || replies != 20 {
		t.Errorf("%d workers were lost and %d replies received, want 1 and 20", lost, replies)
	}
}

func TestRequestOfAKilledWorkerFailsAtOnceAndIsNotRedelivered(t *testing.T) {
	s, _ := newHangingSystem(t)
	victim := s.startShellService("hang", hang)
	s.startShellService("hang", hang)
	s.waitForMetric("backbone_workers", 2)
	request := s.start("brequest", "hang", "once")
	s.waitForRuns(1)
	victim.signal(syscall.SIGKILL)
	if got := request.waitForExit(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	if runs := s.runs("runs"); len(runs) != 1 || s.metric("backbone_lost_workers_total") != 1 {
		t.Errorf("the runs are %q, want one", runs)
	}
}

func TestRequestOfAKilledWorkerIsRedeliveredIfAllowed(t *testing.T) {
	s, release := newHangingSystem(t, "--redeliver", "1")
	victim := s.startShellService("hang", hang)
	s.waitForMetric("backbone_workers", 1)
	request := s.start("brequest", "hang", "twice")
	s.waitForRuns(1)
	victim.signal(syscall.SIGKILL)
	s.startShellService("hang", hang)
	s.waitForRuns(2)
	release()
	if got := request.waitForExit(); got != 0 {
		t.Errorf("status %d, want 0", got)
	}
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"twice", "twice"}) || s.metric("backbone_redelivered_total") != 1 {
		t.Errorf("the runs are %q, want two", runs)
	}
}

func TestBusyWorkerThatIsStoppedFailsItsClientAndComesBackWhenItGoesOn(t *testing.T) {
	s, release := newHangingSystem(t, "-v")
	victim := s.startShellService("hang", hang)
	request := s.start("brequest", "hang", "once")
	s.waitForRuns(1)
	s.broker.waitForLines(1, "kind=REQUEST service=hang")
	s.broker.waitForLines(5, "kind=HEARTBEAT") // while busy; from now on the broker expects them
	victim.signal(syscall.SIGSTOP)
	if got := request.waitForExit(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	release()
	victim.signal(syscall.SIGCONT)
	s.expect("hang", []string{"again"}, "done")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"again", "once"}) {
		t.Errorf("the runs are %q", runs)
	}
}

func TestRequestThatAStoppedIdleWorkerWasGivenFailsAndNeverRuns(t *testing.T) {
	s := newSystem(t)
	victim := s.startShellService("record", `echo "$1" >>runs; printf %s "$1"`)
	s.waitForMetric("backbone_idle_workers", 1)
	victim.signal(syscall.SIGSTOP)
	if got := s.start("brequest", "record", "nobodys").waitForExit(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	victim.signal(syscall.SIGCONT)
	victim.waitForLines(1, "service connected")
	s.expect("record", []string{"mine"}, "mine")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"mine"}) {
		t.Errorf("the runs are %q", runs)
	}
}

func TestServiceWhoseLogIsNotReadGoesOn(t *testing.T) {
	s := newSystem(t)
	for _, name := range []string{"closed", "full"} {
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		service := exec.Command("bservice", "-v", "--heartbeat", "100ms", name, "sh", "-c", "head -c 100000 /dev/zero >&2; echo done")
		service.Env = append(os.Environ(), "BACKBONE_BROKER="+s.endpoint, "GORACE=atexit_sleep_ms=0")
		service.Stderr = writer
		if name == "closed" {
			reader.Close()
		}
		if err := service.Start(); err != nil {
			t.Fatal(err)
		}
		defer service.Process.Kill() // unless it has ended
		writer.Close()
		for range 20 {
			s.expect(name, nil, "done\n")
		}
		service.Process.Signal(syscall.SIGTERM)
		if err := service.Wait(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBatchThatIsKilledHasLoggedOnlyWhatItHasPrinted(t *testing.T) {
	s := newSystem(t)
	fifo := newFifo(t)
	s.start("bservice", "--heartbeat", "100ms", "-j4", "slow", "sh", "-c", `[ "$1" != 1 ] || [ -e go ] || read x <`+fifo+`; echo "$1"`, "sh")
	batch := func(more ...string) *exec.Cmd {
		c := exec.Command("brequest", append(more, "--each", "-j4", "--joblog", "log", "slow")...)
		c.Dir, c.Env = s.dir, append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
		c.Stdin = strings.NewReader("0\n1\n2\n3\n4\n5\n")
		return c
	}
	killed := batch()
	var printed strings.Builder
	killed.Stdout = &printed
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	s.waitForMetric("backbone_replies_total", 5)
	if second := batch(); second.Run() == nil || second.ProcessState.ExitCode() != 75 {
		t.Errorf("a second batch with the same log: %v, want status 75", second.ProcessState)
	}
	killed.Process.Kill()
	killed.Wait()
	if printed.String() != "0\n" {
		t.Fatalf("printed %q, want line 0", &printed)
	}
	released := errors.Join(os.WriteFile(filepath.Join(s.dir, "go"), nil, 0o600), os.WriteFile(fifo, []byte("go\n"), 0))
	if released != nil {
		t.Fatal(released)
	}
	output, err := batch("--resume").Output()
	if string(output) != "1\n2\n3\n4\n5\n" || err != nil {
		t.Errorf("resumed: %q, %v, want the other lines", output, err)
	}
	other := exec.Command("brequest", "--each", "--joblog", "log", "--resume", "other")
	other.Dir, other.Env = s.dir, append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
	if said, _ := other.CombinedOutput(); other.ProcessState.ExitCode() != 64 || !strings.Contains(string(said), "the log of the service slow, not of other") {
		t.Errorf("another service: %v, %q, want status 64", other.ProcessState, said)
	}
}

func TestLoadSurvivesABrokerThatIsKilledAndStartedAgain(t *testing.T) {
	s := newSystem(t)
	for range 4 {
		s.startShellService("echo", `printf %s "$1"`)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	outcomes := map[string]int{}
	for c := range 4 {
		wg.Go(func() {
			client := NewClient(context.Background(), s.endpoint)
			defer client.Disconnect()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				body := fmt.Sprintf("%d.%d", c, i)
				reply, err := client.Send("echo", frames(body), 5*time.Second)
				outcome := "a wrong reply"
				switch {
				case err == nil && slices.Equal(spell(reply.Body()), []string{body}):
					outcome = "right"
				case errors.Is(err, errLost), errors.Is(err, errNoBroker):
					outcome = "69"
				case errors.Is(err, errTimeout):
					outcome = "124"
				case err == nil && reply.Status == exitUnavailable:
					outcome = "69"
				}
				mu.Lock()
				outcomes[outcome]++
				mu.Unlock()
			}
		})
	}
	for range 2 {
		s.expect("echo", []string{"before"}, "before")
		s.broker.signal(syscall.SIGKILL)
		s.broker.waitForExit()
		s.broker = s.start("bbroker", "--heartbeat", "100ms")
		begin := time.Now()
		s.waitForMetric("backbone_workers", 4)
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("the workers were back after %v, want 2s", took)
		}
	}
	s.expect("echo", []string{"after"}, "after")
	close(stop)
	wg.Wait()
	if outcomes["a wrong reply"] > 0 || outcomes["right"] == 0 || outcomes["69"] == 0 {
		t.Errorf("outcomes %v", outcomes)
	}
	t.Logf("outcomes %v", outcomes)
}

func TestRollingRestartLosesNothingAndRunsNothingTwice(t *testing.T) {
	t.Parallel()
	const total = 1000
	s := newSystem(t)
	record := func() *childProcess { return s.startShellService("record", `echo "$1" >>runs; printf %s "$1"`) }
	workers := []*childProcess{record(), record(), record()}

	numbers := make(chan int)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			client := NewClient(context.Background(), s.endpoint)
			defer client.Disconnect()
			for n := range numbers {
				body := fmt.Sprintf("%04d", n)
				reply, err := client.Send("record", frames(body), 20*time.Second)
				if err != nil || !slices.Equal(spell(reply.Body()), []string{body}) {
					t.Errorf("request %s: %q, %v", body, spell(reply.Body()), err)
				}
			}
		})
	}
	restarts := 0
	for n := range total {
		numbers <- n
		if n%100 == 50 { // replace a worker while requests are in flight
			w := &workers[restarts%len(workers)]
			old := *w
			*w = record()
			old.signal(syscall.SIGTERM)
			restarts++
		}
	}
	close(numbers)
	wg.Wait()
	runs := s.runs("runs")
	if len(runs) != total || len(slices.Compact(runs)) != total {
		t.Errorf("%d runs, %d different, want %d", len(runs), len(slices.Compact(runs)), total)
	}
	if replies := s.metric("backbone_replies_total"); replies != total || restarts != 10 {
		t.Errorf("%d replies and %d restarts, want %d and 10", replies, restarts, total)
	}
}

func TestClientThatIsTerminatedWhileQueuedTakesItsRequestBack(t *testing.T) {
	s := newSystem(t)
	request := s.start("brequest", "record", "unwanted")
	s.waitForMetric("backbone_queue_length", 1)
	request.signal(syscall.SIGTERM)
	if got := request.waitForExit(); got != 143 {
		t.Errorf("status %d, want 143", got)
	}
	s.waitForMetric("backbone_cancelled_total", 1)
	s.startShellService("record", `echo "$1" >>runs; printf %s "$1"`)
	s.expect("record", []string{"wanted"}, "wanted")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"wanted"}) {
		t.Errorf("the runs are %q", runs)
	}
}

func TestClientThatIsKilledWhileQueuedLosesOnlyItsReply(t *testing.T) {
	s := newSystem(t)
	request := s.start("brequest", "record", "nobodys")
	s.waitForMetric("backbone_queue_length", 1)
	request.signal(syscall.SIGKILL)
	request.waitForExit()
	s.startShellService("record", `echo "$1" >>runs; printf %s "$1"`)
	s.expect("record", []string{"mine"}, "mine")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"mine", "nobodys"}) {
		t.Errorf("the runs are %q", runs)
	}
	s.waitForMetric("backbone_dropped_replies_total", 1)
}

func TestPipelinedRequestsAreAllAnswered(t *testing.T) {
	const total = 2000
	s := newSystem(t)
	for range 4 {
		s.start("echoworker", "echo")
	}
	s.waitForMetric("backbone_workers", 4)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	for i := range total {
		client.send(fmt.Sprint(i), "", "MDPC01", "echo", fmt.Sprint("body ", i))
	}
	seen := map[string]bool{}
	for range total {
		reply := client.recv()
		client.want(reply, reply[0], "", "MDPC01", "echo", "body "+reply[0])
		seen[reply[0]] = true
	}
	if len(seen) != total {
		t.Errorf("got %d different replies, want %d", len(seen), total)
	}
}

func TestClientThatNeverReadsHoldsUpNobody(t *testing.T) {
	s := newSystem(t)
	for range 2 {
		s.start("echoworker", "echo")
	}
	s.waitForMetric("backbone_workers", 2)
	deaf := newPeer(t, zmq.DEALER)
	if err := errors.Join(deaf.SetRcvhwm(1), deaf.SetRcvbuf(4096), deaf.Connect(s.endpoint)); err != nil {
		t.Fatal(err)
	}
	const total = 13_000
	body := strings.Repeat("x", 4096)
	for i := range total {
		deaf.send("", "MDPC01", "echo", body)
		if i%500 == 0 {
			s.expect("echo", []string{"others"}, "others")
		}
	}
	s.waitForMetric("backbone_replies_total", total+total/500)
	s.expect("echo", []string{"others"}, "others")
	if dropped := s.metric("backbone_dropped_replies_total"); dropped == 0 || dropped > total {
		t.Errorf("%d replies were dropped", dropped)
	}
}

func TestStoppedBrokerAwaitsRepliesAndRefusesTheRest(t *testing.T) {
	s, release := newHangingSystem(t, "-v")
	s.startShellService("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.waitForRuns(1)
	waiting := s.start("brequest", "hang", "waiting")
	s.waitForMetric("backbone_queue_length", 1)
	s.broker.signal(syscall.SIGTERM)
	if got := waiting.waitForExit(); got != 75 {
		t.Errorf("the waiting request: status %d, want 75", got)
	}
	if got := s.start("brequest", "hang", "new").waitForExit(); got != 75 {
		t.Errorf("a new request: status %d, want 75", got)
	}
	release()
	if got := running.waitForExit(); got != 0 {
		t.Errorf("the running request: status %d, want 0", got)
	}
	if got := s.broker.waitForExit(); got != 0 {
		t.Errorf("the broker: status %d, want 0", got)
	}
}

func TestStoppedBrokerDoesNotWaitLongerThanItsGrace(t *testing.T) {
	s, _ := newHangingSystem(t, "--grace", "200ms")
	s.startShellService("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.waitForRuns(1)
	s.broker.signal(syscall.SIGTERM)
	if got := running.waitForExit(); got != 69 {
		t.Errorf("the running request: status %d, want 69", got)
	}
	if got := s.broker.waitForExit(); got != 0 {
		t.Errorf("the broker: status %d, want 0", got)
	}
}

func TestStoppedBrokerDoesNotWaitForTheEndOfHeartbeats(t *testing.T) {
	s := newSystem(t, "--grace", "1h")
	s.start("bservice", "--heartbeat", "10ms", "--liveness", "1000", "-j4", "echo", "echo")
	s.waitForMetric("backbone_workers", 4)
	s.expect("echo", []string{"x"}, "x\n")
	s.broker.signal(syscall.SIGTERM)
	if got := s.broker.waitForExit(); got != 0 {
		t.Errorf("status %d, want 0", got)
	}
}

func TestSecondSignalEndsTheBrokerAtOnce(t *testing.T) {
	s, _ := newHangingSystem(t, "--grace", "1h", "-v")
	s.startShellService("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.waitForRuns(1)
	s.broker.signal(syscall.SIGTERM)
	// The broker refuses a request once it has handled the first signal.
	if got := s.start("brequest", "hang", "new").waitForExit(); got != 75 {
		t.Errorf("a new request: status %d, want 75", got)
	}
	// The same signal shortly after the first one counts as the same: it has to come again.
	for ended := false; !ended; {
		s.broker.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.broker.ended:
			ended = true
		case <-time.After(50 * time.Millisecond):
		}
	}
	if got := s.broker.waitForExit(); got != 143 {
		t.Errorf("the broker: status %d, want 143", got)
	}
	if got := running.waitForExit(); got != 69 {
		t.Errorf("the running request: status %d, want 69", got)
	}
}

func TestConnectionsDoNotTakeTheLastDescriptorsOfTheBroker(t *testing.T) {
	s := newSystemWithoutBroker(t)
	s.broker = s.start("sh", "-c", "ulimit -n 200; exec bbroker --heartbeat 100ms --broker tcp://127.0.0.1:0 --broker $BACKBONE_BROKER >endpoints")
	s.start("echoworker", "echo")
	s.expect("echo", []string{"before"}, "before")
	content, err := os.ReadFile(filepath.Join(s.dir, "endpoints"))
	if err != nil {
		t.Fatal(err)
	}
	client := NewClient(context.Background(), s.endpoint)
	defer client.Disconnect()
	expect := func(body string) {
		t.Helper()
		if reply, err := client.Send("echo", frames(body), 20*time.Second); err != nil || !slices.Equal(spell(reply.Body()), []string{body}) {
			t.Fatalf("%q, %v", spell(reply.Body()), err)
		}
	}
	expect("before")
	addresses := []string{strings.TrimPrefix(strings.Fields(string(content))[0], "tcp://"), strings.TrimPrefix(s.endpoint, "ipc://")}
	for i, network := range []string{"tcp", "unix"} {
		var connections []net.Conn
		for n := range 300 {
			if conn, err := net.Dial(network, addresses[i]); err == nil {
				connections = append(connections, conn)
			}
			if n%20 == 0 {
				expect("meanwhile")
			}
		}
		if len(connections) < 150 {
			t.Fatalf("only %d connections over %s", len(connections), network)
		}
		expect("meanwhile")
		for _, conn := range connections {
			conn.Close()
		}
		s.expect("echo", []string{"afterwards"}, "afterwards")
	}
	s.broker.waitForLines(1, "connections refused")
}

func TestHostilePeersNeitherStopNorFillTheBroker(t *testing.T) {
	dir := t.TempDir()
	broker := exec.Command("bbroker", "--port", "0", "--max-message", "64K", "--heartbeat", "100ms")
	broker.Dir = dir
	broker.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "BACKBONE_") }), "GORACE=atexit_sleep_ms=0")
	var log bytes.Buffer
	broker.Stderr = &log
	stdout, err := broker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := broker.Start(); err != nil {
		t.Fatal(err)
	}
	defer broker.Process.Kill()
	line := make([]byte, 100)
	n, err := stdout.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	endpoint := strings.TrimSpace(string(line[:n]))
	address := strings.TrimPrefix(endpoint, "tcp://")
	s := &system{t: t, dir: dir, endpoint: endpoint}
	s.start("echoworker", "echo")
	normal := func() {
		t.Helper()
		s.expect("echo", []string{"normal"}, "normal")
	}
	normal()
	before := processMemory(t, broker.Process.Pid, "VmRSS")

	// Each message is sent by a peer of its own, which then sends a request. Its reply shows that the
	// broker has read the message.
	messages := []struct {
		why    string // the reason in the log; empty if none is logged
		frames []string
	}{
		{"no frame MDPC01", []string{""}},
		{"no frame MDPC01", []string{"one frame"}},
		{"no service name", []string{"", "MDPC01"}},
		{"no service name", []string{"", "MDPC01", "", "x"}},
		{"no one-byte command after MDPC02", []string{"", "MDPC02", "echo", "x"}},
		{"no frame MDPC01", []string{"", "MDPW03", "\x01", "echo"}},
		{"no frame MDPC01", append([]string{"x"}, slices.Repeat([]string{"x"}, 300)...)},
		{"no one-byte command", []string{"", "MDPW01", "echo", "x"}},
		{"no service name", []string{"", "MDPW01", "\x01"}},
		{"unknown command", []string{"", "MDPW01", "\x06"}},
		{"no empty frame", []string{"", "MDPW01", "\x03", "token"}},
		{"the name is the broker's own", []string{"", "MDPW01", "\x01", "mmi.x"}},
		{"the broker is shutting down", []string{"", "MDPC01", "\x01", "echo"}}, // READY sent as a client: a request for the service "\x01"
		{"", []string{"", "MDPW01", "\x02", "token", "", "x"}},
		{"", []string{"", "MDPW01", "\x03", "token", "", "x"}},
		{"", []string{"", "MDPW01", "\x05", "and", "more"}},
		{"", append([]string{"", "MDPC01", "mmi.x"}, slices.Repeat([]string{"x"}, 300)...)},
	}
	for i, m := range messages {
		hostile := newPeer(t, zmq.DEALER)
		if err := errors.Join(hostile.SetIdentity(fmt.Sprint("hostile", i, ".")), hostile.Connect(endpoint)); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			hostile.send(m.frames...)
		}
		hostile.send("", "MDPC01", "mmi.service", "echo")
		for !slices.Equal(hostile.recv(), []string{"", "MDPC01", "mmi.service", "200"}) {
		}
		hostile.Close()
		normal()
	}

	long := make([]byte, 1<<17)
	for _, attack := range []struct {
		name   string
		closed bool // by the broker, at once; it gives the others half a minute
		begin  func() net.Conn
	}{
		{"random bytes", false, func() net.Conn {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n\x00\xff\xfe\xfd\x80\x81"))
			return conn
		}},
		{"half a handshake", false, func() net.Conn {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte("\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"))
			return conn
		}},
		{"a frame over the limit", true, func() net.Conn {
			conn, err := dialZMTP(address)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(append([]byte("\x02\x00\x00\x00\x00\x00\x02\x00\x00"), long...))
			return conn
		}},
		{"a frame that never ends", true, func() net.Conn {
			conn, err := dialZMTP(address)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte("\x02\x7f\xff\xff\xff\xff\xff\xff\xff"))
			return conn
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			for range 10 {
				conn := attack.begin()
				if attack.closed {
					conn.SetReadDeadline(time.Now().Add(10 * time.Second))
					for err = nil; err == nil; {
						_, err = conn.Read(make([]byte, 1024))
					}
					if errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("the broker left the connection open")
					}
				}
				conn.Close()
			}
			normal()
		})
	}
	if after := processMemory(t, broker.Process.Pid, "VmRSS"); after > before+8<<20 {
		t.Errorf("the broker grew from %d to %d bytes", before, after)
	}

	broker.Process.Signal(syscall.SIGTERM)
	broker.Wait()
	for i, m := range messages {
		if count := strings.Count(log.String(), fmt.Sprint("=hostile", i, ".")); (m.why != "") != (count == 1) {
			t.Errorf("%q was logged %d times", m.frames, count)
		}
		if !strings.Contains(log.String(), m.why) {
			t.Errorf("%q is not in the log", m.why)
		}
	}
	if count := strings.Count(log.String(), "did not complete the ZeroMQ handshake"); count != 1 {
		t.Errorf("connections without a handshake were logged %d times", count)
	}
	if t.Failed() {
		t.Log(log.String())
	}
}
