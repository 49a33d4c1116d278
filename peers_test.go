package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// Clients, services and brokers in other languages: scripts/backbone.py and backbone.js in
// every pairing with each other and with ours, and peers that know nothing but RFC 7.

// interpreter finds what runs a language's peers, or skips the test.
func interpreter(t *testing.T, language string) string {
	t.Helper()
	switch language {
	case "python":
		for _, python := range []string{"python3", "/usr/bin/python3"} {
			if exec.Command(python, "-c", "import zmq").Run() == nil {
				return python
			}
		}
	case "javascript":
		if _, err := os.Stat("scripts/node_modules/zeromq"); err == nil {
			if node, err := exec.LookPath("node"); err == nil {
				return node
			}
		}
	}
	t.Skipf("no %s with ZeroMQ here; scripts/bootstrap --all installs it", language)
	return ""
}

// peerEnv lets a program of another language find the libraries, and the broker of a site.
func (s *site) peerEnv() []string {
	s.t.Helper()
	root, err := os.Getwd()
	if err != nil {
		s.t.Fatal(err)
	}
	// backbone.js is a module by its name, as if it were installed.
	modules := filepath.Join(s.dir, "node_modules")
	os.Mkdir(modules, 0o700)
	os.Symlink(filepath.Join(root, "scripts", "backbone.js"), filepath.Join(modules, "backbone.js"))
	return append(os.Environ(), "BACKBONE_BROKER="+s.endpoint, "GORACE=atexit_sleep_ms=0", "PYTHONDONTWRITEBYTECODE=1",
		"PYTHONPATH="+filepath.Join(root, "scripts"), "NODE_PATH="+modules+":"+filepath.Join(root, "scripts", "node_modules"))
}

// libraries are the languages that have one, and what runs it as a program and runs the
// text of a program.
var libraries = map[string]struct{ extension, library, textFlag string }{
	"python":     {".py", "scripts/backbone.py", "-c"},
	"javascript": {".js", "scripts/backbone.js", "-e"},
}

// inEachLanguage runs a test for each library, at the same time.
func inEachLanguage(t *testing.T, test func(t *testing.T, language string)) {
	for language := range libraries {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			test(t, language)
		})
	}
}

// run makes a command of a program in another language. It is killed at the end of the
// test, if it was started.
func (s *site) run(language string, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(interpreter(s.t.(*testing.T), language), args...)
	cmd.Env, cmd.Stderr = s.peerEnv(), os.Stderr
	s.t.Cleanup(func() {
		if cmd.Process != nil {
			cmd.Process.Kill()
		}
	})
	return cmd
}

// peer is a program of testdata/peers.
func (s *site) peer(language, name string, args ...string) *exec.Cmd {
	s.t.Helper()
	return s.run(language, append([]string{"testdata/peers/" + name + libraries[language].extension}, args...)...)
}

// text is a program as it stands.
func (s *site) text(language, program string, args ...string) *exec.Cmd {
	s.t.Helper()
	return s.run(language, append([]string{libraries[language].textFlag, program}, args...)...)
}

// rawSite has a raw broker.
func rawSite(t *testing.T) (*site, peer) {
	t.Helper()
	s, broker := bareSite(t), newPeer(t, zmq.ROUTER)
	if err := broker.Bind(s.endpoint); err != nil {
		t.Fatal(err)
	}
	return s, broker
}

// serve starts the service of a language that does what its requests say. stop lets it
// take its leave.
func (s *site) serve(language string) (stop func()) {
	s.t.Helper()
	if language == "go" {
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		service := &Service{Name: "peer", Endpoint: s.endpoint, Handler: doWhatItSays, console: console{quiet: true},
			heartbeatFlags: heartbeatFlags{Heartbeat: time.Second, Liveness: 5}}
		go func() { ended <- service.Serve(ctx) }()
		stop = sync.OnceFunc(func() {
			cancel()
			if err := <-ended; err != nil {
				s.t.Error(err)
			}
		})
		s.t.Cleanup(stop)
		return stop
	}
	cmd := s.peer(language, "service", "peer")
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			s.t.Errorf("the service ended with %v", err)
		}
	}
}

