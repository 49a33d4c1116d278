package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// The peers in this file have keys that were made and set without the code in keys.go.

// A keyPair is the two keys of somebody, in Z85.
type keyPair struct{ public, secret string }

func newKeyPair(t testing.TB) keyPair {
	t.Helper()
	public, secret, err := zmq.NewCurveKeypair()
	if err != nil {
		t.Fatal(err)
	}
	return keyPair{public, secret}
}

func hexKey(prefix, z85 string) string {
	return prefix + hex.EncodeToString([]byte(zmq.Z85decode(z85)))
}

// A keyedSystem is a system whose broker also listens on a TCP endpoint that takes keys.
type keyedSystem struct {
	*system
	tcp   string
	own   keyPair // of the broker
	pairs map[string]keyPair
}

// newKeyedSystem returns a system with rules such as "alice call=*".
func newKeyedSystem(t testing.TB, rules ...string) *keyedSystem {
	t.Helper()
	s := &keyedSystem{system: newSystemWithoutBroker(t), own: newKeyPair(t), pairs: map[string]keyPair{}}
	s.writeFile("broker.key", hexKey("bbsec-", s.own.secret))
	s.authorize(rules...)
	s.broker = s.start("bbroker", "--heartbeat", "100ms", "--liveness", "100", "--broker", s.endpoint, "--broker", "tcp://127.0.0.1:0",
		"--key", "broker.key", "--authorized", "authorized")
	s.tcp = s.broker.waitForMatch(`endpoints="\S+ (tcp://\S+)"`)[1]
	s.broker.waitForLines(1, "read who is authorized")
	return s
}

func (s *keyedSystem) writeFile(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// pair returns the keys of somebody, new ones at the first time.
func (s *keyedSystem) pair(name string) keyPair {
	s.t.Helper()
	if _, ok := s.pairs[name]; !ok {
		s.pairs[name] = newKeyPair(s.t)
		s.writeFile(name+".key", hexKey("bbsec-", s.pairs[name].secret))
	}
	return s.pairs[name]
}

// authorize writes the file of --authorized.
func (s *keyedSystem) authorize(rules ...string) {
	s.t.Helper()
	text := ""
	for _, rule := range rules {
		name, _, _ := strings.Cut(rule, " ")
		text += hexKey("bbpub-", s.pair(name).public) + " " + rule + "\n"
	}
	s.writeFile("authorized", text)
}

// reload lets the broker read other rules.
func (s *keyedSystem) reload(rules ...string) {
	s.t.Helper()
	s.authorize(rules...)
	s.broker.signal(syscall.SIGHUP)
	s.broker.waitForLines(1, "read who is authorized")
}

// waitForMatch reads standard error until a line matches the pattern, and returns the submatches.
func (p *childProcess) waitForMatch(pattern string) []string {
	p.t.Helper()
	match := regexp.MustCompile(pattern)
	for deadline := time.After(20 * time.Second); ; {
		select {
		case line := <-p.lines:
			if found := match.FindStringSubmatch(line); found != nil {
				return found
			}
		case <-deadline:
			p.t.Fatalf("%v did not print %q", p.Args, pattern)
		}
	}
}

// startAs starts a tool that connects over TCP with somebody's key.
func (s *keyedSystem) startAs(name, tool string, args ...string) *childProcess {
	s.t.Helper()
	s.pair(name)
	return s.start(tool, append([]string{"--broker", s.tcp + "#" + hexKey("bbpub-", s.own.public), "--key", name + ".key"}, args...)...)
}

// useKeys makes the next connections of a peer use keys.
func (p peer) useKeys(server string, own keyPair) {
	p.t.Helper()
	if err := errors.Join(p.SetCurveServerkey(server), p.SetCurvePublickey(own.public), p.SetCurveSecretkey(own.secret)); err != nil {
		p.t.Fatal(err)
	}
}

// connectAs returns a DEALER that is connected over TCP with somebody's key. If identity is empty, the
// broker makes one up.
func (s *keyedSystem) connectAs(name, identity string) peer {
	s.t.Helper()
	p := newPeer(s.t, zmq.DEALER)
	p.useKeys(s.own.public, s.pair(name))
	if identity != "" {
		p.SetIdentity(identity)
	}
	if got := p.shakeHands(s.tcp); got != zmq.EVENT_HANDSHAKE_SUCCEEDED {
		s.t.Fatalf("the handshake of %s ended with %v", name, got)
	}
	return p
}

var monitors atomic.Int64

// shakeHands connects a peer, which then has messages to send, and returns how the first handshake ended, or
// EVENT_DISCONNECTED if the other side closed the connection before.
func (p peer) shakeHands(endpoint string, messages ...[]string) zmq.Event {
	p.t.Helper()
	address := fmt.Sprint("inproc://handshakes", monitors.Add(1))
	if err := p.Monitor(address, zmq.EVENT_DISCONNECTED|zmq.EVENT_HANDSHAKE_SUCCEEDED|zmq.EVENT_HANDSHAKE_FAILED_AUTH|
		zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL|zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL); err != nil {
		p.t.Fatal(err)
	}
	monitor := newPeer(p.t, zmq.PAIR)
	p.t.Cleanup(func() { p.Monitor("", 0) }) // ZeroMQ would wait for a monitor that is gone.
	if err := errors.Join(monitor.Connect(address), p.Connect(endpoint)); err != nil {
		p.t.Fatal(err)
	}
	for _, message := range messages {
		// A handshake that failed already leaves nowhere to send to.
		if _, err := p.SendMessageDontwait(message); err != nil && zmq.AsErrno(err) != zmq.Errno(syscall.EAGAIN) {
			p.t.Fatal(err)
		}
	}
	event, _, _, err := monitor.RecvEvent(0)
	if err != nil {
		p.t.Fatalf("no handshake ended: %v", err)
	}
	return event
}

// knows checks that a peer can ask the broker, and that the next message for it is the answer.
func (p peer) knows(service, code string) {
	p.t.Helper()
	p.send("", "MDPC01", "mmi.service", service)
	p.want(p.recvSkipping(heartbeatFrames...), "", "MDPC01", "mmi.service", code)
}

// closeBefore closes a peer whose identity another is about to take, and returns when the broker knows that it
// is gone, if that can be told: it has as many descriptors as before.
func (s *keyedSystem) closeBefore(p peer, descriptors int) {
	s.t.Helper()
	p.Close()
	s.waitForDescriptors(descriptors)
	s.metric("backbone_workers")
}

// waitForDescriptors waits until the broker has no more open files than these.
func (s *keyedSystem) waitForDescriptors(descriptors int) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); openDescriptors(s.broker.Process.Pid) > descriptors; {
		if time.Now().After(deadline) {
			s.t.Fatal("the broker keeps the connection")
		}
		time.Sleep(time.Millisecond)
	}
}

