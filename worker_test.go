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

func TestServiceSpeaksWithABrokerThatIsNotOurs(t *testing.T) {
	broker, endpoint := bindPeer(t)
	release := make(chan struct{})
	startService(t, endpoint, func(_ string, body [][]byte) Reply {
		<-release
		return Reply{Output: append(body, []byte("\x00\xff"))}
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
	stop := startService(t, endpoint, func(_ string, body [][]byte) Reply {
		close(started)
		<-release
		return Reply{Output: body}
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