// doWhatItSays is what testdata/peers/service.* do.
func doWhatItSays(_ string, body [][]byte) Reply {
	wish := ""
	if len(body) > 0 {
		wish = string(body[0])
	}
	switch wish {
	case "fail":
		return Reply{Output: frames("out\xff"), Stderr: []byte("err\n"), Status: 3}
	case "throw":
		return Reply{Stderr: []byte("RangeError: boom\n"), Status: 1}
	case "late":
		if gate, err := os.Open(string(body[1])); err == nil {
			gate.Close()
		}
		return Reply{Output: frames("late")}
	}
	return Reply{Output: body}
}

// late is a request that the service of any language answers once release was called.
func (s *site) late() (request []string, release func()) {
	s.t.Helper()
	gate := filepath.Join(s.t.TempDir(), "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		s.t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		writer, err := os.OpenFile(gate, os.O_RDWR, 0)
		if err != nil {
			s.t.Error(err)
			return
		}
		s.t.Cleanup(func() { writer.Close() })
	})
	s.t.Cleanup(release) // the service waits for it
	return []string{"late", gate}, release
}

// A question is one for a client of testdata/peers, and an outcome what it tells.
type (
	question struct {
		Service string   `json:"service"`
		Message []string `json:"message"` // in hexadecimal, as are all bytes here
		Timeout float64  `json:"timeout"`
	}
	outcome struct {
		Reply          []string
		Error          string
		Status         int
		Stdout, Stderr string
	}
)

func hexes(frames []string) []string {
	coded := []string{}
	for _, frame := range frames {
		coded = append(coded, hex.EncodeToString([]byte(frame)))
	}
	return coded
}

// asks sends requests by the client of a language, all of them at once if it can, and
// tells of each what came of it: the reply, or the error with its status.
func (s *site) asks(language string, timeout float64, bodies ...[]string) []string {
	s.t.Helper()
	outcomes := make([]outcome, len(bodies))
	if language == "go" {
		client := newBatchClient(s.t.(*testing.T), s.endpoint)
		var calls []*call
		for _, body := range bodies {
			calls = append(calls, &call{service: "peer", body: frames(body...), timeout: time.Duration(timeout * float64(time.Second))})
			client.Begin(calls[len(calls)-1])
		}
		awaitAll(s.t.(*testing.T), client, calls)
		client.Abandon()
		for i, r := range calls {
			o := &outcomes[i]
			switch {
			case errors.Is(r.err, errTimeout):
				o.Error, o.Status = "RequestTimeout", exitTimeout
			case r.err != nil:
				o.Error, o.Status = r.err.Error(), 1
			case r.reply.Status != 0:
				*o = outcome{nil, "StatusError", r.reply.Status, hex.EncodeToString(r.reply.Output[0]), hex.EncodeToString(r.reply.Stderr)}
			default:
				o.Reply = hexes(spell(r.reply.Output))
			}
		}
	} else {
		var input bytes.Buffer
		for _, body := range bodies {
			json.NewEncoder(&input).Encode(question{"peer", hexes(body), timeout})
		}
		args := []string{}
		if language == "asyncio" {
			language, args = "python", []string{"asyncio"}
		}
		cmd := s.peer(language, "client", args...)
		cmd.Stdin = &input
		output, err := cmd.Output()
		if err != nil {
			s.t.Fatalf("the client ended with %v", err)
		}
		decoder := json.NewDecoder(bytes.NewReader(output))
		for i := range outcomes {
			if err := decoder.Decode(&outcomes[i]); err != nil {
				s.t.Fatalf("%v in %q", err, output)
			}
		}
	}
	var told []string
	for _, o := range outcomes {
		if o.Error == "" {
			told = append(told, fmt.Sprintf("%q", o.Reply))
		} else {
			told = append(told, strings.TrimSpace(fmt.Sprintf("%s %d %s %s", o.Error, o.Status, o.Stdout, o.Stderr)))
		}
	}
	return told
}

