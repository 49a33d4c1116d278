package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// Faults, on real processes: what is promised of the broker must hold when workers,
// clients and the broker itself are killed, stopped or hostile.

// A running tool is one of ours that a test started.
type running struct {
	*exec.Cmd
	t     testing.TB
	lines chan string // of its standard error; the test may look or not
	ended chan struct{}
}

// start runs a tool until the end of the test, in dir, with the broker at endpoint.
func start(t testing.TB, dir, endpoint, name string, args ...string) *running {
	t.Helper()
	p := &running{Cmd: exec.Command(name, args...), t: t, lines: make(chan string, 1<<16), ended: make(chan struct{})}
	p.Dir = dir
	p.Env = append(os.Environ(), "BACKBONE_BROKER="+endpoint, "GORACE=atexit_sleep_ms=0")
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		scanLines(stderr, func(line string) {
			select {
			case p.lines <- line:
			default:
			}
		})
		p.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.Process.Kill()
		<-p.ended
	})
	return p
}

// says waits for a line of the process's standard error that matches, n times.
func (p *running) says(n int, pattern string) {
	p.t.Helper()
	match := regexp.MustCompile(pattern)
	for deadline := time.After(20 * time.Second); n > 0; {
		select {
		case line := <-p.lines:
			if match.MatchString(line) {
				n--
			}
		case <-deadline:
			p.t.Fatalf("%v never said %q", p.Args, pattern)
		}
	}
}

// signal sends a signal to the process and nobody else.
func (p *running) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// status waits for the end of the process.
func (p *running) status() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatalf("%v does not end", p.Args)
	}
	return exitStatus(p.ProcessState)
}

// A site is a folder with a broker at an ipc endpoint in it.
type site struct {
	t             testing.TB
	dir, endpoint string
	broker        *running
}

// bareSite has no broker yet.
func bareSite(t testing.TB) *site {
	dir := t.TempDir()
	return &site{t: t, dir: dir, endpoint: "ipc://" + dir + "/broker"}
}

func newSite(t testing.TB, flags ...string) *site {
	t.Helper()
	s := bareSite(t)
	s.broker = s.start("bbroker", append([]string{"--heartbeat", "100ms"}, flags...)...)
	return s
}

func (s *site) start(name string, args ...string) *running {
	s.t.Helper()
	return start(s.t, s.dir, s.endpoint, name, args...)
}

// service starts a service whose command is a line of shell, with heartbeats to match
// the broker's. It returns when the service is ready.
func (s *site) service(name, line string) *running {
	s.t.Helper()
	p := s.start("bservice", "--heartbeat", "100ms", name, "sh", "-c", line, "sh")
	p.says(1, "is ready")
	return p
}

// ask sends a request with a client of its own.
func (s *site) ask(name string, body ...string) ([]string, error) {
	client := NewClient(context.Background(), s.endpoint)
	defer client.Disconnect()
	reply, err := client.Send(name, frames(body...), 20*time.Second)
	return spell(reply), err
}

func (s *site) expect(name string, body []string, want ...string) {
	s.t.Helper()
	if reply, err := s.ask(name, body...); err != nil || !slices.Equal(reply, want) {
		s.t.Fatalf("%s %q replied %q, %v, want %q", name, body, reply, err, want)
	}
}

// metric reads a figure of the broker's.
func (s *site) metric(name string) int {
	s.t.Helper()
	reply, err := s.ask("mmi.metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	match := regexp.MustCompile(`(?m)^` + name + ` (\d+)$`).FindStringSubmatch(reply[0])
	if match == nil {
		s.t.Fatalf("no metric %s in %q", name, reply)
	}
	value, _ := strconv.Atoi(match[1])
	return value
}

// becomes waits until a figure of the broker's is what it should be.
func (s *site) becomes(name string, want int) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		got := s.metric(name)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s is %d, want %d", name, got, want)
		}
	}
}

// runs are the lines that commands left in the file of that name, in order of letters.
func (s *site) runs(name string) []string {
	content, _ := os.ReadFile(filepath.Join(s.dir, name))
	lines := strings.Fields(string(content))
	slices.Sort(lines)
	return lines
}

