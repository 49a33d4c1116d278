package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
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

// frames returns a message with the given frames.
func frames(spelled ...string) [][]byte {
	message := make([][]byte, len(spelled))
	for i, frame := range spelled {
		message[i] = []byte(frame)
	}
	return message
}

// spell is the inverse of frames.
func spell(message [][]byte) []string {
	spelled := make([]string, len(message))
	for i, frame := range message {
		spelled[i] = string(frame)
	}
	return spelled
}

// toWorker returns a REQUEST as the broker sends it to a worker.
func toWorker(identity, token string, body ...string) []string {
	return append([]string{identity, "", "MDPW01", "\x02", token, ""}, body...)
}

func heartbeatTo(identity string) []string  { return []string{identity, "", "MDPW01", "\x04"} }
func disconnectTo(identity string) []string { return []string{identity, "", "MDPW01", "\x05"} }

var heartbeatFrames = []string{"", "MDPW01", "\x04"}

// A peer is a raw ZeroMQ socket of a test. Its methods fail the test after an error or ten seconds.
type peer struct {
	*zmq.Socket
	t testing.TB
}

func newPeer(t testing.TB, kind zmq.Type) peer {
	t.Helper()
	socket, err := zmq.NewSocket(kind)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	if err := errors.Join(socket.SetLinger(0), socket.SetRcvtimeo(10*time.Second), socket.SetSndtimeo(10*time.Second)); err != nil {
		t.Fatal(err)
	}
	return peer{socket, t}
}

func connectPeer(t testing.TB, kind zmq.Type, endpoint string) peer {
	t.Helper()
	p := newPeer(t, kind)
	if err := p.Connect(endpoint); err != nil {
		t.Fatal(err)
	}
	return p
}

// freePort returns a TCP port that nobody listened on just now.
func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}

// bindPeer returns a ROUTER to act as a broker, and its endpoint.
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

func (p peer) send(spelled ...string) {
	p.t.Helper()
	if _, err := p.SendMessage(frames(spelled...)); err != nil {
		p.t.Fatal(err)
	}
}

func (p peer) recv() []string {
	p.t.Helper()
	message, err := p.RecvMessageBytes(0)
	if err != nil {
		p.t.Fatalf("receive: %v", err)
	}
	return spell(message)
}

// recvSkipping returns the next message that is not equal to skip.
func (p peer) recvSkipping(skip ...string) []string {
	p.t.Helper()
	for {
		if message := p.recv(); !reflect.DeepEqual(message, skip) {
			return message
		}
	}
}

// nextFromWorker returns the next message that is not a heartbeat, and the identity of the worker
// that sent it.
func (p peer) nextFromWorker() (identity string, message []string) {
	p.t.Helper()
	for {
		message := p.recv()
		if !reflect.DeepEqual(message[1:], heartbeatFrames) {
			return message[0], message[1:]
		}
	}
}

// want fails the test unless got and want are equal.
func (p peer) want(got []string, want ...string) {
	p.t.Helper()
	if !reflect.DeepEqual(got, want) {
		p.t.Fatalf("got %q, want %q", got, want)
	}
}

// inBackground runs use in another goroutine. The socket is not closed before use has returned:
// ZeroMQ crashes if two threads use a socket at the same time.
func (p peer) inBackground(use func()) {
	ended := make(chan struct{})
	p.t.Cleanup(func() { <-ended })
	go func() {
		defer close(ended)
		use()
	}()
}

// answerOnce receives one request in the background and sends the answer that reply returns, if any.
// Then it delivers the request, or closes the channel if none was received. It ignores mmi.cancel.
func answerOnce(broker peer, reply func(request []string) []string) <-chan []string {
	received := make(chan []string, 1)
	broker.inBackground(func() {
		request, err := broker.RecvMessageBytes(0)
		for err == nil && string(request[3]) == "mmi.cancel" {
			request, err = broker.RecvMessageBytes(0)
		}
		if err != nil {
			close(received)
			return
		}
		if answer := reply(spell(request)); answer != nil {
			broker.SendMessage(frames(answer...))
		}
		received <- spell(request)
	})
	return received
}