// answered tells whether the broker answers a peer that has taken the identity of another. It fails the test
// if the peer gets what is for the other.
func (p peer) answered(secret string) bool {
	p.t.Helper()
	p.SetRcvtimeo(time.Second)
	p.send("", "MDPC01", "mmi.service", "echo")
	for {
		message, err := p.RecvMessage(0)
		switch {
		case err != nil:
			return false
		case slices.Contains(message, secret):
			p.t.Fatalf("somebody else got %q", message)
		case slices.Contains(message, "mmi.service"):
			return true
		}
	}
}

// forge lets somebody take the identity of a peer that is gone, and ask. ZeroMQ ignores who comes too early,
// while the broker still has the connection of the other.
func (s *keyedSystem) forge(identity, secret string) {
	s.t.Helper()
	for range 20 {
		p := s.connectAs("mallory", identity)
		if p.answered(secret) {
			return
		}
		p.Close()
	}
	s.t.Fatal("the broker does not answer")
}

// recvRequest returns the token of the next request for a worker, and checks the body.
func (p peer) recvRequest(body ...string) (token string) {
	p.t.Helper()
	message := p.recvSkipping(heartbeatFrames...)
	if len(message) < 4 {
		p.t.Fatalf("the worker got %q", message)
	}
	p.want(message, append([]string{"", "MDPW01", "\x02", message[3], ""}, body...)...)
	return message[3]
}

// refused returns the reply to a request that its client may not make.
func refused(service, name string) []string {
	return notAllowedTo("", service, name)[1:]
}