func TestIdleWorkerThatIsKilledIsMissedByNobody(t *testing.T) {
	s := newSite(t)
	victim := s.service("echo", `printf %s "$1"`)
	s.service("echo", `printf %s "$1"`)
	s.becomes("backbone_workers", 2)
	victim.signal(syscall.SIGKILL)
	// Until ZeroMQ has seen the end of the connection a request can still be lost in it.
	s.becomes("backbone_workers", 1)
	for i := range 20 {
		s.expect("echo", []string{fmt.Sprint(i)}, fmt.Sprint(i))
	}
	if lost, replies := s.metric("backbone_lost_workers_total"), s.metric("backbone_replies_total"); lost != 1 || replies != 20 {
		t.Errorf("%d workers were lost and %d replies came, want 1 and 20", lost, replies)
	}
}

// hang is a command that tells of each run and then works until a file "go" is there.
const hang = `echo "$1" >>runs; while [ ! -e go ]; do read x <tick; done; printf done`

// newHangSite is a site for commands that hang until release is called.
func newHangSite(t *testing.T, flags ...string) (s *site, release func()) {
	s = newSite(t, flags...)
	tick := filepath.Join(s.dir, "tick")
	if err := syscall.Mkfifo(tick, 0o600); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		os.WriteFile(filepath.Join(s.dir, "go"), nil, 0o600)
		// Whoever reads the fifo now gets its end; who comes later does not read.
		if f, err := os.OpenFile(tick, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	})
	t.Cleanup(release)
	return s, release
}

// started waits until there are so many runs.
func (s *site) started(n int) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); len(s.runs("runs")) < n; {
		if time.Now().After(deadline) {
			s.t.Fatalf("%d commands run, want %d", len(s.runs("runs")), n)
		}
		runtime.Gosched()
	}
}

func TestBusyWorkerThatIsKilledFailsItsClientAtOnceAndIsNotRepeated(t *testing.T) {
	s, _ := newHangSite(t)
	victim := s.service("hang", hang)
	s.service("hang", hang)
	s.becomes("backbone_workers", 2)
	request := s.start("brequest", "hang", "once")
	s.started(1)
	victim.signal(syscall.SIGKILL)
	if got := request.status(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	if runs := s.runs("runs"); len(runs) != 1 || s.metric("backbone_lost_workers_total") != 1 {
		t.Errorf("runs %q, want one", runs)
	}
}

func TestBusyWorkerThatIsKilledIsRepeatedWhereAskedFor(t *testing.T) {
	s, release := newHangSite(t, "--redeliver", "1")
	victim := s.service("hang", hang)
	s.becomes("backbone_workers", 1)
	request := s.start("brequest", "hang", "twice")
	s.started(1)
	victim.signal(syscall.SIGKILL)
	s.service("hang", hang)
	s.started(2)
	release()
	if got := request.status(); got != 0 {
		t.Errorf("status %d, want 0", got)
	}
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"twice", "twice"}) || s.metric("backbone_redelivered_total") != 1 {
		t.Errorf("runs %q, want two", runs)
	}
}

func TestBusyWorkerThatIsStoppedFailsItsClientAndComesBackWhenItGoesOn(t *testing.T) {
	s, release := newHangSite(t, "-v")
	victim := s.service("hang", hang)
	request := s.start("brequest", "hang", "once")
	s.started(1)
	s.broker.says(1, "kind=MDPC01 service=hang")
	s.broker.says(5, "kind=HEARTBEAT") // while busy: now it must go on
	victim.signal(syscall.SIGSTOP)
	if got := request.status(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	release()
	victim.signal(syscall.SIGCONT)
	s.expect("hang", []string{"again"}, "done")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"again", "once"}) {
		t.Errorf("runs %q", runs)
	}
}

func TestLoadSurvivesABrokerThatIsKilledAndStartedAgain(t *testing.T) {
	s := newSite(t)
	for range 4 {
		s.service("echo", `printf %s "$1"`)
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
				outcome := "a wrong answer"
				switch {
				case err == nil && slices.Equal(spell(reply), []string{body}):
					outcome = "right"
				case errors.Is(err, errLost), errors.Is(err, errNoBroker):
					outcome = "69"
				case errors.Is(err, errTimeout):
					outcome = "124"
				case err == nil && len(reply) == 3 && string(reply[2]) == "exit status 69":
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
		s.broker.status()
		s.broker = s.start("bbroker", "--heartbeat", "100ms")
		begin := time.Now()
		s.becomes("backbone_workers", 4)
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("the workers were back after %v, want 2s", took)
		}
	}
	s.expect("echo", []string{"after"}, "after")
	close(stop)
	wg.Wait()
	if outcomes["a wrong answer"] > 0 || outcomes["right"] == 0 || outcomes["69"] == 0 {
		t.Errorf("outcomes %v", outcomes)
	}
	t.Logf("outcomes %v", outcomes)
}