func TestPeersInEveryLanguageUnderstandEachOther(t *testing.T) {
	var binary strings.Builder
	for i := range 256 {
		binary.WriteByte(byte(i))
	}
	many := []string{}
	for i := range 50 {
		many = append(many, fmt.Sprint("frame ", i))
	}
	for _, service := range []string{"go", "python", "javascript"} {
		for _, client := range []string{"go", "python", "asyncio", "javascript"} {
			t.Run(client+" asks "+service, func(t *testing.T) {
				t.Parallel()
				s := newSite(t, "--heartbeat", "1s")
				stop := s.serve(service)
				expect := func(timeout float64, bodies [][]string, want ...string) {
					t.Helper()
					for i, got := range s.asks(client, timeout, bodies...) {
						if got != want[i] {
							t.Errorf("%.60q is answered with %.200s, want %.200s", bodies[i], got, want[i])
						}
					}
				}
				same := func(bodies ...[]string) {
					t.Helper()
					var want []string
					for _, body := range bodies {
						want = append(want, fmt.Sprintf("%q", hexes(body)))
					}
					expect(20, bodies, want...)
				}
				same([]string{"hello"}, []string{binary.String()}, []string{}, []string{""}, []string{"", "x", ""}, many)
				boom := map[string]string{"python": "ValueError"}[service]
				if boom == "" {
					boom = "RangeError"
				}
				expect(20, [][]string{{"fail"}, {"throw"}},
					"StatusError 3 6f7574ff 6572720a", "StatusError 1  "+hexes([]string{boom + ": boom\n"})[0])
				late, release := s.late()
				expect(0.3, [][]string{late}, "RequestTimeout 124")
				release()

				hundreds := [][]string{}
				for i := range 200 {
					hundreds = append(hundreds, []string{fmt.Sprint(i)})
				}
				same(hundreds...)

				stop()
				s.becomes("backbone_workers", 0)
				if lost := s.metric("backbone_lost_workers_total"); lost != 0 {
					t.Errorf("it took its leave without DISCONNECT")
				}
				stop = s.serve(service)
				same([]string{"after the service"})
				s.broker.signal(syscall.SIGKILL)
				s.broker.status()
				s.broker = s.start("bbroker", "--heartbeat", "1s")
				same([]string{"after the broker"})
				stop()
			})
		}
	}
}

func TestLateReplyOfOneRequestIsNotTheNextOnesInAnyLanguage(t *testing.T) {
	programs := map[string]string{
		"python": `
import os, sys
from backbone import *
with BackboneClient() as client:
    try: client.send('peer', sys.argv[1:], 0.3)
    except RequestTimeout as error: print(type(error).__name__)
    os.open(sys.argv[2], os.O_RDWR)
    print(client.send('peer', 'second', 10))`,
		"javascript": `
const { BackboneClient } = require('backbone');
const client = new BackboneClient();
client.connect()
  .then(() => client.send('peer', process.argv.slice(1), 300)).catch(error => console.log(error.name))
  .then(() => require('fs').openSync(process.argv[2], 'r+'))
  .then(() => client.send('peer', 'second', 10000)).then(console.log);`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSite(t, "--heartbeat", "1s")
		s.serve("go")
		late, _ := s.late() // which the program lets come when it has given up
		if output, err := s.text(language, programs[language], late...).Output(); err != nil || string(output) != "RequestTimeout\nsecond\n" {
			t.Errorf("it prints %q, %v", output, err)
		}
	})
}