func TestNothingGetsThroughWithoutAKeyThatIsKnown(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=*", "bob serve=*")
	alice, unknown := s.pair("alice"), newKeyPair(t)
	ipc := s.endpoint
	for _, test := range []struct {
		name     string
		endpoint string
		keys     func(p peer)
	}{
		{"unknown key", s.tcp, func(p peer) { p.useKeys(s.own.public, unknown) }},
		{"no key", s.tcp, func(peer) {}},
		{"PLAIN", s.tcp, func(p peer) { p.SetPlainUsername("alice"); p.SetPlainPassword("x") }},
		{"key of another broker", s.tcp, func(p peer) { p.useKeys(unknown.public, alice) }},
		{"known public key without its secret", s.tcp, func(p peer) { p.useKeys(s.own.public, keyPair{alice.public, unknown.secret}) }},
		{"the broker's own key", s.tcp, func(p peer) { p.useKeys(s.own.public, s.own) }},
		{"known key on ipc", ipc, func(p peer) { p.useKeys(s.own.public, alice) }},
	} {
		p := newPeer(t, zmq.DEALER)
		test.keys(p)
		if got := p.shakeHands(test.endpoint, []string{"", "MDPC01", "absent", "x"}, []string{"", "MDPW01", "\x01", "absent"}); got == zmq.EVENT_HANDSHAKE_SUCCEEDED {
			t.Errorf("%s: the handshake succeeded", test.name)
		}
	}
	if requests, workers := s.metric("backbone_requests_total"), s.metric("backbone_workers"); requests != 0 || workers != 0 {
		t.Errorf("%d requests and %d workers got through", requests, workers)
	}
	// The same with a key that is known.
	p := s.connectAs("alice", "")
	p.send("", "MDPC01", "absent", "x")
	p.knows("absent", "404")
	if requests := s.metric("backbone_requests_total"); requests != 1 {
		t.Errorf("%d requests got through with a key, want 1", requests)
	}
}

func TestPeersWithKeysAreServed(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=echo", "bob serve=echo")
	worker, client := s.connectAs("bob", ""), s.connectAs("alice", "")
	worker.send("", "MDPW01", "\x01", "echo")
	client.send("7", "", "MDPC01", "echo", "hello", "\x00\xff")
	token := worker.recvRequest("hello", "\x00\xff")
	if !strings.HasSuffix(token, "@alice") {
		t.Errorf("the token is %q", token)
	}
	worker.send("", "MDPW01", "\x03", token, "", "bye")
	client.want(client.recv(), "7", "", "MDPC01", "echo", "bye")
	// The others on ipc still need none.
	s.expect("mmi.service", []string{"echo"}, "200")
}

func TestRequestsOfARevokedClientEnd(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=*", "bob serve=*")
	worker, client, idle := s.connectAs("bob", ""), s.connectAs("alice", ""), s.connectAs("alice", "")
	worker.send("", "MDPW01", "\x01", "echo")
	client.send("1", "", "MDPC01", "echo", "has begun")
	token := worker.recvRequest("has begun")
	client.send("2", "", "MDPC01", "echo", "waits")
	s.waitForMetric("backbone_queue_length", 1)
	s.reload("bob serve=*")
	client.want(client.recv(), append([]string{"2"}, refused("echo", "this key")...)...)
	idle.send("", "MDPC01", "echo", "later")
	idle.want(idle.recv(), refused("echo", "this key")...)
	worker.send("", "MDPW01", "\x03", token, "", "done")
	client.want(client.recv(), withheldFrom("1", "echo", "this key")...)

	again := newPeer(t, zmq.DEALER)
	again.useKeys(s.own.public, s.pair("alice"))
	if got := again.shakeHands(s.tcp); got != zmq.EVENT_HANDSHAKE_FAILED_AUTH {
		t.Errorf("the handshake with the revoked key ended with %v", got)
	}
	if got := s.metric("backbone_unauthorized_total"); got != 3 {
		t.Errorf("%d times something was not allowed, want 3", got)
	}
}

func TestRevokedWorkerLosesItsRequest(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=*", "bob serve=*")
	worker, client := s.connectAs("bob", ""), s.connectAs("alice", "")
	worker.send("", "MDPW01", "\x01", "echo")
	client.send("", "MDPC01", "echo", "x")
	token := worker.recvRequest("x")
	s.reload("alice call=*", "bob serve=other")
	client.want(client.recv(), lostReply("", "echo")[1:]...)
	worker.want(worker.recvSkipping(heartbeatFrames...), "", "MDPW01", "\x05")
	worker.send("", "MDPW01", "\x03", token, "", "late")
	worker.want(worker.recvSkipping(heartbeatFrames...), "", "MDPW01", "\x05")
	client.knows("echo", "404")
}