func TestRollingRestartLosesNothingAndRunsNothingTwice(t *testing.T) {
	t.Parallel()
	const total = 2000
	s := newSite(t)
	record := func() *running { return s.service("record", `echo "$1" >>runs; printf %s "$1"`) }
	workers := []*running{record(), record(), record()}

	numbers := make(chan int)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			client := NewClient(context.Background(), s.endpoint)
			defer client.Disconnect()
			for n := range numbers {
				body := fmt.Sprintf("%04d", n)
				reply, err := client.Send("record", frames(body), 20*time.Second)
				if err != nil || !slices.Equal(spell(reply), []string{body}) {
					t.Errorf("request %s: %q, %v", body, reply, err)
				}
			}
		})
	}
	restarts := 0
	for n := range total {
		numbers <- n
		if n%200 == 100 { // one of them, while the requests go on
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
	s := newSite(t)
	request := s.start("brequest", "record", "unwanted")
	s.becomes("backbone_queue_length", 1)
	request.signal(syscall.SIGTERM)
	if got := request.status(); got != 143 {
		t.Errorf("status %d, want 143", got)
	}
	s.becomes("backbone_cancelled_total", 1)
	s.service("record", `echo "$1" >>runs; printf %s "$1"`)
	s.expect("record", []string{"wanted"}, "wanted")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"wanted"}) {
		t.Errorf("runs %q", runs)
	}
}

func TestClientThatIsKilledWhileQueuedLosesItsReplyAndNobodyNotices(t *testing.T) {
	s := newSite(t)
	request := s.start("brequest", "record", "nobodys")
	s.becomes("backbone_queue_length", 1)
	request.signal(syscall.SIGKILL)
	request.status()
	s.service("record", `echo "$1" >>runs; printf %s "$1"`)
	s.expect("record", []string{"mine"}, "mine")
	if runs := s.runs("runs"); !slices.Equal(runs, []string{"mine", "nobodys"}) {
		t.Errorf("runs %q", runs)
	}
	s.becomes("backbone_dropped_replies_total", 1)
}

func TestPipelinedRequestsAreAllAnswered(t *testing.T) {
	const total = 2000
	s := newSite(t)
	for range 4 {
		s.start("echoworker", "echo")
	}
	s.becomes("backbone_workers", 4)
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
		t.Errorf("%d different replies, want %d", len(seen), total)
	}
}

func TestClientThatNeverReadsHoldsUpNobody(t *testing.T) {
	s := newSite(t)
	for range 2 {
		s.start("echoworker", "echo")
	}
	s.becomes("backbone_workers", 2)
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
	s.becomes("backbone_replies_total", total+total/500)
	s.expect("echo", []string{"others"}, "others")
	if dropped := s.metric("backbone_dropped_replies_total"); dropped == 0 || dropped > total {
		t.Errorf("%d replies were dropped", dropped)
	}
}