// TestCallsOfDispatchrBackboneStayTheSame has those that its README shows, after another
// line to import.
func TestCallsOfDispatchrBackboneStayTheSame(t *testing.T) {
	s := newSite(t, "--heartbeat", "1s")
	for _, service := range []*exec.Cmd{
		s.text("javascript", `
var { BackboneService } = require('backbone');
function on_request(message, reply){ reply(['javascript', message[0]]); }
var backbone = new BackboneService('js', on_request);
backbone.connect();`),
		s.text("python", `
from backbone import Service
def on_request(message, reply):
    reply(['python', message[0]])
backbone = Service('py', on_request)
backbone.start()`),
	} {
		if err := service.Start(); err != nil {
			t.Fatal(err)
		}
	}
	s.expect("js", []string{"message"}, "javascript", "message")
	s.expect("py", []string{"message"}, "python", "message")
	for _, test := range []struct{ language, text, want string }{
		{"javascript", `
var { BackboneClient } = require('backbone');
var bbc = new BackboneClient();
bbc.connect();
bbc.send('py', '/tmp').then(reply => {
	console.log(reply)
})`, "[ 'python', '/tmp' ]\n"},
		{"javascript", `
var { BackboneClient, BackboneClientMessage } = require('backbone');
var message = new BackboneClientMessage('py', 'x');
console.log(message.serialize().map(String), message.parseResponse(['MDPC01', 'py', 'y']), message.getReply());
console.log(new BackboneClient('h', '1').getEndpoint());`, "[ 'MDPC01', 'py', 'x' ] y y\ntcp://h:1\n"},
		{"javascript", `
var { BackboneClientMessage } = require('backbone');
var message = new BackboneClientMessage('s', 'x');
console.log(message.parseReply(['MDPC01', 's', Buffer.from([0xff])]), message.parseReply(['MDPC01', 's', 'y'], { simply_short_reply: false }));
try { message.parseReply(['MDPC01', 's', 'Error', 'why']) } catch (error) { console.log(error.name, error.status, String(error.stderr)) }`,
			"<Buffer ff> [ 'y' ]\nStatusError 1 why\n\n"},
		{"python", `
from backbone import BackboneClientMessage, StatusError
message = BackboneClientMessage('s', 'x')
print(message.parse_reply([b'MDPC01', b's', b'\xff']), message.parse_reply([b'MDPC01', b's', b'y'], simplify_short_reply=False))
try: message.parse_reply([b'MDPC01', b's', b'Error', b'why'])
except StatusError as error: print(error.status, error.stderr)`,
			"b'\\xff' ['y']\n1 b'why\\n'\n"},
		{"python", `
from backbone import BackboneClient, IOLoop
import os
def on_message(message):
    print(message, flush=True)
    os._exit(0)
bbc = BackboneClient('name', None, None)
bbc.send('js', '/tmp', on_message)
IOLoop.instance().start()`, "['javascript', '/tmp']\n"},
		{"python", `
from backbone import BackboneClient, BackboneClientMessage
message = BackboneClientMessage('py', 'x')
print(message.serialize(), message.parseResponse([b'MDPC01', b'py', b'y']), message.getReply())
print(BackboneClient('h', '1').get_endpoint(), BackboneClient('h', '1').endpoint)`,
			"[b'MDPC01', b'py', b'x'] y y\ntcp://h:1 tcp://h:1\n"},
	} {
		if output, err := s.text(test.language, test.text).Output(); err != nil || string(output) != test.want {
			t.Errorf("%s prints %q, %v, want %q", test.text, output, err, test.want)
		}
	}
}

func TestHeartbeatsGoOnWhileACallbackBlocksInAnyLanguage(t *testing.T) {
	inEachLanguage(t, func(t *testing.T, language string) {
		s, broker := rawSite(t)
		s.serve(language)
		worker, _ := broker.next()
		broker.send(worker, "", "MDPW01", "\x02", "client", "", "block", "3")
		heartbeats := 0
		message := broker.recv()
		for slices.Equal(message[1:], heartbeatFrames) {
			heartbeats++
			message = broker.recv()
		}
		broker.want(message, worker, "", "MDPW01", "\x03", "client", "", "blocked")
		if heartbeats < 2 {
			t.Errorf("%d heartbeats came in three seconds", heartbeats)
		}
	})
}

func TestProgramsInEveryLanguageBehaveLikeOurs(t *testing.T) {
	s := newSite(t, "--heartbeat", "1s")
	s.start("bservice", "args", "printf", "<%s>")
	s.start("bservice", "--stdin", "cat", "cat")
	s.start("bservice", "fail", "sh", "-c", "echo out; echo err >&2; exit 3")
	s.start("bservice", "killed", "sh", "-c", "kill -9 $$")
	s.serve("go")
	type result struct {
		stdout, stderr string
		status         int
	}
	run := func(t *testing.T, program []string, stdin string, args []string) result {
		t.Helper()
		cmd := exec.Command(program[0], append(program[1:len(program):len(program)], args...)...)
		cmd.Env, cmd.Stdin = s.peerEnv(), strings.NewReader(stdin)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return result{stdout.String(), stderr.String(), exitStatus(cmd.ProcessState)}
	}
	for language, l := range libraries {
		t.Run(language, func(t *testing.T) {
			s := &site{t, s.dir, s.endpoint, s.broker}
			program := []string{interpreter(t, language), l.library, "request"}
			for _, test := range []struct {
				stdin string
				args  []string
			}{
				{"unread", []string{"args", "a", "b c", ""}},
				{"unread", []string{"args", "--", "-l", "--"}},
				{"unread", []string{"args", "x", "-t"}},
				{"unread", []string{"--", "args", "-x"}},
				{"x\n\ny", []string{"args"}},
				{"x\n\n", []string{"args"}},
				{"", []string{"args"}},
				{"unread", []string{"-n", "args"}},
				{"a\nb\x00c\x00", []string{"-0", "args"}},
				{"a\n\x00\xff", []string{"--stdin", "cat"}},
				{"a\n", []string{"--stdin", "args", "x"}},
				{"", []string{"peer", "several", "", "frames"}},
				{"", []string{"--null", "peer", "several", "frames"}},
				{"", []string{"fail", "x"}},
				{"", []string{"killed", "x"}},
				{"", []string{"peer", "throw"}},
				{"", []string{"-t", "0.2", "nobody", "x"}},
				{"", []string{"--timeout=200ms", "--broker", "ipc://nobody", "x", "y"}},
				{"", []string{"--frobnicate", "x"}},
				{"", []string{"args", "--frobnicate", "x"}},
				{"", []string{"-t", "soon", "args", "x"}},
				{"", []string{"-t"}},
				{"", []string{}},
			} {
				want := run(t, []string{"brequest"}, test.stdin, test.args)
				got := run(t, program, test.stdin, test.args)
				if got.stdout != want.stdout || got.status != want.status || (got.stderr == "") != (want.stderr == "") {
					t.Errorf("%q gives %q, brequest %q", test.args, got, want)
				}
			}
			interrupted := s.run(language, l.library, "request", "-t", "0", "nobody", "x")
			if err := interrupted.Start(); err != nil {
				t.Fatal(err)
			}
			s.becomes("backbone_queue_length", 1)
			interrupted.Process.Signal(syscall.SIGTERM)
			interrupted.Wait()
			if status := exitStatus(interrupted.ProcessState); status != 143 {
				t.Errorf("SIGTERM ends it with %d", status)
			}
			s.becomes("backbone_queue_length", 0)
		})
	}
}