func TestRevokedServiceSaysSoAndStaysUntilItIsStopped(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "bob serve=*")
	service := s.startAs("bob", "bservice", "--heartbeat", "100ms", "echo", "cat")
	s.waitForMetric("backbone_workers", 1)
	s.reload()
	service.waitForLines(1, `level=ERROR msg=refused .*why="the broker does not know the key bbpub-[0-9a-f]{64}" again_in=30s`)
	service.signal(syscall.SIGTERM)
	if got := service.waitForExit(); got != 0 {
		t.Errorf("status %d, want 0", got)
	}
}

func TestKeyThatMayCallDoesNotServeAndTheReverse(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=echo", "bob serve=echo")
	client, worker := s.connectAs("alice", ""), s.connectAs("bob", "")
	client.send("", "MDPW01", "\x01", "echo")
	client.want(client.recv(), "", "MDPW01", "\x05")
	client.knows("echo", "404")
	worker.send("", "MDPC01", "echo", "x")
	worker.want(worker.recv(), refused("echo", "bob")...)
	worker.send("", "MDPC01", "mmi.service", "echo")
	worker.want(worker.recv(), refused("mmi.service", "bob")...)
	worker.send("", "MDPW01", "\x01", "other")
	worker.want(worker.recv(), "", "MDPW01", "\x05")
	client.send("", "MDPC01", "other", "x")
	client.want(client.recv(), refused("other", "alice")...)
	if requests := s.metric("backbone_requests_total"); requests != 0 {
		t.Errorf("%d requests were taken", requests)
	}
}

// ZeroMQ lets somebody else have the identity of a client that is gone, and sends there what is for it.
func TestReplyDoesNotGoToAnotherWithTheIdentityOfTheClient(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{true, false} {
		t.Run(fmt.Sprint("silent=", silent), func(t *testing.T) {
			t.Parallel()
			s := newKeyedSystem(t, "alice call=*", "mallory call=*", "bob serve=*")
			worker := s.connectAs("bob", "")
			worker.send("", "MDPW01", "\x01", "echo")
			worker.want(worker.recv(), heartbeatFrames...)
			descriptors := openDescriptors(s.broker.Process.Pid)
			client := s.connectAs("alice", "victim")
			client.send("", "MDPC01", "echo", "x")
			token := worker.recvRequest("x")
			s.closeBefore(client, descriptors)
			forger := s.connectAs("mallory", "victim")
			if !silent && !forger.answered("for Alice") {
				s.forge("victim", "for Alice")
			}
			worker.send("", "MDPW01", "\x03", token, "", "for Alice")
			s.waitForMetric("backbone_dropped_replies_total", 1)
			forger.answered("for Alice")
		})
	}
}

// The broker stands still, while a client sends its request and goes. It then receives the message after the
// connection broke.
func TestReplyToAClientThatWasGoneBeforeItsRequestWasReceivedGoesToNobody(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=*", "mallory call=*", "bob serve=*")
	worker := s.connectAs("bob", "")
	worker.send("", "MDPW01", "\x01", "echo")
	worker.want(worker.recv(), heartbeatFrames...)
	for i := range 10 {
		identity := fmt.Sprint("victim", i) // another each time, or ZeroMQ might ignore who comes too early
		descriptors := openDescriptors(s.broker.Process.Pid)
		zmqContext, err := zmq.NewContext()
		if err != nil {
			t.Fatal(err)
		}
		socket, err := zmqContext.NewSocket(zmq.DEALER)
		if err != nil {
			t.Fatal(err)
		}
		client := peer{socket, t}
		client.useKeys(s.own.public, s.pair("alice"))
		if err := errors.Join(client.SetIdentity(identity), client.SetRcvtimeo(10*time.Second), client.Connect(s.tcp)); err != nil {
			t.Fatal(err)
		}
		client.knows("echo", "200")
		s.broker.signal(syscall.SIGSTOP)
		client.send("", "MDPC01", "echo", "x")
		client.Close()
		if err := zmqContext.Term(); err != nil { // when the request has left
			t.Fatal(err)
		}
		s.broker.signal(syscall.SIGCONT)
		token := worker.recvRequest("x")
		s.waitForDescriptors(descriptors)
		forger := s.connectAs("mallory", identity)
		worker.send("", "MDPW01", "\x03", token, "", "for Alice")
		s.waitForMetric("backbone_dropped_replies_total", i+1)
		forger.answered("for Alice")
		s.closeBefore(forger, descriptors)
	}
}