func TestStoppedBrokerAwaitsRepliesAndTellsTheRest(t *testing.T) {
	s, release := newHangSite(t, "-v")
	s.service("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.started(1)
	waiting := s.start("brequest", "hang", "waiting")
	s.becomes("backbone_queue_length", 1)
	s.broker.signal(syscall.SIGTERM)
	if got := waiting.status(); got != 75 {
		t.Errorf("the waiting request: status %d, want 75", got)
	}
	if got := s.start("brequest", "hang", "new").status(); got != 75 {
		t.Errorf("a new request: status %d, want 75", got)
	}
	release()
	if got := running.status(); got != 0 {
		t.Errorf("the running request: status %d, want 0", got)
	}
	if got := s.broker.status(); got != 0 {
		t.Errorf("the broker: status %d, want 0", got)
	}
}

func TestStoppedBrokerDoesNotWaitLongerThanItsGrace(t *testing.T) {
	s, _ := newHangSite(t, "--grace", "200ms")
	s.service("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.started(1)
	s.broker.signal(syscall.SIGTERM)
	if got := running.status(); got != 75 {
		t.Errorf("the running request: status %d, want 75", got)
	}
	if got := s.broker.status(); got != 0 {
		t.Errorf("the broker: status %d, want 0", got)
	}
}

func TestSecondSignalEndsTheBrokerAtOnce(t *testing.T) {
	s, _ := newHangSite(t, "--grace", "1h", "-v")
	s.service("hang", hang)
	running := s.start("brequest", "hang", "running")
	s.started(1)
	s.broker.signal(syscall.SIGTERM)
	// Its first request that is refused tells that the first signal was taken.
	if got := s.start("brequest", "hang", "new").status(); got != 75 {
		t.Errorf("a new request: status %d, want 75", got)
	}
	s.broker.signal(syscall.SIGTERM)
	if got := s.broker.status(); got != 143 {
		t.Errorf("the broker: status %d, want 143", got)
	}
	if got := running.status(); got != 69 {
		t.Errorf("the running request: status %d, want 69", got)
	}
}

// zmtp opens a connection and shakes hands as a DEALER, without libzmq: ZMTP 3.0,
// mechanism NULL.
func zmtp(address string) (net.Conn, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	greeting := make([]byte, 64)
	greeting[0], greeting[9], greeting[10] = 0xff, 0x7f, 3
	copy(greeting[12:], "NULL")
	ready := "\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
	conn.Write(greeting)
	if _, err := io.ReadFull(conn, make([]byte, len(greeting))); err != nil {
		return nil, err
	}
	conn.Write(append([]byte{4, byte(len(ready))}, ready...))
	theirs := make([]byte, 2)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return nil, err
	}
	_, err = io.ReadFull(conn, make([]byte, theirs[1]))
	return conn, err
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
	s := &site{t: t, dir: dir, endpoint: endpoint}
	s.start("echoworker", "echo")
	normal := func() {
		t.Helper()
		s.expect("echo", []string{"normal"}, "normal")
	}
	normal()
	before := memory(t, broker.Process.Pid, "VmRSS")

	// Each message comes from a peer of its own. It is followed by a question, whose
	// answer tells that the broker has read it.
	messages := []struct {
		why    string // it must log
		frames []string
	}{
		{"no MDPC01 or MDPW01", []string{""}},
		{"no MDPC01 or MDPW01", []string{"one frame"}},
		{"no service name", []string{"", "MDPC01"}},
		{"no service name", []string{"", "MDPC01", "", "x"}},
		{"no MDPC01 or MDPW01", []string{"", "MDPC02", "echo", "x"}},
		{"no MDPC01 or MDPW01", []string{"", "MDPW02", "\x01", "echo"}},
		{"no MDPC01 or MDPW01", append([]string{"x"}, slices.Repeat([]string{"x"}, 300)...)},
		{"no one-byte command", []string{"", "MDPW01", "echo", "x"}},
		{"no service name", []string{"", "MDPW01", "\x01"}},
		{"unknown command", []string{"", "MDPW01", "\x06"}},
		{"no empty frame", []string{"", "MDPW01", "\x03", "token"}},
		{"the name is the broker's own", []string{"", "MDPW01", "\x01", "mmi.x"}},
		{"the broker is shutting down", []string{"", "MDPC01", "\x01", "echo"}}, // a name like any other
		{"", []string{"", "MDPW01", "\x02", "token", "", "x"}},
		{"", []string{"", "MDPW01", "\x03", "token", "", "x"}},
		{"", []string{"", "MDPW01", "\x05", "and", "more"}},
		{"", append([]string{"", "MDPC01", "mmi.x"}, slices.Repeat([]string{"x"}, 300)...)},
	}
	for i, m := range messages {
		peer := newPeer(t, zmq.DEALER)
		if err := errors.Join(peer.SetIdentity(fmt.Sprint("hostile", i, ".")), peer.Connect(endpoint)); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			peer.send(m.frames...)
		}
		peer.send("", "MDPC01", "mmi.service", "echo")
		for !slices.Equal(peer.recv(), []string{"", "MDPC01", "mmi.service", "200"}) {
		}
		peer.Close()
		normal()
	}

	long := make([]byte, 1<<17)
	for _, attack := range []struct {
		name   string
		closed bool // by the broker, at once; the others have half a minute to go on
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
			conn, err := zmtp(address)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(append([]byte("\x02\x00\x00\x00\x00\x00\x02\x00\x00"), long...))
			return conn
		}},
		{"a frame that never ends", true, func() net.Conn {
			conn, err := zmtp(address)
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
	if after := memory(t, broker.Process.Pid, "VmRSS"); after > before+8<<20 {
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
	if count := strings.Count(log.String(), "does not speak ZeroMQ"); count != 1 {
		t.Errorf("connections without a handshake were logged %d times", count)
	}
	if t.Failed() {
		t.Log(log.String())
	}
}

// memory is that of a process, as the field of /proc/PID/status has it, in bytes, and 0
// where there is none.
func memory(t *testing.T, pid int, field string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	match := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
	kilobytes, _ := strconv.Atoi(string(match[1]))
	return kilobytes << 10
}

func scanLines(r io.Reader, each func(string)) {
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		each(scanner.Text())
	}
}
