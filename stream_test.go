package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// Streams through all three tools, and their faults.

// stream starts brequest --stream. What it prints goes to the file out.
func (s *system) stream(args ...string) *childProcess {
	s.t.Helper()
	return s.start("sh", append([]string{"-c", `exec brequest --stream "$@" >out`, "sh"}, args...)...)
}

// output returns what was printed to the file out so far.
func (s *system) output() string {
	content, _ := os.ReadFile(filepath.Join(s.dir, "out"))
	return string(content)
}

// waitForOutput waits until the file out begins with what is wanted.
func (s *system) waitForOutput(want string) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.HasPrefix(s.output(), want); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("the output is %.99q, want %.99q", s.output(), want)
		}
	}
}

// waitForStandstill waits until the broker passes nothing on any more, and returns the number of bytes so far.
func (s *system) waitForStandstill() int {
	s.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for last, same := 0, 0; ; time.Sleep(10 * time.Millisecond) {
		passed := s.metric("backbone_service_reply_bytes_total{service=\"seq\"}")
		if same++; passed != last || passed == 0 {
			last, same = passed, 0
		}
		if same == 20 {
			return passed
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the stream does not stop")
		}
	}
}

// counted returns the output of seq 1 LAST.
func counted(last int) []byte {
	var lines bytes.Buffer
	for i := 1; i <= last; i++ {
		lines.Write(append(strconv.AppendInt(lines.AvailableBuffer(), int64(i), 10), '\n'))
	}
	return lines.Bytes()
}

// newHangingStream returns a system, its service, and a request whose stream has begun. The stream stands still until
// release is called.
func newHangingStream(t *testing.T) (s *system, service, request *childProcess, release func()) {
	t.Helper()
	s, release = newHangingSystem(t)
	service = s.startShellService("hang", "echo begun; "+hang)
	request = s.stream("hang", "x")
	s.waitForOutput("begun\n")
	return s, service, request, release
}

func TestStreamOfAKilledServiceFailsAndWhatWasPrintedStays(t *testing.T) {
	t.Parallel()
	s, service, request, _ := newHangingStream(t)
	service.signal(syscall.SIGKILL)
	request.waitForLines(1, "bbroker: hang: the worker was lost")
	if got := request.waitForExit(); got != exitUnavailable || s.output() != "begun\n" {
		t.Errorf("status %d, output %q", got, s.output())
	}
}

func TestStreamOfAKilledBrokerFailsAndItsCommandEnds(t *testing.T) {
	t.Parallel()
	s, service, request, _ := newHangingStream(t)
	s.broker.signal(syscall.SIGKILL)
	request.waitForLines(1, "brequest: hang: lost the broker")
	if got := request.waitForExit(); got != exitUnavailable || s.output() != "begun\n" {
		t.Errorf("status %d, output %q", got, s.output())
	}
	service.waitForLines(1, "request cancelled")
	s.expectNoDescendants()
	s.broker = s.start("bbroker", "--heartbeat", "100ms")
	service.waitForLines(1, "service connected")
}

func TestStreamGoesOnWhileItsBrokerAndItsServiceStop(t *testing.T) {
	t.Parallel()
	s, service, request, release := newHangingStream(t)
	s.broker.signal(syscall.SIGTERM)
	s.broker.waitForLines(1, "broker stopping")
	service.signal(syscall.SIGTERM)
	service.waitForLines(1, "waiting for a command")
	release()
	if got := request.waitForExit(); got != 0 || s.output() != "begun\ndone" {
		t.Errorf("status %d, output %q", got, s.output())
	}
	if broker, service := s.broker.waitForExit(), service.waitForExit(); broker != 0 || service != 0 {
		t.Errorf("the broker ended with %d, the service with %d", broker, service)
	}
}

func TestClientThatGoesAwayEndsTheCommandOfItsStream(t *testing.T) {
	for name, end := range map[string]struct {
		flags  []string
		signal syscall.Signal
		status int
	}{
		"Ctrl-C":  {nil, syscall.SIGINT, 128 + int(syscall.SIGINT)},
		"SIGTERM": {nil, syscall.SIGTERM, 128 + int(syscall.SIGTERM)},
		"SIGKILL": {nil, syscall.SIGKILL, 128 + int(syscall.SIGKILL)},
		"silence": {[]string{"--timeout", "300ms"}, 0, exitTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := newHangingSystem(t)
			service := s.startShellService("hang", hang)
			request := s.stream(append(end.flags, "hang", "x")...)
			s.waitForRuns(1)
			if end.signal != 0 {
				request.signal(end.signal)
			}
			if got := request.waitForExit(); got != end.status {
				t.Errorf("status %d, want %d", got, end.status)
			}
			s.expectNoDescendants()
			service.waitForLines(1, "request cancelled")
			s.waitForMetric("backbone_cancelled_total", 1)
			s.waitForMetric("backbone_idle_workers", 1)
		})
	}
}

func TestReaderThatGoesAwayEndsTheCommand(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.startShellService("yes", `exec yes "$@"`)
	request := s.start("sh", "-c", "brequest --stream yes x | head -1 >out")
	if got := request.waitForExit(); got != 0 || s.output() != "x\n" {
		t.Errorf("status %d, output %q", got, s.output())
	}
	s.expectNoDescendants()
	s.waitForMetric("backbone_cancelled_total", 1)
}