func TestRequestDoesNotGoToAnotherWithTheIdentityOfTheWorker(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{true, false} {
		t.Run(fmt.Sprint("silent=", silent), func(t *testing.T) {
			t.Parallel()
			s := newKeyedSystem(t, "alice call=*", "mallory call=other", "bob serve=*")
			client := s.connectAs("alice", "")
			client.knows("echo", "404")
			descriptors := openDescriptors(s.broker.Process.Pid)
			worker := s.connectAs("bob", "victim")
			worker.send("", "MDPW01", "\x01", "echo")
			worker.want(worker.recv(), heartbeatFrames...)
			s.closeBefore(worker, descriptors)
			forger := s.connectAs("mallory", "victim")
			if !silent && !forger.answered("for Bob") {
				s.forge("victim", "for Bob")
			}
			client.send("", "MDPC01", "echo", "for Bob")
			s.waitForMetric("backbone_queue_length", 1)
			forger.answered("for Bob")
			s.waitForMetric("backbone_workers", 0)
		})
	}
}

// Where ZeroMQ asks nobody for the user, a peer can send one in its handshake.
func TestPeerOnIPCCannotClaimToBeAUser(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=echo")
	s.startShellService("echo", `printf "<$BACKBONE_USER>"`)
	for _, user := range []string{hexKey("bbpub-", s.pair("alice").public), "nobody", ""} {
		conn, err := dialZMTPWith(strings.TrimPrefix(s.endpoint, "ipc://"), "User-Id", user, "Peer-Address", "192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		conn.Write(encodeZMTP("", "MDPC01", "echo"))
		want := encodeZMTP("", "MDPC01", "echo", "<>")
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("as %q it got %q, %v, want %q", user, got, err, want)
		}
	}
}

func TestClientWithKeysInPythonIsServed(t *testing.T) {
	t.Parallel()
	interpreter(t, "python")
	s := newKeyedSystem(t, "alice call=echo", "bob serve=echo")
	service := s.startAs("bob", "bservice", "--heartbeat", "100ms", "echo", "sh", "-c", `printf %s "$BACKBONE_USER: $1"`, "sh")
	service.waitForLines(1, "service connected")
	const program = `
import sys, zmq
endpoint, server, public, secret, *messages = sys.argv[1:]
socket = zmq.Context().socket(zmq.REQ)
socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = server.encode(), public.encode(), secret.encode()
socket.connect(endpoint)
for service in messages:
    socket.send_multipart([b'MDPC01', service.encode(), b'hello'])
    print(socket.recv_multipart())`
	alice := s.pair("alice")
	output, err := s.inlineCommand("python", program, s.tcp, s.own.public, alice.public, alice.secret, "echo", "other").Output()
	const want = `[b'MDPC01', b'echo', b'alice: hello']
[b'MDPC01', b'other', b'', b'bbroker: other: alice may not call it\n', b'exit status 077']
`
	if err != nil || string(output) != want {
		t.Errorf("it printed %q, %v, want %q", output, err, want)
	}
}

