package main

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

func TestServiceWorksWithAThirdPartyBroker(t *testing.T) {
	broker, endpoint := bindPeer(t)
	release := make(chan struct{})
	startService(t, endpoint, func(_ string, body [][]byte) Reply {
		<-release
		return Reply{Output: append(body, []byte("\x00\xff"))}
	})

	worker, ready := broker.nextFromWorker()
	broker.want(ready, "", "MDPW01", "\x01", "echo")
	if !strings.HasPrefix(worker, "bservice.") {
		t.Errorf("the identity %q does not begin with bservice.", worker)
	}

	// It sends heartbeats while it works, although this broker sends none.
	broker.send(worker, "", "MDPW01", "\x02", "\x00client", "stack", "", "hello", "")
	for range 3 {
		broker.want(broker.recv(), append([]string{worker}, heartbeatFrames...)...)
	}
	close(release)
	_, reply := broker.nextFromWorker()
	broker.want(reply, "", "MDPW01", "\x03", "\x00client", "stack", "", "hello", "", "\x00\xff")

	// After DISCONNECT, here without the empty frame, it registers with a new identity.
	broker.send(worker, "MDPW01", "\x05")
	again, ready := broker.nextFromWorker()
	broker.want(ready, "", "MDPW01", "\x01", "echo")
	if again == worker {
		t.Errorf("the identity %q was used twice", worker)
	}
}

func TestServiceWhoseConnectionBrokeRegistersAgainWithANewIdentity(t *testing.T) {
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
	worker, _ := broker.nextFromWorker()
	broker.Close()
	broker = bind()
	again := broker.recv()
	broker.want(again[1:], "", "MDPW01", "\x01", "echo")
	if again[0] == worker {
		t.Errorf("the identity %q was used twice", worker)
	}
}

func TestServiceThatIsStoppedRepliesAndDisconnects(t *testing.T) {
	broker, endpoint := bindPeer(t)
	started, release := make(chan struct{}), make(chan struct{})
	stop := startService(t, endpoint, func(_ string, body [][]byte) Reply {
		close(started)
		<-release
		return Reply{Output: body}
	})
	worker, _ := broker.nextFromWorker()
	broker.send(worker, "", "MDPW01", "\x02", "C", "", "x")
	<-started
	go stop()
	broker.recv() // a heartbeat, after it was stopped
	close(release)
	_, reply := broker.nextFromWorker()
	broker.want(reply, "", "MDPW01", "\x03", "C", "", "x")
	_, leave := broker.nextFromWorker()
	broker.want(leave, "", "MDPW01", "\x05")
}

func TestServiceThatIsDisconnectedRepeatedlyWaitsBeforeItRegisters(t *testing.T) {
	broker, endpoint := bindPeer(t)
	startService(t, endpoint, nil)
	begin := time.Now()
	for range 5 {
		worker, ready := broker.nextFromWorker()
		broker.want(ready, "", "MDPW01", "\x01", "echo")
		broker.send(worker, "", "MDPW01", "\x05")
	}
	// Between five sessions there must be four heartbeat intervals of 50 ms.
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("it registered five times in %v, want 200ms or more", took)
	}
}

func TestJobsRunEachRequestOnce(t *testing.T) {
	const total = 200
	s := newSystem(t)
	s.start("bservice", "--heartbeat", "100ms", "-j8", "record", "sh", "-c", `echo "$1" >>runs; sleep "0.0$2"; echo "$1"`, "sh")
	s.waitForMetric("backbone_workers", 8)
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
		t.Errorf("%d runs, %d different, want %d", len(s.runs("runs")), len(slices.Compact(runs)), total)
	}
}

func TestServiceUnderLoadThatIsTerminatedLeavesNoProcess(t *testing.T) {
	s := newSystem(t)
	service := s.start("bservice", "--heartbeat", "100ms", "-j4", "--timeout", "0.2", "--kill-after", "0.1", "--grace", "0.5", "work",
		"sh", "-c", `case $1 in
		fine) true ;;
		kill) kill -9 $$ ;;
		slow) sleep 1000 ;;
		deaf) trap "" TERM; sleep 1000 & wait ;;
		esac`, "sh")
	s.waitForMetric("backbone_workers", 4)
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
		t.Errorf("the load lacks an outcome: %v", statuses)
	}
	service.signal(syscall.SIGTERM)
	if got := service.waitForExit(); got != 0 {
		t.Errorf("the service ended with status %d", got)
	}
	s.expectNoDescendants()
	s.waitForMetric("backbone_workers", 0)
}

func TestEndlessOutputTakesLittleMemory(t *testing.T) {
	s := newSystem(t)
	service := s.start("bservice", "--heartbeat", "100ms", "-j4", "--max-output", "1M", "bomb", "sh", "-c", "yes & yes >&2 & yes")
	s.waitForMetric("backbone_workers", 4)
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	for range 20 {
		client.send("", "MDPC01", "bomb")
	}
	for range 20 {
		if reply := client.recv(); len(reply) != 6 || len(reply[3]) != 1<<20 || reply[5] != "exit status 74" {
			t.Fatalf("got %d frames, the last of them %q", len(reply), reply[len(reply)-1])
		}
	}
	// With the race detector the tool takes several times as much memory as without.
	if peak := processMemory(t, service.Process.Pid, "VmHWM"); peak > 200<<20 {
		t.Errorf("the service used %d MiB", peak>>20)
	}
	s.expectNoDescendants()
}

// BenchmarkCommands measures running true, two at a time: by bservice through a broker, and by
// xargs.
func BenchmarkCommands(b *testing.B) {
	b.Run("bservice", func(b *testing.B) {
		s := newSystem(b)
		s.start("bservice", "--heartbeat", "100ms", "-j2", "true", "/bin/true")
		s.waitForMetric("backbone_workers", 2)
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

// BenchmarkCoprocess measures one client that pipelines requests to four cat coprocesses, and, for
// comparison, to four workers that do no work. The latter is the cost of the broker and the client.
func BenchmarkCoprocess(b *testing.B) {
	for _, test := range []struct {
		name  string
		start func(*system)
	}{
		{"cat", func(s *system) { s.start("bservice", "--heartbeat", "100ms", "-j4", "--coproc", "echo", "cat") }},
		{"nothing", func(s *system) {
			for range 4 {
				s.start("echoworker", "echo")
			}
		}},
	} {
		b.Run(test.name, func(b *testing.B) {
			s := newSystem(b)
			test.start(s)
			s.waitForMetric("backbone_workers", 4)
			b.ResetTimer()
			pipeline(b, s, "echo", b.N)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}