func TestCancelEndsTheCommandsOfPlainRequestsAndOnlyThen(t *testing.T) {
	for name, end := range map[string]struct {
		flags  []string
		signal syscall.Signal
	}{
		"SIGTERM": {nil, syscall.SIGTERM},
		"SIGKILL": {nil, syscall.SIGKILL},
		"timeout": {[]string{"--timeout", "300ms"}, 0},
	} {
		for _, cancel := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " with --cancel=", cancel), func(t *testing.T) {
				t.Parallel()
				s, release := newHangingSystem(t)
				service := s.start("bservice", fmt.Sprint("--cancel=", cancel), "--heartbeat", "100ms", "hang", "sh", "-c", hang+"; echo finished >>runs", "sh")
				request := s.start("brequest", append(end.flags, "hang", "x")...)
				s.waitForRuns(1)
				if end.signal != 0 {
					request.signal(end.signal)
				}
				request.waitForExit()
				if cancel {
					s.expectNoDescendants()
					service.waitForLines(1, "request cancelled")
					s.waitForMetric("backbone_cancelled_total", 1)
					return
				}
				release()
				s.waitForRuns(2) // The second word is "finished".
				if n := s.metric("backbone_cancelled_total"); n != 0 {
					t.Errorf("%d requests were cancelled", n)
				}
			})
		}
	}
}

func TestClientThatStopsReadingHoldsTheCommandBackAndGetsEveryByte(t *testing.T) {
	t.Parallel()
	s, release := newHangingSystem(t)
	s.startShellService("echo", `printf %s "$1"`)
	s.startShellService("seq", "echo begun; "+hang+`; exec seq 1 "$1"`)
	const last = 1_500_000
	request := s.stream("seq", fmt.Sprint(last))
	s.waitForOutput("begun\n")
	request.signal(syscall.SIGSTOP)
	release()
	passed := s.waitForStandstill()
	s.expect("echo", []string{"x"}, "x") // Others do not notice.
	want := slices.Concat([]byte("begun\ndone"), counted(last))
	if passed >= len(want) {
		t.Fatal("the command was not held back")
	}
	request.signal(syscall.SIGCONT)
	if got := request.waitForExit(); got != 0 || s.output() != string(want) {
		t.Errorf("status %d; %d bytes, want %d", got, len(s.output()), len(want))
	}
}

func TestForeignClientThatGrantsNoCreditGetsAStreamAsItReads(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.start("bservice", "--heartbeat", "100ms", "--max-output", "0", "seq", "seq", "1")
	s.waitForMetric("backbone_workers", 1)
	client := newPeer(t, zmq.DEALER)
	if err := client.SetRcvhwm(2); err != nil {
		t.Fatal(err)
	}
	if err := client.Connect(s.endpoint); err != nil {
		t.Fatal(err)
	}
	const last = 1_500_000
	client.send("MDPC02", "\x01", "seq", fmt.Sprint(last))
	want := counted(last)
	if passed := s.waitForStandstill(); passed >= len(want) {
		t.Fatal("the command was not held back")
	}
	var got bytes.Buffer
	for {
		message := client.recv()
		got.WriteString(message[3])
		if message[1] == "\x03" {
			client.want(message[:3], "MDPC02", "\x03", "seq")
			break
		}
		client.want(message[:3], "MDPC02", "\x02", "seq")
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes came, want %d", got.Len(), len(want))
	}
}

// Raw sockets spell the frames of both RFCs out.
func TestClientsAndWorkersOfBothVersionsMeetAtOneBroker(t *testing.T) {
	endpoint := startBroker(t, time.Second)
	for name, worker := range map[string]struct{ ready, request, reply []string }{
		"0.1": {[]string{"", "MDPW01", "\x01"}, []string{"", "MDPW01", "\x02"}, []string{"", "MDPW01", "\x03"}},
		"0.2": {[]string{"MDPW02", "\x01"}, []string{"MDPW02", "\x02"}, []string{"MDPW02", "\x04"}},
	} {
		w := connectPeer(t, zmq.DEALER, endpoint)
		w.send(append(worker.ready, "echo "+name)...)
		for client, spelled := range map[string]struct{ request, part, reply []string }{
			"0.1": {[]string{"", "MDPC01"}, nil, []string{"", "MDPC01"}},
			"0.2": {[]string{"MDPC02", "\x01"}, []string{"MDPC02", "\x02"}, []string{"MDPC02", "\x03"}},
		} {
			t.Run("client "+client+", worker "+name, func(t *testing.T) {
				c := connectPeer(t, zmq.DEALER, endpoint)
				c.send(append(spelled.request, "echo "+name, "hello")...)
				var request []string
				for ok := false; !ok; { // Heartbeats may come before.
					request = w.recv()
					ok = len(request) == len(worker.request)+3
				}
				token := request[len(worker.request)]
				w.want(request, append(append([]string{}, worker.request...), token, "", "hello")...)
				parts := []string{}
				if name == "0.2" {
					w.send("MDPW02", "\x03", token, "", "one")
					parts = []string{"one"}
				}
				w.send(append(append([]string{}, worker.reply...), token, "", "bye")...)
				if client == "0.2" && name == "0.2" {
					c.want(c.recv(), append(append([]string{}, spelled.part...), "echo "+name, "one")...)
					parts = nil
				}
				c.want(c.recv(), append(append(append(append([]string{}, spelled.reply...), "echo "+name), parts...), "bye")...)
			})
		}
	}
}