func TestClientsInEveryLanguageTellALostBrokerFromABadOne(t *testing.T) {
	inEachLanguage(t, func(t *testing.T, language string) {
		ask := func(s *site) *exec.Cmd {
			cmd := s.run(language, libraries[language].library, "request", "-t", "20", "nobody", "x")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			return cmd
		}
		s := newSite(t, "--heartbeat", "1s")
		lost := ask(s)
		s.becomes("backbone_queue_length", 1)
		s.broker.signal(syscall.SIGKILL)
		s.broker.status()
		lost.Wait()
		if got := exitStatus(lost.ProcessState); got != exitUnavailable {
			t.Errorf("without its broker it ends with %d", got)
		}

		s, babbler := rawSite(t)
		misled := ask(s)
		babbler.send(babbler.recv()[0], "", "MDPC01", "somebody else", "y")
		misled.Wait()
		if got := exitStatus(misled.ProcessState); got != exitProtocol {
			t.Errorf("after the reply of another service it ends with %d", got)
		}
	})
}

func TestCommandServicesInEveryLanguageBehaveLikeOurs(t *testing.T) {
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSite(t, "--heartbeat", "1s")
		start := func(args ...string) *exec.Cmd {
			cmd := s.run(language, append([]string{libraries[language].library, "service"}, args...)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			return cmd
		}
		args := start("args", "printf", "<%s>")
		start("--stdin", "--quiet", "cat", "cat")
		start("fail", "sh", "-c", "echo out; echo err >&2; exit 3")
		start("killed", "sh", "-c", "kill -9 $$")
		start("missing", "/no/such/command")
		start("directory", "/")
		s.expect("args", []string{"a", "-l", ""}, "<a><-l><>")
		s.expect("cat", []string{"a\n\x00\xff"}, "a\n\x00\xff")
		s.expect("fail", nil, "out\n", "err\n", "exit status 3")
		s.expect("killed", nil, "", "", "exit status 137")
		for _, refused := range []struct{ name, arg, want string }{
			{"missing", "x", "exit status 127"}, {"directory", "x", "exit status 126"}, {"args", "nul\x00", "exit status 126"},
		} {
			if reply, err := s.ask(refused.name, refused.arg); err != nil || len(reply) != 3 || reply[2] != refused.want {
				t.Errorf("%s: %q, %v, want %s", refused.name, reply, err, refused.want)
			}
		}
		args.Process.Signal(syscall.SIGTERM)
		if err := args.Wait(); err != nil {
			t.Errorf("SIGTERM ends it with %v", err)
		}
	})
}

