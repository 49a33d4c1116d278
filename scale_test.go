package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAtScale holds the tests with so many or such large requests that they would take minutes with
// the race detector.
func TestAtScale(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"50 MiB pass unchanged and are in memory twice at most", longBodiesPassUnchanged},
		{"long replies are in memory twice at most, the second too", longRepliesAreInMemoryTwiceAtMost},
		{"a stream of 1 GiB passes unchanged, at constant memory", longStreamPassesUnchanged},
		{"the number of open descriptors stays the same", numberOfOpenDescriptorsStaysTheSame},
		{"50,000 lines come out in order and take no more memory than 2,000", manyLinesComeOutInOrderAndTakeLittleMemory},
		{"with --retries no line is lost when workers are killed", linesSurviveKilledWorkers},
		{"no line is lost or runs twice when the broker is restarted", linesSurviveRestartedBrokers},
		{"clients take the broker to --max-memory plus 64 MiB at most", clientsTakeLittleMemory},
		{"no client holds up heartbeats, signals or the requests of others", attacksHoldUpNobody},
		{"a long queue of one client keeps nobody out", longQueueOfOneClientKeepsNobodyOut},
	} {
		t.Run(test.name, test.run)
	}
}

// idleMemory is more than what a tool takes that does nothing, in bytes.
const idleMemory = 20 << 20

func longBodiesPassUnchanged(t *testing.T) {
	s := newSystem(t, "--heartbeat", "1s") // heartbeats wait while a frame is sent
	s.start("bservice", "--stdin", "--max-output", "51M", "cat", "cat")
	block := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{})
	sent, received := sha256.New(), sha256.New()
	request := exec.Command("brequest", "--stdin", "-t", "100", "cat")
	request.Env = append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
	stdin, err := request.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	request.Stdout = received
	if err := request.Start(); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		random.Read(block)
		io.MultiWriter(sent, stdin).Write(block)
	}
	stdin.Close()
	err = request.Wait()
	if err != nil {
		t.Error(err)
	}
	if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		t.Error("the reply differs from the request")
	}
	// brequest copies the request once and then, when the request is gone, the reply once.
	const payload = 50 << 20
	if peak := int(request.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) << 10; peak > 2*payload+idleMemory {
		t.Errorf("the peak of brequest was %d MiB", peak>>20)
	}
}

func longRepliesAreInMemoryTwiceAtMost(t *testing.T) {
	const length = 50 << 20
	s := newSystem(t, "--heartbeat", "1s")
	service := s.start("bservice", "--max-output", "50M", "long", "head", "-c", fmt.Sprint(length), "/dev/zero")
	for range 2 {
		request := exec.Command("brequest", "-n", "long")
		request.Env = append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
		reply, err := request.Output()
		if err != nil || len(reply) != length {
			t.Fatalf("got %d bytes, %v", len(reply), err)
		}
	}
	for name, p := range map[string]*childProcess{"bbroker": s.broker, "bservice": service} {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		_, peak, _ := strings.Cut(string(status), "VmHWM:")
		kib, err := strconv.Atoi(strings.Fields(peak)[0])
		if err != nil || kib<<10 > 2*length+idleMemory {
			t.Errorf("the peak of %s was %d MiB, %v", name, kib>>10, err)
		}
	}
}

// A pattern is an endless sequence of bytes. Each eight of them depend on their position.
type pattern struct {
	block [64 << 10]byte
	words uint64 // so far
}

// next returns the next block. It is valid until the next call.
func (p *pattern) next() []byte {
	for i := 0; i < len(p.block); i += 8 {
		binary.LittleEndian.PutUint64(p.block[i:], p.words*0x9e3779b97f4a7c15)
		p.words++
	}
	return p.block[:]
}

// patternWriter is a helper program: it prints N blocks of the pattern, and rests after the first.
func patternWriter() {
	n, _ := strconv.Atoi(os.Args[1])
	var p pattern
	for i := range n {
		if _, err := os.Stdout.Write(p.next()); err != nil {
			os.Exit(1)
		}
		if i == 0 {
			time.Sleep(200 * time.Millisecond)
		}
	}
}

