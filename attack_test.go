package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// An attacker is a connection to the broker of a system. It reads nothing unless a test does.
type attacker struct {
	net.Conn
	identity string
	out      *bufio.Writer
}

func (s *system) newAttacker(identity string) *attacker {
	s.t.Helper()
	conn, err := dialZMTPAs(identity, strings.TrimPrefix(s.endpoint, "ipc://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return &attacker{conn, identity, bufio.NewWriterSize(conn, 64<<10)}
}

// send sends a message count times.
func (a *attacker) send(count int, frames ...string) {
	message := encodeZMTP(frames...)
	for range count {
		a.out.Write(message)
	}
}

// finish sends what is left and registers as a worker of the service that has its identity as a
// name. It returns the first error of sending.
func (a *attacker) finish() error {
	a.send(1, "", "MDPW01", "\x01", a.identity)
	a.SetWriteDeadline(time.Now().Add(20 * time.Second))
	return a.out.Flush()
}

// waitForService waits until a service has a worker. A long reply, as to mmi.metrics, would be
// dropped while the memory of the broker is full.
func (s *system) waitForService(name string) {
	s.t.Helper()
	client := connectPeer(s.t, zmq.DEALER, s.endpoint)
	for deadline := time.Now().Add(20 * time.Second); ; {
		client.send("", "MDPC01", "mmi.service", name)
		if client.recv()[3] == "200" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("nobody serves %s", name)
		}
	}
}

// startWorker starts a worker in this process that replies to each request with what reply returns,
// until the end of the test. It tells heard of each heartbeat.
func (s *system) startWorker(service string, reply func(body string) string, heard func(time.Time)) {
	s.t.Helper()
	worker := connectPeer(s.t, zmq.DEALER, s.endpoint)
	worker.SetRcvtimeo(100 * time.Millisecond) // or it would end late if the broker ends first
	worker.send("", "MDPW01", "\x01", service)
	var stopped atomic.Bool
	worker.inBackground(func() {
		for !stopped.Load() {
			message, err := worker.RecvMessage(0)
			switch {
			case err != nil:
			case message[2] == "\x02":
				worker.SendMessage("", "MDPW01", "\x03", message[3], "", reply(strings.Join(message[5:], "")))
			case message[2] == "\x04":
				heard(time.Now())
				worker.SendMessage(heartbeatFrames)
			}
		}
	})
	s.t.Cleanup(func() { stopped.Store(true) })
	s.waitForService(service)
}

func clientsTakeLittleMemory(t *testing.T) {
	const attackers = 3 // two of them have all of --max-memory between them
	long := func(i int) string { return fmt.Sprintf("%0100d", i) }
	longest := func(i int) string { return fmt.Sprintf("%0254d", i) } // name of a service
	mebibyte := strings.Repeat("x", 1<<20)
	stacks := func(a *attacker, count int, frame func(i int) string) {
		for i := range count {
			a.send(1, append(slices.Repeat([]string{frame(i)}, 14), "", "MDPC01", "absent", "x")...)
		}
	}
	for _, attack := range []struct {
		name    string
		prepare func(s *system)
		run     func(a *attacker)
		replies int // that the worker of the attackers sends to each of them
	}{
		{"metrics of 1,000 services", func(s *system) {
			names := s.newAttacker("names")
			for i := range 1000 {
				names.send(1, "", "MDPC01", longest(i))
			}
			if err := names.finish(); err != nil {
				s.t.Fatal(err)
			}
			s.waitForService("names")
		}, func(a *attacker) { a.send(3000, "", "MDPC01", "mmi.metrics") }, 0},
		{"names that are too long", nil, func(a *attacker) { a.send(60, "", "MDPC01", mebibyte, "x") }, 0},
		{"many names", nil, func(a *attacker) {
			for i := range 40_000 {
				a.send(1, "", "MDPC01", longest(i))
			}
			a.send(10, "", "MDPC01", "mmi.metrics")
		}, 0},
		{"long replies", func(s *system) {
			s.startWorker("long", func(string) string { return mebibyte }, func(time.Time) {})
		}, func(a *attacker) { a.send(60, "", "MDPC01", "long") }, 60},
		{"short requests", nil, func(a *attacker) { a.send(150_000, "", "MDPC01", "absent", "x") }, 0},
		{"address stacks of short frames", nil, func(a *attacker) { stacks(a, 20_000, strconv.Itoa) }, 0},
		{"address stacks of long frames", nil, func(a *attacker) { stacks(a, 8000, long) }, 0},
	} {
		t.Run(attack.name, func(t *testing.T) {
			s := newSystem(t, "--max-memory", "64M", "--max-queue", "1000000", "--liveness", "50")
			s.start("echoworker", "echo")
			s.waitForService("echo")
			if attack.prepare != nil {
				attack.prepare(s)
			}
			sent := make(chan error)
			for i := range attackers {
				a := s.newAttacker(fmt.Sprint("attacker", i))
				go func() {
					attack.run(a)
					sent <- a.finish()
				}()
			}
			for range attackers {
				if err := <-sent; err != nil {
					t.Error(err)
				}
			}
			for i := range attackers {
				s.waitForService(fmt.Sprint("attacker", i))
			}
			if attack.replies > 0 {
				s.waitForMetric("backbone_replies_total", attackers*attack.replies)
			}
			s.expectLittleMemory()
		})
	}
	t.Run("identities", func(t *testing.T) {
		const count = 2000
		s := newSystem(t, "--max-memory", "64M")
		s.waitForMetric("backbone_workers", 0)
		for i := range count {
			a := s.newAttacker(fmt.Sprintf("i%0254d", i))
			a.send(1, "", "MDPC01", "absent", "x")
			if err := a.out.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		s.waitForMetric("backbone_requests_total", count)
		s.expectLittleMemory()
	})
}

// expectLittleMemory checks that a broker with --max-memory 64M never had more than 64 MiB beyond.
func (s *system) expectLittleMemory() {
	s.t.Helper()
	peak := processMemory(s.t, s.broker.Process.Pid, "VmHWM")
	s.t.Logf("the peak was %d MiB", peak>>20)
	if peak > 128<<20 {
		s.t.Errorf("the peak of bbroker was %d MiB", peak>>20)
	}
}

// A delay is what a worker and a client saw of a broker while it was attacked.
type delay struct {
	heartbeat time.Duration // the longest time from a heartbeat to the next, beyond the interval
	request   time.Duration // the longest time from a request to its reply
}

// An observer is a worker and a client. The service of the worker is echo.
type observer struct {
	s         *system
	client    peer
	interval  time.Duration
	heartbeat atomic.Int64 // as in delay
}

// observe starts an observer of a broker that sends heartbeats at an interval.
func (s *system) observe(interval time.Duration) *observer {
	s.t.Helper()
	o := &observer{s: s, client: connectPeer(s.t, zmq.DEALER, s.endpoint), interval: interval}
	var last time.Time
	s.startWorker("echo", func(body string) string { return body }, func(now time.Time) {
		if late := int64(now.Sub(last) - interval); !last.IsZero() && late > o.heartbeat.Load() {
			o.heartbeat.Store(late)
		}
		last = now
	})
	return o
}

// until sends requests, one at a time, until the reply to one for a service shows that an attack has
// ended. It returns the longest delays since the last call.
func (o *observer) until(service, body string, ended func(reply string) bool) delay {
	o.s.t.Helper()
	var d delay
	request := func(service, body string) string {
		begin := time.Now()
		o.client.send("", "MDPC01", service, body)
		reply := o.client.recv()
		d.request = max(d.request, time.Since(begin))
		return reply[3]
	}
	for limit := time.Now().Add(60 * time.Second); !ended(request(service, body)); {
		if reply := request("echo", "x"); reply != "x" {
			o.s.t.Fatalf("echo replied %q", reply)
		}
		if time.Now().After(limit) {
			o.s.t.Fatal("the attack did not end")
		}
	}
	d.heartbeat = time.Duration(o.heartbeat.Swap(0))
	return d
}

// untilRefused sends requests until the broker refuses one, and returns how long that took.
func (o *observer) untilRefused() time.Duration {
	o.s.t.Helper()
	for begin := time.Now(); ; {
		o.client.send("", "MDPC01", "echo", "x")
		if reply := o.client.recv(); len(reply) > 4 {
			return time.Since(begin)
		}
	}
}

func attacksHoldUpNobody(t *testing.T) {
	const interval = 200 * time.Millisecond
	const waiting = 100_000
	served := func(reply string) bool { return reply == mmiFound }
	sendWaiting := func(a *attacker) { a.send(waiting, "", "MDPC01", "absent", "x") }
	for _, attack := range []struct {
		name    string
		flags   []string
		waiting int // requests that prepare sends and that wait then
		prepare func(a *attacker)
		round   func(a *attacker)
		endless bool // there is another round after each
		reads   bool // its replies; it takes long if they are long
		// A request, and whether its reply shows that the first round was read.
		service, body string
		read          func(reply string) bool
	}{
		{"metrics of 1,000 services", []string{"--max-memory", "64M"}, 1000,
			func(a *attacker) {
				for i := range 1000 {
					a.send(1, "", "MDPC01", fmt.Sprintf("%0250d", i))
				}
			},
			func(a *attacker) { a.send(2000, "", "MDPC01", "mmi.metrics") },
			true, false, "mmi.service", "attacker", served},
		{"cancellation of nothing", nil, waiting,
			func(a *attacker) { a.send(waiting, "waiting", "", "MDPC01", "absent", "x") },
			func(a *attacker) { a.send(20_000, "other", "", "MDPC01", "mmi.cancel") },
			true, true, "mmi.service", "attacker", served},
		{"cancellation", nil, 0, nil,
			func(a *attacker) {
				sendWaiting(a)
				a.send(1, "", "MDPC01", "mmi.cancel")
			},
			true, true, "mmi.service", "attacker", served},
		{"expiry", []string{"--queue-ttl", "1s"}, 0, nil, sendWaiting, false, true, "mmi.metrics", "",
			func(metrics string) bool {
				return strings.Contains(metrics, fmt.Sprintf("\nbackbone_expired_total %d\n", waiting))
			}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			s := newSystem(t, append([]string{"--heartbeat", interval.String(), "--liveness", "50", "--grace", "1s",
				"--max-queue", strconv.Itoa(2 * waiting), "--max-memory", "4G"}, attack.flags...)...)
			o := s.observe(interval)
			a := s.newAttacker("attacker")
			if attack.reads {
				go io.Copy(io.Discard, a)
			}
			if attack.prepare != nil {
				attack.prepare(a)
				if err := a.out.Flush(); err != nil {
					t.Fatal(err)
				}
				s.waitForMetric("backbone_queue_length", attack.waiting)
			}
			requests := 0
			before := o.until("echo", "x", func(string) bool { requests++; return requests > 100 })

			begin := time.Now()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				attack.round(a)
				for err := a.finish(); err == nil && attack.endless; err = a.out.Flush() {
					attack.round(a)
				}
			}()
			during := o.until(attack.service, attack.body, attack.read)
			took := time.Since(begin)
			if !attack.endless {
				<-ended
				attack.round(a)
				a.out.Flush()
			}
			s.broker.signal(syscall.SIGTERM)
			heeded := o.untilRefused()
			s.broker.waitForExit()
			a.Close()
			<-ended
			t.Logf("%v; requests took %v before and %v meanwhile, heartbeats were %v late before and %v meanwhile, SIGTERM was heeded after %v",
				took, before.request, during.request, before.heartbeat, during.heartbeat, heeded)
			// Other programs may have the processor meanwhile: the limit is far above what is usual, and
			// far below what an attack that has an effect takes.
			const limit = 2 * time.Second
			if during.request > limit || during.heartbeat > limit || heeded > limit {
				t.Error("the attack held up others")
			}
		})
	}
}