// Without answers to its questions, ZeroMQ would let everybody in unless it is told not to. This test
// answers them in place of the guard.
func TestPortIsShutWhenTheGuardIsGone(t *testing.T) {
	const address = "inproc://zeromq.zap.01"
	server := newKeyPair(t)
	key := secretKey([]byte(zmq.Z85decode(server.secret)))
	answer := func(change func(answer []string)) func(question []string) []string {
		return func(question []string) []string {
			a := []string{"1.0", question[1], "200", "", publicKey([]byte(question[6])).String(), ""}
			change(a)
			return a
		}
	}
	for _, test := range []struct {
		name   string
		answer func(question []string) []string // nil for a handler that ends before the first question
		open   bool
	}{
		{"it was never there", nil, false},
		{"it ended", nil, false},
		{"it says no", answer(func(a []string) { a[2] = "400" }), false},
		{"it failed", answer(func(a []string) { a[2] = "500" }), false},
		{"it says nonsense", answer(func(a []string) { a[2] = "yes" }), false},
		{"it answers another question", answer(func(a []string) { a[1] += "1" }), false},
		{"it speaks another version", answer(func(a []string) { a[0] = "2.0" }), false},
		{"its answer is cut off", func(question []string) []string { return []string{"1.0", question[1], "200"} }, false},
		{"it says yes", answer(func([]string) {}), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.name != "it was never there" {
				handler, err := zmq.NewSocket(zmq.REP)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(handler.SetLinger(0), handler.SetRcvtimeo(20*time.Millisecond), handler.Bind(address)); err != nil {
					t.Fatal(err)
				}
				var stopped atomic.Bool
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					defer handler.Close()
					defer handler.Unbind(address) // Close would free it later.
					for test.answer != nil && !stopped.Load() {
						if question, err := handler.RecvMessage(0); err == nil {
							handler.SendMessage(test.answer(question))
						}
					}
				}()
				if test.answer == nil {
					<-ended
				}
				t.Cleanup(func() { stopped.Store(true); <-ended })
			}
			router, bound, err := listen([]string{"tcp://127.0.0.1:0", "ipc://" + filepath.Join(t.TempDir(), "socket")}, 1<<20, &guard{key: &key})
			if err != nil {
				t.Fatal(err)
			}
			defer router.Close()
			p := newPeer(t, zmq.DEALER)
			p.useKeys(server.public, newKeyPair(t))
			if test.answer == nil {
				// ZeroMQ may leave the connection as it is, until the handshake takes too long.
				local := newPeer(t, zmq.DEALER)
				if err := errors.Join(p.SetHandshakeIvl(500*time.Millisecond), local.SetHandshakeIvl(500*time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				if got := local.shakeHands(bound[1], []string{"", "MDPC01", "echo", "x"}); got == zmq.EVENT_HANDSHAKE_SUCCEEDED {
					t.Error("a handshake on ipc succeeded")
				}
			}
			if got := p.shakeHands(bound[0], []string{"", "MDPC01", "echo", "x"}); (got == zmq.EVENT_HANDSHAKE_SUCCEEDED) != test.open {
				t.Errorf("the handshake ended with %v", got)
			}
			if test.open {
				router.SetRcvtimeo(10 * time.Second)
				if message, err := router.RecvMessageBytes(0); err != nil || string(message[2]) != "MDPC01" {
					t.Errorf("received %q, %v", message, err)
				}
			} else if message, _, err := router.receiveFrom(); message != nil || err != nil {
				t.Errorf("received %q, %v", message, err)
			}
		})
	}
}

// openDescriptors returns the number of open files of a process, 0 if that cannot be told.
func openDescriptors(pid int) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries)
}

func TestHandshakesThatStopHalfWayDoNotKeepOthersOut(t *testing.T) {
	t.Parallel()
	const count = 1000
	s := newKeyedSystem(t, "alice call=*")
	s.connectAs("alice", "").knows("echo", "404")
	pid := s.broker.Process.Pid
	memory, descriptors := processMemory(t, pid, "VmRSS"), openDescriptors(pid)
	conns := make([]net.Conn, count)
	for i := range conns {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.tcp, "tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		greeting := zmtpGreeting("CURVE")
		conn.Write(greeting)
		if _, err := io.ReadFull(conn, greeting); err != nil {
			t.Fatalf("the broker closed connection %d: %v", i, err)
		}
		if i%2 == 1 {
			conn.Write([]byte{4, 200, 5, 'H', 'E', 'L', 'L', 'O', 1, 0}) // the beginning of a HELLO
		}
		conns[i] = conn
	}
	for range 10 {
		s.connectAs("alice", "").knows("echo", "404")
	}
	if now := processMemory(t, pid, "VmRSS"); now > memory+count*64<<10 {
		t.Errorf("the broker takes %d MiB, and took %d before", now>>20, memory>>20)
	}
	for _, conn := range conns {
		conn.Close()
	}
	for deadline := time.Now().Add(20 * time.Second); openDescriptors(pid) > descriptors+count/10; {
		if time.Now().After(deadline) {
			t.Fatalf("the broker has %d descriptors, and had %d before", openDescriptors(pid), descriptors)
		}
	}
	s.connectAs("alice", "").knows("echo", "404")
}