// dialZMTP connects to an address, HOST:PORT or the path of a socket, and shakes hands as a DEALER
// without an identity, without libzmq: ZMTP 3.0, mechanism NULL.
func dialZMTP(address string) (net.Conn, error) { return dialZMTPAs("", address) }

// dialZMTPAs does the same with an identity.
func dialZMTPAs(identity, address string) (net.Conn, error) {
	return dialZMTPWith(address, "Identity", identity)
}

// zmtpGreeting returns the greeting of a client of ZMTP 3.0.
func zmtpGreeting(mechanism string) []byte {
	greeting := make([]byte, 64)
	greeting[0], greeting[9], greeting[10] = 0xff, 0x7f, 3
	copy(greeting[12:], mechanism)
	return greeting
}

// dialZMTPWith does the same with properties of any name: names and values in turn.
func dialZMTPWith(address string, properties ...string) (net.Conn, error) {
	network := "tcp"
	if filepath.IsAbs(address) {
		network = "unix"
	}
	conn, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	ready := []byte("\x05READY")
	for pair := range slices.Chunk(append([]string{"Socket-Type", "DEALER"}, properties...), 2) {
		ready = append(append(ready, byte(len(pair[0]))), pair[0]...)
		ready = append(binary.BigEndian.AppendUint32(ready, uint32(len(pair[1]))), pair[1]...)
	}
	greeting := zmtpGreeting("NULL")
	conn.Write(greeting)
	if _, err := io.ReadFull(conn, make([]byte, len(greeting))); err != nil {
		return nil, err
	}
	conn.Write(append(binary.BigEndian.AppendUint64([]byte{6}, uint64(len(ready))), ready...))
	theirs := make([]byte, 2)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return nil, err
	}
	_, err = io.ReadFull(conn, make([]byte, theirs[1]))
	return conn, err
}

// encodeZMTP returns a message as it is sent over a connection.
func encodeZMTP(frames ...string) []byte {
	var encoded []byte
	for i, frame := range frames {
		flags := byte(0)
		if i < len(frames)-1 {
			flags |= 1 // more frames follow
		}
		if len(frame) > 255 {
			encoded = binary.BigEndian.AppendUint64(append(encoded, flags|2), uint64(len(frame)))
		} else {
			encoded = append(encoded, flags, byte(len(frame)))
		}
		encoded = append(encoded, frame...)
	}
	return encoded
}

// A fakeRouter is a broker without a socket: it records what the broker sends, and its clock goes
// only when told to.
type fakeRouter struct {
	*Broker
	t      *testing.T
	sent   [][]string       // since the last call of expect
	failed map[string]error // of sends, by identity
	record func(frames [][]byte) error
	queues map[string]*fakeQueue // by identity
	bytes  map[int]uint64        // received, by connection
	log    strings.Builder
	clock  time.Time

	happened func() // to connections, of which the broker has not been told
}

// A fakeQueue is what a peer has not read, as far as a test says so.
type fakeQueue struct{ bytes, low size }

func (q *fakeQueue) size() size      { return q.bytes }
func (q *fakeQueue) notify(low size) { q.low = low }
func (q *fakeQueue) close()          {}

func (r *fakeRouter) send(frames [][]byte, queue peerQueue) error {
	if q, ok := queue.(*fakeQueue); ok {
		r.queues[string(frames[0])] = q
	}
	return r.record(frames)
}

func (r *fakeRouter) updateConnections() {
	if r.happened != nil {
		r.happened()
		r.happened = nil
	}
}

func (r *fakeRouter) newQueue() peerQueue { return &fakeQueue{} }

func (r *fakeRouter) queued() (n size) {
	for _, q := range r.queues {
		n += q.bytes
	}
	return n
}

func (r *fakeRouter) received(source int) uint64 { return r.bytes[source] }

var testFlags = brokerFlags{
	heartbeatFlags: heartbeatFlags{Heartbeat: time.Second, Liveness: 5},
	QueueTTL:       time.Minute,
	MaxQueue:       10,
	MaxMemory:      1 << 20,
}