func longQueueOfOneClientKeepsNobodyOut(t *testing.T) {
	const length = 100_000 // the default of --max-queue
	s := newSystem(t)
	worker := connectPeer(t, zmq.DEALER, s.endpoint)
	worker.send("", "MDPW01", "\x01", "work")
	serve := func() (body string) {
		t.Helper()
		request := worker.recvSkipping(heartbeatFrames...)
		worker.want(request, "", "MDPW01", "\x02", request[3], "", request[5])
		worker.send("", "MDPW01", "\x03", request[3], "", request[5])
		return request[5]
	}
	s.waitForService("work")

	greedy := s.newAttacker("greedy")
	greedy.send(length+2, "", "MDPC01", "work", "greedy") // one is with the worker, one too many
	if err := greedy.out.Flush(); err != nil {
		t.Fatal(err)
	}
	s.waitForMetric("backbone_requests_total", length+2)
	if waiting, refused := s.metric("backbone_queue_length"), s.metric("backbone_refused_total"); waiting != length || refused != 1 {
		t.Errorf("%d requests wait and %d were refused, want %d and 1", waiting, refused, length)
	}

	other := connectPeer(t, zmq.DEALER, s.endpoint)
	other.send("", "MDPC01", "work", "other")
	s.waitForMetric("backbone_queue_length", length+1)
	var served []string
	for range 3 {
		served = append(served, serve())
	}
	// The other client came when the first one was next.
	if !slices.Equal(served, []string{"greedy", "greedy", "other"}) {
		t.Errorf("served were %q", served)
	}
	other.want(other.recv(), "", "MDPC01", "work", "other")

	greedy.Close()
	begin := time.Now()
	s.waitForMetric("backbone_queue_length", 0)
	t.Logf("dropped after %v", time.Since(begin))
	// The first two have ended, and the worker has the third.
	if dropped := s.metric("backbone_abandoned_total"); dropped != length-2 {
		t.Errorf("%d requests were dropped, want %d", dropped, length-2)
	}
	other.send("", "MDPC01", "work", "other")
	s.waitForMetric("backbone_queue_length", 1)
	if first, second := serve(), serve(); first != "greedy" || second != "other" {
		t.Errorf("served were %q and %q", first, second)
	}
}
