package main

import (
	"bufio"
	"context"
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

// A fakeRouter is a broker without a socket: it records what the broker sends, and
// its clock goes only when told to.
type fakeRouter struct {
	*Broker
	t      *testing.T
	sent   [][]string       // since the last call of expect
	failed map[string]error // identities that cannot be sent to
	log    strings.Builder
	clock  time.Time
}

var testFlags = brokerFlags{
	heartbeatFlags: heartbeatFlags{Heartbeat: time.Second, Liveness: 5},
	QueueTTL:       time.Minute,
	MaxQueue:       10,
	MaxMemory:      1 << 20,
}

func newFakeRouter(t *testing.T) *fakeRouter {
	r := &fakeRouter{t: t, failed: map[string]error{}, clock: time.Unix(0, 0)}
	send := func(frames [][]byte) error {
		if err := r.failed[string(frames[0])]; err != nil {
			return err
		}
		r.sent = append(r.sent, spell(frames))
		return nil
	}
	r.Broker = NewBroker(testFlags, r.clock, send, slog.New(slog.NewTextHandler(&r.log, nil)))
	r.Tick(r.clock)
	return r
}

// from lets the broker receive a message of a peer's.
func (r *fakeRouter) from(spelled ...string) {
	r.t.Helper()
	r.Receive(frames(spelled...), r.clock)
}

// pass lets n heartbeats go by.
func (r *fakeRouter) pass(n int) {
	for range n {
		r.clock = r.clock.Add(time.Second)
		r.Tick(r.clock)
	}
}

// expect checks what was sent since the last time, in this order. A frame of "*"
// stands for any; those are returned, in order.
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

// expectLog checks that the log has a line with each of the words.
func (r *fakeRouter) expectLog(count int, words ...string) {
	r.t.Helper()
	n := 0
	for line := range strings.Lines(r.log.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	if n != count {
		r.t.Errorf("%d lines with %q in the log, want %d:\n%s", n, words, count, &r.log)
	}
}

func toWorker(identity, token string, body ...string) []string {
	return append([]string{identity, "", "MDPW01", "\x02", token, ""}, body...)
}

func heartbeatTo(identity string) []string  { return []string{identity, "", "MDPW01", "\x04"} }
func disconnectTo(identity string) []string { return []string{identity, "", "MDPW01", "\x05"} }

var errGone = errors.New("no route to host")

// startBroker runs a broker's loop until the end of the test.
func startBroker(t testing.TB, heartbeat time.Duration) (endpoint string) {
	t.Helper()
	socket, bound, err := listen([]string{"tcp://127.0.0.1:0"}, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	stop, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		rules := testFlags
		rules.heartbeatFlags = heartbeatFlags{Heartbeat: heartbeat, Liveness: 100}
		err := serve(stop, socket, rules, time.Second, slog.New(slog.DiscardHandler))
		socket.Close()
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

// A peer is a raw socket of a test.
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

// aside lets another goroutine use the peer, which is done with it before it is closed at
// the end of the test: ZeroMQ crashes where two use a socket.
func (p peer) aside(use func()) {
	ended := make(chan struct{})
	p.t.Cleanup(func() { <-ended })
	go func() {
		defer close(ended)
		use()
	}()
}

// recvBut receives the next message that is not this one.
func (p peer) recvBut(but ...string) []string {
	p.t.Helper()
	for {
		if message := p.recv(); !reflect.DeepEqual(message, but) {
			return message
		}
	}
}

func (p peer) want(got []string, want ...string) {
	p.t.Helper()
	if !reflect.DeepEqual(got, want) {
		p.t.Fatalf("got %q, want %q", got, want)
	}
}

var heartbeatFrames = []string{"", "MDPW01", "\x04"}

func cpuTime(who int) time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(who, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// workerFleet is a program: it registers many workers at a TCP address, without libzmq,
// and sends a heartbeat of each for each byte on standard input. It reads nothing but
// what the kernel takes from it.
func workerFleet() {
	n, _ := strconv.Atoi(os.Args[2])
	fleet := make([]net.Conn, n)
	for i := range fleet {
		conn, err := zmtp(os.Args[1])
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

// serveOnce lets a raw broker answer the next request with what reply makes of it. It
// returns the request when it was answered. It knows nothing of mmi.cancel.
func serveOnce(broker peer, reply func(request []string) []string) <-chan []string {
	came := make(chan []string, 1)
	broker.aside(func() {
		request, err := broker.RecvMessageBytes(0)
		for err == nil && string(request[3]) == "mmi.cancel" {
			request, err = broker.RecvMessageBytes(0)
		}
		if err != nil {
			close(came)
			return
		}
		if answer := reply(spell(request)); answer != nil {
			broker.SendMessage(frames(answer...))
		}
		came <- spell(request)
	})
	return came
}

// newBatchClient makes a client for many requests at once.
func newBatchClient(t *testing.T, endpoint string) *Client {
	client := NewClient(context.Background(), endpoint)
	client.caller.correlated = true
	t.Cleanup(client.Disconnect)
	return client
}

// begin begins a request for each body.
func begin(client *Client, timeout time.Duration, bodies ...string) []*call {
	var calls []*call
	for _, body := range bodies {
		r := &call{service: "echo", body: frames(body), timeout: timeout}
		client.Begin(r)
		calls = append(calls, r)
	}
	return calls
}

// awaitAll waits until all of the requests have ended.
func awaitAll(t *testing.T, client *Client, calls []*call) {
	t.Helper()
	limit := time.Now().Add(20 * time.Second)
	for slices.ContainsFunc(calls, func(r *call) bool { return !r.ended }) {
		if _, err := client.Await(limit); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(limit) {
			t.Fatal("some requests do not end")
		}
	}
}

// fileWith opens a file with that content, at its beginning.
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
	return spell(reply.Body()), err
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

// echoWorker is a program for scripts: a worker written from RFC 7 that replies with
// the body of the request.
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

// simpleBroker is a program for scripts: a broker written from RFC 7 that knows no
// services of its own and takes one frame for the address of a client. Any other message
// it ignores.
func simpleBroker() {
	socket, _ := zmq.NewSocket(zmq.ROUTER)
	socket.Bind(os.Getenv("BACKBONE_BROKER"))
	poller := zmq.NewPoller()
	poller.Add(socket, zmq.POLLIN)
	workers := map[string]string{}     // their services
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

// babbler is a program for scripts: a socket that answers whatever comes with what is
// no MDP.
func babbler() {
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

// babblingClient is a program for scripts: it sends what is no MDP, and waits until
// the broker has read it.
func babblingClient() {
	socket, _ := zmq.NewSocket(zmq.DEALER)
	socket.Connect(os.Getenv("BACKBONE_BROKER"))
	for range 10 {
		socket.SendMessage("babble")
	}
	socket.SendMessage("", "MDPC01", "mmi.service", "x")
	socket.RecvMessage(0)
}

// frames makes a message of its frames, spelled out as they are on the wire.
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

// startService runs a service until the end of the test, or until stop is called.
func startService(t testing.TB, endpoint string, handler Handler) (stop func()) {
	t.Helper()
	s := Service{
		Name:           "echo",
		Endpoint:       endpoint,
		Handler:        handler,
		heartbeatFlags: heartbeatFlags{Heartbeat: 50 * time.Millisecond, Liveness: 100},
		console:        console{quiet: true},
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	return stop
}

// bindPeer makes a raw broker and tells where it is.
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

// next receives the next message of a worker that is no heartbeat.
func (p peer) next() (identity string, message []string) {
	p.t.Helper()
	for {
		message := p.recv()
		if !reflect.DeepEqual(message[1:], heartbeatFrames) {
			return message[0], message[1:]
		}
	}
}

// ours is what this process says on standard error while f runs.
func ours(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	defer func(stderr *os.File) { os.Stderr = stderr }(os.Stderr)
	os.Stderr = file
	f()
	said, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(said)
}

func newFifo(t *testing.T) string {
	t.Helper()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return fifo
}

// expectNoDescendants looks for processes in the site's folder, besides our tools.
func (s *site) expectNoDescendants() {
	s.t.Helper()
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.broker.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	s.expectNoProcess(func(_ int, exe string) bool { return filepath.Dir(exe) == filepath.Dir(ours) })
}

// expectNoProcess looks for processes in the site's folder but those to keep. What was
// just killed may take a moment to go.
func (s *site) expectNoProcess(keep func(pid int, exe string) bool) {
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

// pipeline has count requests answered by a service, at most 64 of them at a time.
func pipeline(b testing.TB, s *site, name string, count int) {
	client := connectPeer(b, zmq.DEALER, s.endpoint)
	for sent, received := 0, 0; received < count; {
		if sent < count && sent-received < 64 {
			client.send("", "MDPC01", name, "x")
			sent++
			continue
		}
		if reply := client.recv(); len(reply) != 4 {
			b.Fatalf("reply %q", reply)
		}
		received++
	}
}