func newFakeRouter(t *testing.T) *fakeRouter {
	r := &fakeRouter{t: t, failed: map[string]error{}, queues: map[string]*fakeQueue{}, bytes: map[int]uint64{}, clock: time.Unix(0, 0)}
	r.record = func(frames [][]byte) error {
		if err := r.failed[string(frames[0])]; err != nil {
			return err
		}
		r.sent = append(r.sent, spell(frames))
		return nil
	}
	r.Broker = NewBroker(testFlags, r.clock, r, slog.New(slog.NewTextHandler(&r.log, nil)))
	r.Tick(r.clock)
	return r
}

// from lets the broker receive a message. The first frame is the identity of the sender.
func (r *fakeRouter) from(spelled ...string) {
	r.t.Helper()
	r.Receive(frames(spelled...), sender{source: -1}, r.clock)
}

// pass advances the clock by n heartbeat intervals.
func (r *fakeRouter) pass(n int) {
	for range n {
		r.clock = r.clock.Add(time.Second)
		r.Tick(r.clock)
	}
}

// expect checks the messages sent since its last call, in order. A wanted frame "*" matches any
// frame. expect returns the frames matched in this way.
func (r *fakeRouter) expect(want ...[]string) (wild []string) {
	r.t.Helper()
	if len(r.sent) != len(want) {
		r.t.Fatalf("the broker sent %q, want %q", r.sent, want)
	}
	for i := range want {
		if len(r.sent[i]) != len(want[i]) {
			r.t.Fatalf("the broker sent %q, want %q", r.sent[i], want[i])
		}
		for j, frame := range want[i] {
			if frame == "*" {
				wild = append(wild, r.sent[i][j])
			} else if frame != r.sent[i][j] {
				r.t.Fatalf("the broker sent %q, want %q", r.sent[i], want[i])
			}
		}
	}
	r.sent = nil
	return wild
}

// expectLog checks that count lines of the log contain all of the words.
func (r *fakeRouter) expectLog(count int, words ...string) {
	r.t.Helper()
	n := 0
	for line := range strings.Lines(r.log.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	if n != count {
		r.t.Errorf("%d lines of the log contain %q, want %d:\n%s", n, words, count, &r.log)
	}
}

var errGone = errors.New("no route to host")

// startBroker runs a broker in this process until the end of the test. It returns the endpoint.
func startBroker(t testing.TB, heartbeat time.Duration) (endpoint string) {
	t.Helper()
	router, bound, err := listen([]string{"tcp://127.0.0.1:0"}, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	stop, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		flags := testFlags
		flags.heartbeatFlags = heartbeatFlags{Heartbeat: heartbeat, Liveness: 100}
		err := runBroker(stop, router, flags, time.Second, nil, noLog)
		router.Close()
		ended <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the broker ended with %v", err)
		}
	})
	return bound[0]
}

// newService returns a service with one broker and one job, without a log.
func newService(name, endpoint string, answer func(token string, body [][]byte) Reply) *Service {
	handler := func(r Request) Reply { return answer(r.Token, r.Body) }
	s := &Service{Name: name, Broker: brokerAddress{endpoint: endpoint}, Slots: newSlots(handler)}
	s.logTo(noLog, true, false)
	return s
}

// startService runs the service echo in this process until stop is called or the test ends.
func startService(t testing.TB, endpoint string, answer func(token string, body [][]byte) Reply) (stop func()) {
	t.Helper()
	return serve(t, newService("echo", endpoint, answer))
}

// serve does the same with a service.
func serve(t testing.TB, s *Service) (stop func()) {
	t.Helper()
	s.heartbeatFlags = heartbeatFlags{Heartbeat: 50 * time.Millisecond, Liveness: 100}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		ended <- nil // for the next call
	}
	t.Cleanup(stop)
	return stop
}

// newBatchClient returns a client that can have many requests in flight.
func newBatchClient(t *testing.T, endpoint string) *Client {
	client := NewClient(context.Background(), endpoint)
	client.Correlate()
	t.Cleanup(client.Disconnect)
	return client
}