func TestLastWordsOfABrokerAreHeardInAnyLanguage(t *testing.T) {
	programs := map[string]string{
		"python": `
import sys
from backbone import BackboneClient
for endpoint in sys.argv[1:]:
    print(BackboneClient(broker=endpoint).send('echo', 'x', 10))`,
		"javascript": `
const { BackboneClient } = require('backbone');
(async () => {
  for (const broker of process.argv.slice(1)) {
    console.log(await new BackboneClient(null, null, { broker }).send('echo', 'x', 10000));
  }
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		interpreter(t, language) // before there are brokers to wait for it
		var endpoints []string
		var spoken []<-chan []string
		for range 30 {
			broker, endpoint := bindPeer(t)
			if err := broker.SetLinger(time.Second); err != nil {
				t.Fatal(err)
			}
			spoken = append(spoken, serveOnce(broker, func(request []string) []string {
				broker.SendMessage(request[0], "", "MDPC01", "echo", "last words")
				broker.Close()
				return nil
			}))
			endpoints = append(endpoints, endpoint)
		}
		output, err := bareSite(t).text(language, programs[language], endpoints...).Output()
		if err != nil || string(output) != strings.Repeat("last words\n", len(endpoints)) {
			t.Fatalf("it prints %q, %v", output, err)
		}
		for _, came := range spoken {
			<-came
		}
	})
}

func TestSilentBrokerIsLeftOnlyByTheIdleInAnyLanguage(t *testing.T) {
	inEachLanguage(t, func(t *testing.T, language string) {
		s, broker := rawSite(t)
		s.serve(language)
		worker, ready := broker.next()
		broker.want(ready, "", "MDPW01", "\x01", "peer")
		broker.send(worker, "", "MDPW01", "\x02", "client", "", "block", "5.5")
		same, reply := broker.next()
		broker.want(append([]string{same}, reply...), worker, "", "MDPW01", "\x03", "client", "", "blocked")
		other, ready := broker.next()
		broker.want(ready, "", "MDPW01", "\x01", "peer")
		if other == worker {
			t.Error("it registers anew on the same socket")
		}
	})
}

func TestSecondReplyIsNobodysInAnyLanguage(t *testing.T) {
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSite(t, "--heartbeat", "1s")
		s.serve(language)
		s.expect("peer", []string{"twice"}, "first")
		s.expect("peer", []string{"late"}, "late")
		s.expect("peer", []string{"hello"}, "hello")
	})
}

// An rfc7 peer is one of testdata/peers/rfc7_*.py.
func (s *site) rfc7(name string, args ...string) *exec.Cmd {
	return s.peer("python", "rfc7_"+name, append([]string{s.endpoint}, args...)...)
}

func TestPeersThatKnowNothingButRFC7(t *testing.T) {
	background := func(t *testing.T, cmd *exec.Cmd) {
		t.Helper()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
	t.Run("a REQ client and a worker that cannot heartbeat while busy", func(t *testing.T) {
		t.Parallel()
		s := newSite(t) // whose workers are lost after half a second
		background(t, s.rfc7("worker", "slow", "1"))
		output, err := s.rfc7("client", "slow", "a", "b").Output()
		if err != nil || string(output) != "a\nb\n" {
			t.Errorf("it prints %q, %v", output, err)
		}
		s.expect("slow", []string{"c"}, "c")
	})
	t.Run("a broker", func(t *testing.T) {
		t.Parallel()
		s := bareSite(t)
		background(t, s.rfc7("broker"))
		s.start("bservice", "args", "printf", "<%s>")
		s.start("bservice", "fail", "sh", "-c", "echo out; echo err >&2; exit 3")
		s.expect("args", []string{"a", "b"}, "<a><b>")
		s.expect("fail", nil, "out\n", "err\n", "exit status 3")
		lines := exec.Command("brequest", "-e", "-j1", "args")
		lines.Env, lines.Stdin = s.peerEnv(), strings.NewReader("1\n2\n")
		if output, err := lines.CombinedOutput(); err != nil || string(output) != "<1>\n<2>\n" {
			t.Errorf("it prints %q, %v", output, err)
		}
		for language := range libraries {
			t.Run(language, func(t *testing.T) {
				s := &site{t: t, dir: s.dir, endpoint: s.endpoint}
				stop := s.serve(language)
				for i, got := range s.asks(language, 20, []string{"x", ""}, []string{"fail"}) {
					if want := []string{`["78" ""]`, "StatusError 3 6f7574ff 6572720a"}[i]; got != want {
						t.Errorf("got %s, want %s", got, want)
					}
				}
				stop()
			})
		}
	})
}