func TestOldRulesStayIfTheFileIsBadOrGone(t *testing.T) {
	t.Parallel()
	s := newKeyedSystem(t, "alice call=echo")
	client := s.connectAs("alice", "")
	for _, test := range []struct {
		spoil func()
		why   string
	}{
		{func() { s.writeFile("authorized", "# nobody\n\nx y all") },
			`level=ERROR msg="the old rules stay" why="--authorized: authorized:3: \\"x\\" is not a public key`},
		{func() { os.Remove(filepath.Join(s.dir, "authorized")) },
			`level=ERROR msg="the old rules stay" why="--authorized: open authorized: no such file or directory"`},
		{func() { os.Mkdir(filepath.Join(s.dir, "authorized"), 0o700) },
			`level=ERROR msg="the old rules stay" why="--authorized: read authorized: is a directory"`},
	} {
		test.spoil()
		s.broker.signal(syscall.SIGHUP)
		s.broker.waitForLines(1, test.why)
		client.knows("echo", "404")
		s.connectAs("alice", "").knows("echo", "404")
		client.send("", "MDPC01", "other", "x")
		client.want(client.recv(), refused("other", "alice")...)
	}
	os.Remove(filepath.Join(s.dir, "authorized"))
	s.reload("alice serve=echo")
	client.send("", "MDPC01", "mmi.service", "echo")
	client.want(client.recv(), refused("mmi.service", "alice")...)
}

func TestNoRequestIsLostWhileTheRulesAreReadAgain(t *testing.T) {
	t.Parallel()
	const reloads, lines = 20, 150 // lines for each reload
	s := newKeyedSystem(t, "alice call=echo", "bob serve=echo")
	service := s.startAs("bob", "bservice", "--heartbeat", "100ms", "-j2", "--coproc", "echo", "cat")
	service.waitForLines(1, "service connected")
	request := exec.Command("brequest", "--broker", s.tcp, "--broker-key", hexKey("bbpub-", s.own.public), "--key", "alice.key", "--each", "echo")
	request.Dir, request.Env = s.dir, append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var output, messages bytes.Buffer
	request.Stdout, request.Stderr = &output, &messages
	input, err := request.StdinPipe()
	if err == nil {
		err = request.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { request.Process.Kill() })
	var want strings.Builder
	for i := range reloads {
		for j := range lines {
			line := fmt.Sprintln("line", i*lines+j)
			io.WriteString(input, line)
			want.WriteString(line)
		}
		// Another comes and goes, and the two that stay get other rules.
		others := []string{fmt.Sprint("other", i%3, " all")}
		s.reload(append(others, fmt.Sprintf("alice call=echo,x%d", i), fmt.Sprintf("bob serve=e*,y%d", i))...)
	}
	input.Close()
	if err := request.Wait(); err != nil || output.String() != want.String() {
		t.Errorf("brequest ended with %v after %d of %d bytes: %s", err, output.Len(), want.Len(), &messages)
	}
	for _, metric := range []string{"failures", "refused", "lost_workers", "unauthorized"} {
		if got := s.metric("backbone_" + metric + "_total"); got != 0 {
			t.Errorf("%s: %d", metric, got)
		}
	}
}

// A recorder passes a TCP connection on to a broker and records the bytes both ways.
type recorder struct {
	mutex sync.Mutex
	bytes []byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.bytes = append(r.bytes, p...)
	return len(p), nil
}

// listen returns the endpoint of the recorder.
func (r *recorder) listen(t testing.TB, target string) (endpoint string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", strings.TrimPrefix(target, "tcp://"))
			if err != nil {
				near.Close()
				continue
			}
			pass := func(from, to net.Conn) {
				io.Copy(to, io.TeeReader(from, r))
				from.Close()
				to.Close()
			}
			go pass(near, far)
			go pass(far, near)
		}
	}()
	return "tcp://" + listener.Addr().String()
}