// beginCalls begins a call of the service echo for each body.
func beginCalls(client *Client, timeout time.Duration, bodies ...string) []*call {
	var calls []*call
	for _, body := range bodies {
		c := &call{service: "echo", body: frames(body), timeout: timeout}
		client.Begin(c)
		calls = append(calls, c)
	}
	return calls
}

// awaitAll waits until all the calls have ended.
func awaitAll(t *testing.T, client *Client, calls []*call) {
	t.Helper()
	limit := time.Now().Add(20 * time.Second)
	for slices.ContainsFunc(calls, func(c *call) bool { return !c.ended }) {
		if _, err := client.Await(limit); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(limit) {
			t.Fatal("some calls did not end")
		}
	}
}

// fileWith returns a new file with the given content, open at its start.
func fileWith(t *testing.T, content string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func newFifo(t *testing.T) string {
	t.Helper()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return fifo
}

// noLog is for those whose log does not matter.
var noLog = slog.New(slog.DiscardHandler)

// toStderr writes to what is standard error at the time.
type toStderr struct{}

func (toStderr) Write(p []byte) (int, error) { return os.Stderr.Write(p) }

// captureStderr runs f and returns what this process writes to standard error meanwhile.
func captureStderr(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	defer func(stderr *os.File) { os.Stderr = stderr }(os.Stderr)
	os.Stderr = file
	f()
	written, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(written)
}

// A childProcess is a program that a test started.
type childProcess struct {
	*exec.Cmd
	t     testing.TB
	lines chan string // of standard error; dropped when full
	ended chan struct{}
}

// start starts a program in dir that uses the broker at endpoint. It is killed at the end of the
// test.
func start(t testing.TB, dir, endpoint, name string, args ...string) *childProcess {
	t.Helper()
	p := &childProcess{Cmd: exec.Command(name, args...), t: t, lines: make(chan string, 1<<16), ended: make(chan struct{})}
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

func scanLines(r io.Reader, each func(string)) {
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		each(scanner.Text())
	}
}

// waitForLines reads standard error until n lines have matched the pattern.
func (p *childProcess) waitForLines(n int, pattern string) {
	p.t.Helper()
	match := regexp.MustCompile(pattern)
	for deadline := time.After(20 * time.Second); n > 0; {
		select {
		case line := <-p.lines:
			if match.MatchString(line) {
				n--
			}
		case <-deadline:
			p.t.Fatalf("%v did not print %q", p.Args, pattern)
		}
	}
}

// signal sends a signal to the process, but not to its children.
func (p *childProcess) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// waitForExit waits for the end of the process and returns its exit status.
func (p *childProcess) waitForExit() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatalf("%v did not end", p.Args)
	}
	return exitStatus(p.ProcessState)
}

// processMemory returns a field of /proc/PID/status in bytes, or 0 where there is no such file.
func processMemory(t testing.TB, pid int, field string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	match := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(status)
	kilobytes, _ := strconv.Atoi(string(match[1]))
	return kilobytes << 10
}