func longStreamPassesUnchanged(t *testing.T) {
	var want pattern
	total := 1 << 30 / len(want.block)
	s := newSystem(t)
	service := s.start("bservice", "--heartbeat", "100ms", "--max-output", "0", "pattern", "patternwriter")
	service.waitForLines(1, "service connected")
	request := exec.Command("brequest", "--stream", "pattern", strconv.Itoa(total))
	request.Env = append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
	request.Stderr = os.Stderr
	stdout, err := request.StdoutPipe()
	if err == nil {
		err = request.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer request.Process.Kill()

	pids := map[string]int{"bbroker": s.broker.Process.Pid, "bservice": service.Process.Pid, "brequest": request.Process.Pid}
	idle := map[string]int{}
	block := make([]byte, len(want.block))
	for i := range total {
		if _, err := io.ReadFull(stdout, block); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if !bytes.Equal(block, want.next()) {
			t.Fatalf("block %d differs", i)
		}
		switch {
		case i == 0: // The command rests.
			for name, pid := range pids {
				idle[name] = processMemory(t, pid, "VmHWM")
			}
		case i == total-32: // All tools run: a pipe holds less than what is left.
			for name, pid := range pids {
				if peak := processMemory(t, pid, "VmHWM"); peak == 0 || peak > idle[name]+32<<20 {
					t.Errorf("the peak of %s was %d MiB, and %d MiB idle", name, peak>>20, idle[name]>>20)
				}
			}
		case i%2048 == 0:
			time.Sleep(100 * time.Millisecond)
		}
	}
	if rest, err := io.ReadAll(stdout); err != nil || len(rest) > 0 {
		t.Errorf("%d more bytes came, %v", len(rest), err)
	}
	if err := request.Wait(); err != nil {
		t.Error(err)
	}
}

func numberOfOpenDescriptorsStaysTheSame(t *testing.T) {
	const total = 1000
	s := newSystem(t)
	service := s.start("bservice", "--heartbeat", "100ms", "-j4", "true", "true")
	coproc := s.start("bservice", "--heartbeat", "100ms", "-j4", "--coproc", "echo", "cat")
	s.waitForMetric("backbone_workers", 8)
	count := func(p *childProcess) int {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	pipeline(t, s, "true", 100)
	pipeline(t, s, "echo", 100)
	before := [2]int{count(service), count(coproc)}
	pipeline(t, s, "true", total/2)
	pipeline(t, s, "echo", total/2)
	if after := [2]int{count(service), count(coproc)}; after != before {
		t.Errorf("%d descriptors were open before, %d after", before, after)
	}
}

// A filter is a brequest --each process with pipes for its standard input and output.
type filter struct {
	*exec.Cmd
	t      *testing.T
	stdin  io.WriteCloser
	stdout *bufio.Reader
}

func startFilter(t *testing.T, s *system, args ...string) *filter {
	t.Helper()
	f := &filter{Cmd: exec.Command("brequest", append([]string{"--each"}, args...)...), t: t}
	f.Env = append(os.Environ(), "BACKBONE_BROKER="+s.endpoint)
	f.Stderr = os.Stderr
	stdout, err := f.StdoutPipe()
	if err == nil {
		f.stdin, err = f.StdinPipe()
	}
	if err == nil {
		err = f.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	f.stdout = bufio.NewReader(stdout)
	t.Cleanup(func() { f.Process.Kill() })
	return f
}

// pass writes the numbers from first to last, one a line, and expects them back in order.
func (f *filter) pass(first, last int) {
	f.t.Helper()
	go func() {
		w := bufio.NewWriter(f.stdin)
		for i := first; i <= last; i++ {
			fmt.Fprintln(w, i)
		}
		w.Flush()
	}()
	for i := first; i <= last; i++ {
		line, err := f.stdout.ReadString('\n')
		if err != nil || line != strconv.Itoa(i)+"\n" {
			f.t.Fatalf("line %d is %q, %v", i, line, err)
		}
	}
}

// end closes the input and expects the output and the process to end.
func (f *filter) end() {
	f.t.Helper()
	f.stdin.Close()
	if rest, err := io.ReadAll(f.stdout); err != nil || len(rest) > 0 {
		f.t.Errorf("unexpected output at the end: %q, %v", rest, err)
	}
	if err := f.Wait(); err != nil {
		f.t.Error(err)
	}
}

func manyLinesComeOutInOrderAndTakeLittleMemory(t *testing.T) {
	s := newSystem(t)
	s.start("bservice", "--heartbeat", "100ms", "-j4", "--coproc", "echo", "cat")
	f := startFilter(t, s, "echo")
	f.pass(1, 2000) // by then its threads and its heap have their size
	few := processMemory(t, f.Process.Pid, "VmHWM")
	f.pass(2001, 50000)
	many := processMemory(t, f.Process.Pid, "VmHWM")
	f.end()
	if few == 0 || many > few*110/100 {
		t.Errorf("the peak was %d kB after 2,000 lines and %d kB after 50,000", few>>10, many>>10)
	}
}

func linesSurviveKilledWorkers(t *testing.T) {
	s := newSystem(t)
	start := func() *childProcess {
		return s.start("bservice", "--heartbeat", "100ms", "-j2", "--coproc", "echo", "cat")
	}
	steady, victim := start(), start()
	steady.waitForLines(1, "service connected")
	f := startFilter(t, s, "--retries", "20", "echo")
	for round := range 10 {
		victim.waitForLines(1, "service connected")
		f.pass(2000*round+1, 2000*round+1000)
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			victim.Process.Kill()
		}()
		f.pass(2000*round+1001, 2000*round+2000)
		<-killed
		victim = start()
	}
	f.end()
	if s.metric("backbone_lost_workers_total") == 0 {
		t.Error("no worker was lost")
	}
}

func linesSurviveRestartedBrokers(t *testing.T) {
	const total, restarts = 6000, 2
	s := newSystem(t)
	s.start("bservice", "--heartbeat", "100ms", "-j4", "--coproc", "record", "sh", "-c", `while read -r x; do echo "$x" >>runs; echo "$x"; done`)
	f := startFilter(t, s, "record")
	for n := range restarts {
		passed := make(chan struct{})
		go func() {
			defer close(passed)
			f.pass(n*total/restarts+1, (n+1)*total/restarts)
		}()
		for s.metric("backbone_replies_total") < total/restarts/2 {
		}
		s.broker.signal(syscall.SIGTERM)
		if got := s.broker.waitForExit(); got != 0 {
			t.Errorf("the broker ended with status %d", got)
		}
		s.broker = s.start("bbroker", "--heartbeat", "100ms")
		<-passed
	}
	f.end()
	runs := s.runs("runs")
	if different := len(slices.Compact(slices.Clone(runs))); len(runs) != total || different != total {
		t.Errorf("%d runs of %d lines, want %d", len(runs), different, total)
	}
}
