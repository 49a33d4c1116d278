package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

func TestPeersWrittenFromTheRFCAreServed(t *testing.T) {
	endpoint := startBroker(t, 50*time.Millisecond)
	worker := connectPeer(t, zmq.DEALER, endpoint)
	worker.send("", "MDPW01", "\x01", "echo")
	worker.want(worker.recv(), heartbeatFrames...)

	// A REQ socket adds and removes the empty frame itself.
	client := connectPeer(t, zmq.REQ, endpoint)
	client.send("MDPC01", "echo", "hello", "\x00\xff")
	request := worker.recvSkipping(heartbeatFrames...)
	if len(request) != 7 {
		t.Fatalf("the worker got %q", request)
	}
	token := request[3]
	worker.want(request, "", "MDPW01", "\x02", token, "", "hello", "\x00\xff")
	worker.send("", "MDPW01", "\x03", token, "", "good", "", "bye")
	client.want(client.recv(), "MDPC01", "echo", "good", "", "bye")

	// A DEALER may send frames of its own before the empty one.
	dealer := connectPeer(t, zmq.DEALER, endpoint)
	dealer.send("17", "", "MDPC01", "mmi.service", "echo")
	dealer.want(dealer.recv(), "17", "", "MDPC01", "mmi.service", "200")

	worker.send("", "MDPW01", "\x01", "echo")
	worker.want(worker.recvSkipping(heartbeatFrames...), "", "MDPW01", "\x05")
}

func TestFloodIsReadToItsEnd(t *testing.T) {
	worker := connectPeer(t, zmq.DEALER, startBroker(t, time.Hour))
	worker.send("", "MDPW01", "\x01", "echo")
	for range 10_000 { // more than the loop receives at a time; the broker sends nothing in return
		worker.send(heartbeatFrames...)
	}
	worker.send("", "MDPC01", "mmi.service", "echo")
	worker.want(worker.recv(), "", "MDPC01", "mmi.service", "200")
}

func TestBrokerListensOnSeveralEndpoints(t *testing.T) {
	ipc := "ipc://" + filepath.Join(t.TempDir(), "b")
	router, bound, err := listen([]string{ipc, "tcp://127.0.0.1:0"}, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	if bound[0] != ipc || !strings.HasPrefix(bound[1], "tcp://127.0.0.1:") || strings.HasSuffix(bound[1], ":0") {
		t.Errorf("bound to %q", bound)
	}
	for _, endpoint := range bound {
		client := connectPeer(t, zmq.DEALER, endpoint)
		client.send("hello")
		if message, err := router.RecvMessageBytes(0); err != nil || string(message[1]) != "hello" {
			t.Errorf("%s: received %q, %v", endpoint, message, err)
		}
	}
}

// BenchmarkHeartbeats measures one heartbeat interval with 10,000 workers over TCP: the broker
// receives a heartbeat of each worker and sends one to each. It reports the share of a core that an
// interval of one second costs, for the loop of the broker and for the whole process, which includes
// the I/O thread of ZeroMQ.
func BenchmarkHeartbeats(b *testing.B) {
	const workers = 10_000
	router, bound, err := listen([]string{"tcp://127.0.0.1:0"}, 1<<20, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer router.Close()
	broker := NewBroker(testFlags, time.Now(), routerOutlet{router, newQueueWaker(newPollWaiter()), func() {}}, noLog)
	waiter := newPollWaiter()
	receive := func(n int) {
		end := time.Now().Add(10 * time.Second)
		for i := 0; i < n; {
			message, err := router.receive()
			if err != nil || time.Now().After(end) {
				b.Fatalf("received %d of %d messages: %v", i, n, err)
			}
			if message == nil {
				waiter.Wait(end, router)
				continue
			}
			broker.Receive(message, sender{source: -1}, time.Now())
			i++
		}
	}

	// The workers run in another process, so that only the time of the broker is measured.
	fleet := exec.Command("workerfleet", strings.TrimPrefix(bound[0], "tcp://"), fmt.Sprint(workers))
	fleet.Stderr = os.Stderr
	beat, err := fleet.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := fleet.Start(); err != nil {
		b.Fatal(err)
	}
	defer fleet.Wait()
	defer beat.Close()
	receive(workers)
	if len(broker.workers) != workers {
		b.Fatalf("%d workers registered", len(broker.workers))
	}

	now := time.Now()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const thread = 1 // RUSAGE_THREAD, on Linux only
	loop, process := cpuTime(thread), cpuTime(syscall.RUSAGE_SELF)
	for b.Loop() {
		beat.Write([]byte{0})
		receive(workers)
		now = now.Add(time.Second)
		broker.Tick(now)
	}
	percent := func(spent time.Duration) float64 { return 100 * spent.Seconds() / float64(b.N) }
	b.ReportMetric(percent(cpuTime(thread)-loop), "%core-loop")
	b.ReportMetric(percent(cpuTime(syscall.RUSAGE_SELF)-process), "%core-process")
	if len(broker.workers) != workers {
		b.Fatalf("%d workers are left", len(broker.workers))
	}
}