// cpuTime returns the CPU time used so far. who is the argument of getrusage(2).
func cpuTime(who int) time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(who, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// A system is a directory with a broker process whose ipc endpoint is in it. The programs of the
// system run in the directory and use the broker.
type system struct {
	t             testing.TB
	dir, endpoint string
	broker        *childProcess
}

// newSystemWithoutBroker returns a system with an endpoint but no broker.
func newSystemWithoutBroker(t testing.TB) *system {
	dir := t.TempDir()
	return &system{t: t, dir: dir, endpoint: "ipc://" + dir + "/broker"}
}

// newSystem returns a system. Its broker has a heartbeat interval of 100 ms unless the flags set
// another.
func newSystem(t testing.TB, flags ...string) *system {
	t.Helper()
	s := newSystemWithoutBroker(t)
	s.broker = s.start("bbroker", append([]string{"--heartbeat", "100ms"}, flags...)...)
	return s
}

// start starts a program of the system.
func (s *system) start(name string, args ...string) *childProcess {
	s.t.Helper()
	return start(s.t, s.dir, s.endpoint, name, args...)
}

// startShellService starts a service that runs a shell command with the frames of the request as its
// arguments. It returns when the service is ready.
func (s *system) startShellService(name, line string) *childProcess {
	s.t.Helper()
	p := s.start("bservice", "--heartbeat", "100ms", name, "sh", "-c", line, "sh")
	p.waitForLines(1, "service connected")
	return p
}

// request sends a request with a client of its own and returns the frames of the reply.
func (s *system) request(name string, body ...string) ([]string, error) {
	client := NewClient(context.Background(), s.endpoint)
	defer client.Disconnect()
	reply, err := client.Send(name, frames(body...), 20*time.Second)
	return spell(reply.Body()), err
}

// expect sends a request and checks its reply.
func (s *system) expect(name string, body []string, want ...string) {
	s.t.Helper()
	if reply, err := s.request(name, body...); err != nil || !slices.Equal(reply, want) {
		s.t.Fatalf("%s %q replied %q, %v, want %q", name, body, reply, err, want)
	}
}

// metric returns the value of a metric of the broker.
func (s *system) metric(name string) int {
	s.t.Helper()
	reply, err := s.request("mmi.metrics")
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

// waitForMetric waits until a metric of the broker has the wanted value.
func (s *system) waitForMetric(name string, want int) {
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

// runs returns the sorted words of a file. Commands append one word to it in each run.
func (s *system) runs(name string) []string {
	return slices.Sorted(slices.Values(s.words(name)))
}

// words returns the words of a file.
func (s *system) words(name string) []string {
	content, _ := os.ReadFile(filepath.Join(s.dir, name))
	return strings.Fields(string(content))
}

// hang is a shell command that appends its argument to the file runs, waits until the file go
// exists, and prints done. It waits by reading from the FIFO tick.
const hang = `echo "$1" >>runs; while [ ! -e go ]; do read x <tick; done; printf done`

// newHangingSystem returns a system for services that run hang. They wait until release is called.
func newHangingSystem(t *testing.T, flags ...string) (s *system, release func()) {
	s = newSystem(t, flags...)
	tick := filepath.Join(s.dir, "tick")
	if err := syscall.Mkfifo(tick, 0o600); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		os.WriteFile(filepath.Join(s.dir, "go"), nil, 0o600)
		// This ends the pending reads. A command that starts later finds the file and does not read.
		if f, err := os.OpenFile(tick, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	})
	t.Cleanup(release)
	return s, release
}

// waitForRuns waits until hang has been started n times.
func (s *system) waitForRuns(n int) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); len(s.runs("runs")) < n; {
		if time.Now().After(deadline) {
			s.t.Fatalf("%d commands were started, want %d", len(s.runs("runs")), n)
		}
		runtime.Gosched()
	}
}

// expectNoDescendants checks that no process runs in the directory of the system except our tools.
func (s *system) expectNoDescendants() {
	s.t.Helper()
	tool, err := exec.LookPath("bservice")
	if err != nil {
		s.t.Fatal(err)
	}
	s.expectNoProcess(func(_ int, exe string) bool { return filepath.Dir(exe) == filepath.Dir(tool) })
}