func TestTrafficWithKeysShowsNothing(t *testing.T) {
	t.Parallel()
	for _, withKeys := range []bool{true, false} {
		t.Run(fmt.Sprint("keys=", withKeys), func(t *testing.T) {
			t.Parallel()
			var s *keyedSystem
			if withKeys {
				s = newKeyedSystem(t, "alice call=*", "bob serve=*")
			} else {
				s = &keyedSystem{system: newSystemWithoutBroker(t)}
				s.broker = s.start("bbroker", "--broker", "tcp://127.0.0.1:0", "--broker", s.endpoint)
				s.tcp = s.broker.waitForMatch(`endpoints="(tcp://\S+) `)[1]
			}
			var record recorder
			tap := record.listen(t, s.tcp)
			flags := func(name string) []string {
				if !withKeys {
					return []string{"--broker", tap}
				}
				return []string{"--broker", tap, "--broker-key", hexKey("bbpub-", s.own.public), "--key", name + ".key"}
			}
			service := s.start("bservice", append(flags("bob"), "--stdin", "name-of-the-service", "sed", "s/argument/output/")...)
			service.waitForLines(1, "service connected")
			request := exec.Command("brequest", append(flags("alice"), "name-of-the-service", "secret-argument")...)
			request.Dir, request.Env = s.dir, append(os.Environ(), "GORACE=atexit_sleep_ms=0")
			if got, err := request.Output(); err != nil || string(got) != "secret-output" {
				t.Fatalf("brequest printed %q, %v", got, err)
			}
			record.mutex.Lock()
			defer record.mutex.Unlock()
			for _, text := range []string{"name-of-the-service", "secret-argument", "secret-output", "MDPC01", "MDPW01"} {
				if shown := bytes.Contains(record.bytes, []byte(text)); shown == withKeys {
					t.Errorf("%q is in the %d bytes that were sent: %v", text, len(record.bytes), shown)
				}
			}
		})
	}
}

func TestKeysAreWrittenAsTheyAreRead(t *testing.T) {
	t.Parallel()
	for range 20 {
		pair := newKeyPair(t)
		secret, err := parseSecretKey([]byte("# x\r\n\r\n" + hexKey("bbsec-", pair.secret) + "\r\n"))
		if err != nil {
			t.Fatal(err)
		}
		public, err := secret.public()
		if err != nil {
			t.Fatal(err)
		}
		if public.z85() != pair.public || secret.z85() != pair.secret || public.String() != hexKey("bbpub-", pair.public) {
			t.Errorf("the public key of %q is %v, want %q", pair.secret, public, pair.public)
		}
		for _, text := range []string{public.String(), public.z85()} {
			if got, err := parsePublicKey(text); err != nil || !reflect.DeepEqual(got, public) {
				t.Errorf("%q became %v, %v", text, got, err)
			}
		}
	}
}

// fakeGreeter accepts connections, greets with a security mechanism and sends more, and returns its endpoint.
// It then reads, unless it is to close the connection.
func fakeGreeter(t *testing.T, mechanism, more string, closes bool) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	greeting := make([]byte, 64)
	copy(greeting, "\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00"+mechanism)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.Write(append(greeting, more...))
				if !closes {
					io.Copy(io.Discard, conn)
				}
			}()
		}
	}()
	return "tcp://" + listener.Addr().String()
}

// A broker that has no room for more connections closes them. That is no sign of another key.
func TestBrokerThatClosesConnectionsIsNotTakenForAnotherOne(t *testing.T) {
	t.Parallel()
	own := secretKey(keyOf("own"))
	keys := &linkKeys{broker: keyOf("broker"), own: &own}
	client := newClient(context.Background(), []brokerAddress{{fakeGreeter(t, "CURVE", "", true), keys}})
	defer client.Disconnect()
	if _, err := client.Send("s", frames("x"), 2*time.Second); !errors.Is(err, errNoBroker) {
		t.Errorf("the error is %v, want %v", err, errNoBroker)
	}
}

func TestRefusalByABrokerWithoutKeysIsReported(t *testing.T) {
	t.Parallel()
	client := NewClient(context.Background(), fakeGreeter(t, "NULL", "\x04\x0a\x05ERROR\x03400", false))
	defer client.Disconnect()
	if _, err := client.Send("s", frames("x"), 20*time.Second); !errors.Is(err, errNotAdmitted) {
		t.Errorf("the error is %v, want %v", err, errNotAdmitted)
	}
}