// expectNoProcess checks that no process runs in the directory of the system except those to keep.
// It waits a few seconds for processes that were just killed.
func (s *system) expectNoProcess(keep func(pid int, exe string) bool) {
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

// pipeline sends count requests to a service, at most 64 at a time, and receives the replies.
func pipeline(t testing.TB, s *system, name string, count int) {
	client := connectPeer(t, zmq.DEALER, s.endpoint)
	for sent, received := 0, 0; received < count; {
		if sent < count && sent-received < 64 {
			client.send("", "MDPC01", name, "x")
			sent++
			continue
		}
		if reply := client.recv(); len(reply) != 4 {
			t.Fatalf("reply %q", reply)
		}
		received++
	}
}

// echoWorker is a helper program: a worker written from RFC 7 that replies with the body of the
// request.
func echoWorker() {
	socket, _ := zmq.NewSocket(zmq.DEALER)
	socket.Connect(os.Getenv("BACKBONE_BROKER"))
	socket.SendMessage("", "MDPW01", "\x01", os.Args[1])
	for {
		message, err := socket.RecvMessageBytes(0)
		if err != nil {
			return
		}
		if string(message[2]) == "\x02" {
			message[2] = []byte("\x03")
		}
		socket.SendMessage(message)
	}
}

// simpleBroker is a helper program: a broker written from RFC 7. It has no mmi services, and the
// address of a client must be one frame. It ignores other messages.
func simpleBroker() {
	socket, _ := zmq.NewSocket(zmq.ROUTER)
	socket.Bind(os.Getenv("BACKBONE_BROKER"))
	poller := zmq.NewPoller()
	poller.Add(socket, zmq.POLLIN)
	workers := map[string]string{}     // services, by identity
	idle := map[string][]string{}      // by service
	waiting := map[string][][][]byte{} // by service
	beat := time.Now()
	for {
		polled, _ := poller.Poll(100 * time.Millisecond)
		if len(polled) > 0 {
			m, err := socket.RecvMessageBytes(0)
			switch {
			case err != nil:
				return
			case len(m) < 4 || len(m[1]) > 0:
			case string(m[2]) == "MDPC01":
				waiting[string(m[3])] = append(waiting[string(m[3])], m)
			case string(m[2]) == "MDPW01" && m[3][0] == 1 && len(m) == 5:
				workers[string(m[0])] = string(m[4])
				idle[string(m[4])] = append(idle[string(m[4])], string(m[0]))
			case string(m[2]) == "MDPW01" && m[3][0] == 3 && len(m) > 5 && len(m[5]) == 0:
				service := workers[string(m[0])]
				socket.SendMessage(m[4], "", "MDPC01", service, m[6:])
				idle[service] = append(idle[service], string(m[0]))
			}
		}
		for service, requests := range waiting {
			for len(requests) > 0 && len(idle[service]) > 0 {
				m, worker := requests[0], idle[service][0]
				requests, idle[service] = requests[1:], idle[service][1:]
				socket.SendMessage(worker, "", "MDPW01", "\x02", m[0], "", m[4:])
			}
			waiting[service] = requests
		}
		if time.Since(beat) > time.Second {
			beat = time.Now()
			for worker := range workers {
				socket.SendMessage(worker, "", "MDPW01", "\x04")
			}
		}
	}
}

// garbageServer is a helper program: it answers each message with one that is not MDP.
func garbageServer() {
	socket, _ := zmq.NewSocket(zmq.ROUTER)
	socket.Bind(os.Args[1])
	for {
		message, err := socket.RecvMessageBytes(0)
		if err != nil {
			return
		}
		socket.SendMessage(message[0], "", "babble")
	}
}

// garbageClient is a helper program: it sends messages that are not MDP, and then a request. When it
// has the reply, the broker has read them all.
func garbageClient() {
	socket, _ := zmq.NewSocket(zmq.DEALER)
	socket.Connect(os.Getenv("BACKBONE_BROKER"))
	for range 10 {
		socket.SendMessage("babble")
	}
	socket.SendMessage("", "MDPC01", "mmi.service", "x")
	socket.RecvMessage(0)
}

// workerFleet is a helper program: it registers many workers at a TCP address, without libzmq. For
// each byte on standard input it sends a heartbeat of each worker. It discards what it receives.
func workerFleet() {
	n, _ := strconv.Atoi(os.Args[2])
	fleet := make([]net.Conn, n)
	for i := range fleet {
		conn, err := dialZMTP(os.Args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, "workerfleet:", err)
			os.Exit(1)
		}
		conn.Write([]byte("\x01\x00\x01\x06MDPW01\x01\x01\x01\x00\x04echo"))
		go io.Copy(io.Discard, conn)
		fleet[i] = conn
	}
	for one := make([]byte, 1); ; {
		if _, err := os.Stdin.Read(one); err != nil {
			return
		}
		for _, conn := range fleet {
			conn.Write([]byte("\x01\x00\x01\x06MDPW01\x00\x01\x04"))
		}
	}
}
