package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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

// The tests in this file run clients, services and brokers in other languages: scripts/backbone.py
// and scripts/backbone.js, with each other and with the Go ones, and peers written from RFC 7.

// interpreter returns the path of an interpreter that has ZeroMQ, or skips the test.
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
	t.Skipf("no %s with ZeroMQ is installed; run scripts/bootstrap --all", language)
	return ""
}

// peerEnv returns an environment in which a program in another language finds the libraries and the
// broker.
func (s *system) peerEnv() []string {
	s.t.Helper()
	root, err := os.Getwd()
	if err != nil {
		s.t.Fatal(err)
	}
	// A link makes backbone.js a module that can be required by its name.
	modules := filepath.Join(s.dir, "node_modules")
	os.Mkdir(modules, 0o700)
	os.Symlink(filepath.Join(root, "scripts", "backbone.js"), filepath.Join(modules, "backbone.js"))
	return append(os.Environ(), "BACKBONE_BROKER="+s.endpoint, "GORACE=atexit_sleep_ms=0", "PYTHONDONTWRITEBYTECODE=1",
		"PYTHONPATH="+filepath.Join(root, "scripts"), "NODE_PATH="+modules+":"+filepath.Join(root, "scripts", "node_modules"))
}

// libraries lists the languages that have a library: the extension of their programs, the library,
// which is also a program, and the interpreter flag that runs the text of a program.
var libraries = map[string]struct{ extension, library, textFlag string }{
	"python":     {".py", "scripts/backbone.py", "-c"},
	"javascript": {".js", "scripts/backbone.js", "-e"},
}

// startDialogue starts a program, and returns its standard input and the lines of its output.
func startDialogue(t testing.TB, program *exec.Cmd) (input io.WriteCloser, lines *bufio.Scanner) {
	t.Helper()
	input, err := program.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := program.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	return input, bufio.NewScanner(output)
}

// inEachLanguage runs a test for the library of each language, in parallel.
func inEachLanguage(t *testing.T, test func(t *testing.T, language string)) {
	for language := range libraries {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			test(t, language)
		})
	}
}

// command returns a command that runs the interpreter of a language. If it is started, it is killed
// at the end of the test, or after two minutes.
func (s *system) command(language string, args ...string) *exec.Cmd {
	s.t.Helper()
	ctx, kill := context.WithTimeout(context.Background(), 2*time.Minute)
	s.t.Cleanup(kill)
	cmd := exec.CommandContext(ctx, interpreter(s.t.(*testing.T), language), args...)
	cmd.Env, cmd.Stderr = s.peerEnv(), os.Stderr
	return cmd
}

// peerCommand returns a command that runs a program in testdata/peers.
func (s *system) peerCommand(language, name string, args ...string) *exec.Cmd {
	s.t.Helper()
	return s.command(language, append([]string{"testdata/peers/" + name + libraries[language].extension}, args...)...)
}

// inlineCommand returns a command that runs the text of a program.
func (s *system) inlineCommand(language, program string, args ...string) *exec.Cmd {
	s.t.Helper()
	return s.command(language, append([]string{libraries[language].textFlag, program}, args...)...)
}

// newSystemWithRawBroker returns a system whose broker is a raw ROUTER.
func newSystemWithRawBroker(t *testing.T) (*system, peer) {
	t.Helper()
	s, broker := newSystemWithoutBroker(t), newPeer(t, zmq.ROUTER)
	if err := broker.Bind(s.endpoint); err != nil {
		t.Fatal(err)
	}
	return s, broker
}

// startServiceIn starts a service named peer, written in a language, that behaves like peerHandler.
// stop lets it disconnect and waits for its end.
func (s *system) startServiceIn(language string) (stop func()) {
	s.t.Helper()
	if language == "go" {
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		service := newService("peer", s.endpoint, peerHandler)
		service.heartbeatFlags = heartbeatFlags{Heartbeat: time.Second, Liveness: 5}
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
	cmd := s.peerCommand(language, "service", "peer")
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

// peerHandler behaves like testdata/peers/service.*: the first frame of a request says what to do.
func peerHandler(_ string, body [][]byte) Reply {
	action := ""
	if len(body) > 0 {
		action = string(body[0])
	}
	switch action {
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

// lateRequest returns a request that the service of any language answers when release is called.
func (s *system) lateRequest() (request []string, release func()) {
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
	s.t.Cleanup(release) // the service cannot end before
	return []string{"late", gate}, release
}

// A peerRequest is a line of input for testdata/peers/client.*, a peerResult a line of its output.
type (
	peerRequest struct {
		Service string   `json:"service"`
		Message []string `json:"message"` // in hexadecimal, like the frames and bytes of a result
		Timeout float64  `json:"timeout"`
	}
	peerResult struct {
		Reply          []string
		Error          string
		Status         int
		Stdout, Stderr string
	}
)

// hexFrames returns the frames in hexadecimal.
func hexFrames(frames []string) []string {
	coded := []string{}
	for _, frame := range frames {
		coded = append(coded, hex.EncodeToString([]byte(frame)))
	}
	return coded
}

// requestFrom sends requests with the client of a language, concurrently if it can. It returns a
// description of each result: the reply, or the error and its status.
func (s *system) requestFrom(language string, timeout float64, bodies ...[]string) []string {
	s.t.Helper()
	results := make([]peerResult, len(bodies))
	if language == "go" {
		client := newBatchClient(s.t.(*testing.T), s.endpoint)
		var calls []*call
		for _, body := range bodies {
			calls = append(calls, &call{service: "peer", body: frames(body...), timeout: time.Duration(timeout * float64(time.Second))})
			client.Begin(calls[len(calls)-1])
		}
		awaitAll(s.t.(*testing.T), client, calls)
		client.Abandon()
		for i, c := range calls {
			result := &results[i]
			switch {
			case errors.Is(c.err, errTimeout):
				result.Error, result.Status = "RequestTimeout", exitTimeout
			case c.err != nil:
				result.Error, result.Status = c.err.Error(), 1
			case c.reply.Status != 0:
				*result = peerResult{nil, "StatusError", c.reply.Status, hex.EncodeToString(c.reply.Output[0]), hex.EncodeToString(c.reply.Stderr)}
			default:
				result.Reply = hexFrames(spell(c.reply.Output))
			}
		}
	} else {
		var input bytes.Buffer
		for _, body := range bodies {
			json.NewEncoder(&input).Encode(peerRequest{"peer", hexFrames(body), timeout})
		}
		args := []string{}
		if language == "asyncio" {
			language, args = "python", []string{"asyncio"}
		}
		cmd := s.peerCommand(language, "client", args...)
		cmd.Stdin = &input
		output, err := cmd.Output()
		if err != nil {
			s.t.Fatalf("the client ended with %v", err)
		}
		decoder := json.NewDecoder(bytes.NewReader(output))
		for i := range results {
			if err := decoder.Decode(&results[i]); err != nil {
				s.t.Fatalf("%v in %q", err, output)
			}
		}
	}
	var descriptions []string
	for _, result := range results {
		if result.Error == "" {
			descriptions = append(descriptions, fmt.Sprintf("%q", result.Reply))
		} else {
			descriptions = append(descriptions, strings.TrimSpace(fmt.Sprintf("%s %d %s %s", result.Error, result.Status, result.Stdout, result.Stderr)))
		}
	}
	return descriptions
}

func TestPeersInEveryLanguageUnderstandEachOther(t *testing.T) {
	t.Parallel()
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
				s := newSystem(t, "--heartbeat", "1s")
				stop := s.startServiceIn(service)
				expect := func(timeout float64, bodies [][]string, want ...string) {
					t.Helper()
					for i, got := range s.requestFrom(client, timeout, bodies...) {
						if got != want[i] {
							t.Errorf("the result of %.60q is %.200s, want %.200s", bodies[i], got, want[i])
						}
					}
				}
				same := func(bodies ...[]string) {
					t.Helper()
					var want []string
					for _, body := range bodies {
						want = append(want, fmt.Sprintf("%q", hexFrames(body)))
					}
					expect(20, bodies, want...)
				}
				same([]string{"hello"}, []string{binary.String()}, []string{}, []string{""}, []string{"", "x", ""}, many)
				boom := map[string]string{"python": "ValueError"}[service]
				if boom == "" {
					boom = "RangeError"
				}
				expect(20, [][]string{{"fail"}, {"throw"}},
					"StatusError 3 6f7574ff 6572720a", "StatusError 1  "+hexFrames([]string{boom + ": boom\n"})[0])
				late, release := s.lateRequest()
				expect(0.3, [][]string{late}, "RequestTimeout 124")
				release()

				hundreds := [][]string{}
				for i := range 200 {
					hundreds = append(hundreds, []string{fmt.Sprint(i)})
				}
				same(hundreds...)

				stop()
				s.waitForMetric("backbone_workers", 0)
				if lost := s.metric("backbone_lost_workers_total"); lost != 0 {
					t.Errorf("the service ended without DISCONNECT")
				}
				stop = s.startServiceIn(service)
				same([]string{"after the service"})
				s.broker.signal(syscall.SIGKILL)
				s.broker.waitForExit()
				s.broker = s.start("bbroker", "--heartbeat", "1s")
				same([]string{"after the broker"})
				stop()
			})
		}
	}
}

func TestLateReplyOfOneRequestIsNotTheNextOnesInAnyLanguage(t *testing.T) {
	t.Parallel()
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
		s := newSystem(t, "--heartbeat", "1s")
		s.startServiceIn("go")
		late, _ := s.lateRequest() // the program releases it after its timeout
		if output, err := s.inlineCommand(language, programs[language], late...).Output(); err != nil || string(output) != "RequestTimeout\nsecond\n" {
			t.Errorf("it printed %q, %v", output, err)
		}
	})
}

// TestAPIOfDispatchrBackboneStillWorks makes the calls that the README of Dispatchr Backbone shows.
// Only the imports differ.
func TestAPIOfDispatchrBackboneStillWorks(t *testing.T) {
	t.Parallel()
	s := newSystem(t, "--heartbeat", "1s")
	for _, service := range []*exec.Cmd{
		s.inlineCommand("javascript", `
var { BackboneService } = require('backbone');
function on_request(message, reply){ reply(['javascript', message[0]]); }
var backbone = new BackboneService('js', on_request);
backbone.connect();`),
		s.inlineCommand("python", `
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
		if output, err := s.inlineCommand(test.language, test.text).Output(); err != nil || string(output) != test.want {
			t.Errorf("%s printed %q, %v, want %q", test.text, output, err, test.want)
		}
	}
}

func TestHeartbeatsGoOnWhileACallbackBlocksInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, broker := newSystemWithRawBroker(t)
		s.startServiceIn(language)
		worker, _ := broker.nextFromWorker()
		broker.send(worker, "", "MDPW01", "\x02", "client", "", "block", "3")
		heartbeats := 0
		message := broker.recv()
		for slices.Equal(message[1:], heartbeatFrames) {
			heartbeats++
			message = broker.recv()
		}
		broker.want(message, worker, "", "MDPW01", "\x03", "client", "", "blocked")
		if heartbeats < 2 {
			t.Errorf("%d heartbeats in three seconds, want 2 or more", heartbeats)
		}
	})
}

func TestClientProgramsInEveryLanguageBehaveLikeBrequest(t *testing.T) {
	t.Parallel()
	s := newSystem(t, "--heartbeat", "1s")
	s.start("bservice", "args", "printf", "<%s>")
	s.start("bservice", "--stdin", "cat", "cat")
	s.start("bservice", "fail", "sh", "-c", "echo out; echo err >&2; exit 3")
	s.start("bservice", "killed", "sh", "-c", "kill -9 $$")
	s.startServiceIn("go")
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
			s := &system{t, s.dir, s.endpoint, s.broker}
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
					t.Errorf("%q: got %q, want %q as from brequest", test.args, got, want)
				}
			}
			interrupted := s.command(language, l.library, "request", "-t", "0", "nobody", "x")
			if err := interrupted.Start(); err != nil {
				t.Fatal(err)
			}
			s.waitForMetric("backbone_queue_length", 1)
			interrupted.Process.Signal(syscall.SIGTERM)
			interrupted.Wait()
			if status := exitStatus(interrupted.ProcessState); status != 143 {
				t.Errorf("after SIGTERM it ended with status %d", status)
			}
			s.waitForMetric("backbone_queue_length", 0)
		})
	}
}

func TestClientsInEveryLanguageTellALostBrokerFromABadOne(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		startRequest := func(s *system) *exec.Cmd {
			cmd := s.command(language, libraries[language].library, "request", "-t", "20", "nobody", "x")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			return cmd
		}
		s := newSystem(t, "--heartbeat", "1s")
		lost := startRequest(s)
		s.waitForMetric("backbone_queue_length", 1)
		s.broker.signal(syscall.SIGKILL)
		s.broker.waitForExit()
		lost.Wait()
		if got := exitStatus(lost.ProcessState); got != exitUnavailable {
			t.Errorf("without its broker it ended with status %d", got)
		}

		s, broker := newSystemWithRawBroker(t)
		misled := startRequest(s)
		broker.send(broker.recv()[0], "", "MDPC01", "somebody else", "y")
		misled.Wait()
		if got := exitStatus(misled.ProcessState); got != exitProtocol {
			t.Errorf("after the reply of another service it ended with status %d", got)
		}
	})
}

func TestServiceProgramsInEveryLanguageBehaveLikeBservice(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		start := func(args ...string) *exec.Cmd {
			cmd := s.command(language, append([]string{libraries[language].library, "service"}, args...)...)
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
			if reply, err := s.request(refused.name, refused.arg); err != nil || len(reply) != 3 || reply[2] != refused.want {
				t.Errorf("%s: %q, %v, want %s", refused.name, reply, err, refused.want)
			}
		}
		args.Process.Signal(syscall.SIGTERM)
		if err := args.Wait(); err != nil {
			t.Errorf("after SIGTERM it ended with %v", err)
		}
	})
}

func TestReplyJustBeforeABrokerClosesIsReceivedInAnyLanguage(t *testing.T) {
	t.Parallel()
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
		interpreter(t, language) // may skip the test, before any broker waits for a request
		var endpoints []string
		var answered []<-chan []string
		for range 30 {
			broker, endpoint := bindPeer(t)
			if err := broker.SetLinger(time.Second); err != nil {
				t.Fatal(err)
			}
			answered = append(answered, answerOnce(broker, func(request []string) []string {
				broker.SendMessage(request[0], "", "MDPC01", "echo", "last words")
				broker.Close()
				return nil
			}))
			endpoints = append(endpoints, endpoint)
		}
		output, err := newSystemWithoutBroker(t).inlineCommand(language, programs[language], endpoints...).Output()
		if err != nil || string(output) != strings.Repeat("last words\n", len(endpoints)) {
			t.Fatalf("it printed %q, %v", output, err)
		}
		for _, request := range answered {
			<-request
		}
	})
}

func TestOnlyAnIdleServiceLeavesASilentBrokerInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, broker := newSystemWithRawBroker(t)
		s.startServiceIn(language)
		worker, ready := broker.nextFromWorker()
		broker.want(ready, "", "MDPW01", "\x01", "peer")
		broker.send(worker, "", "MDPW01", "\x02", "client", "", "block", "5.5")
		same, reply := broker.nextFromWorker()
		broker.want(append([]string{same}, reply...), worker, "", "MDPW01", "\x03", "client", "", "blocked")
		other, ready := broker.nextFromWorker()
		broker.want(ready, "", "MDPW01", "\x01", "peer")
		if other == worker {
			t.Error("it registered again with the same identity")
		}
	})
}

// handlers are services named peer. The first frame of a request names the handler.
var handlers = map[string]string{
	"python": `
import asyncio, sys, threading
from backbone import *
class Unprintable(Exception):
    def __str__(self): raise ValueError
class handlers:
    def hello(reply): reply('hello')
    def nothing(reply): pass
    def number(reply): return 42
    async def promise(reply): await asyncio.sleep(0)
    def forget(reply): threading.Timer(0.2, lambda kept: None, [reply]).start()
    def cycle(reply):
        def itself(): return itself, reply
    def text(reply): return 'text'
    def several(reply): return ['several', b'frames']
    async def later(reply): return 'later'
    def both(reply):
        reply('called')
        return 'returned'
    def timer(reply):
        timer = threading.Timer(0.2, reply, ['timer'])
        timer.start()
        return timer
    def unsendable(reply): reply('\ud800')
    def unsendable_result(reply): return '\ud800'
    def unsendable_later(reply): threading.Timer(0.1, reply, ['\ud800']).start()
    def exit(reply): sys.exit(3)
    def unprintable(reply): raise Unprintable()
    def status(reply): raise StatusError(-9, b'', b'signal')
BackboneService('peer', lambda message, reply: getattr(handlers, message[0])(reply)).start()`,
	"javascript": `
const { BackboneService, StatusError } = require('backbone');
const unsendable = Object.create(null);
const handlers = {
  hello: reply => reply('hello'),
  nothing: () => {},
  number: () => 42,
  promise: async () => {},
  forget: reply => { setTimeout(kept => {}, 200, reply); },
  cycle: async reply => { await new Promise(() => reply); },
  text: () => 'text',
  several: () => ['several', Buffer.from('frames')],
  later: async () => 'later',
  both: reply => { reply('called'); return 'returned'; },
  timer: reply => setTimeout(reply, 200, 'timer'),
  unsendable: reply => reply(unsendable),
  unsendable_result: () => [unsendable],
  unsendable_later: reply => { setTimeout(reply, 100, unsendable); },
  exit: () => { throw undefined; },
  unprintable: () => { throw unsendable; },
  status: () => { throw new StatusError(-9, '', 'signal'); },
};
new BackboneService('peer', (message, reply) => handlers[message[0]](reply)).connect();`,
}

// startHandlers starts the handlers of a language. log ends them and returns what they logged.
func startHandlers(t *testing.T, language string) (s *system, log func() string) {
	t.Helper()
	s = newSystem(t, "--heartbeat", "1s")
	service, logged := s.inlineCommand(language, handlers[language]), &strings.Builder{}
	service.Stderr = logged
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	return s, func() string {
		service.Process.Kill()
		service.Wait()
		return logged.String()
	}
}

func TestHandlerThatEndsWithoutReplyFailsTheRequestInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, log := startHandlers(t, language)
		handlers := []string{"nothing", "number", "promise", "forget", "cycle"}
		for _, handler := range handlers {
			reply, err := s.request("peer", handler)
			if err != nil || len(reply) != 3 || !strings.HasPrefix(reply[1], "peer: on_request ended without a reply") || reply[2] != "exit status 1" {
				t.Errorf("%s: the reply is %q, %v", handler, reply, err)
			}
		}
		s.expect("peer", []string{"hello"}, "hello")
		if log := log(); strings.Count(log, "peer: on_request ended without a reply") != len(handlers) {
			t.Errorf("the log is %q", log)
		}
	})
}

func TestHandlerMayReturnTheReplyInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, log := startHandlers(t, language)
		s.expect("peer", []string{"text"}, "text")
		s.expect("peer", []string{"several"}, "several", "frames")
		s.expect("peer", []string{"later"}, "later")
		s.expect("peer", []string{"both"}, "called")
		s.expect("peer", []string{"timer"}, "timer")
		if log := log(); log != "" {
			t.Errorf("the log is %q", log)
		}
	})
}

func TestReplyThatCannotBeSentFailsTheRequestInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, log := startHandlers(t, language)
		handlers := []string{"unsendable", "unsendable_result", "unsendable_later"}
		for _, handler := range handlers {
			reply, err := s.request("peer", handler)
			if err != nil || len(reply) != 3 || !strings.HasPrefix(reply[1], "peer: cannot send ") || reply[2] != "exit status 1" {
				t.Errorf("%s: the reply is %q, %v", handler, reply, err)
			}
		}
		s.expect("peer", []string{"hello"}, "hello")
		if log := log(); strings.Count(log, "peer: cannot send ") != len(handlers) {
			t.Errorf("the log is %q", log)
		}
	})
}

func TestEveryExceptionOfAHandlerFailsTheRequestInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, _ := startHandlers(t, language)
		for _, handler := range []string{"exit", "unprintable", "status"} {
			if reply, err := s.request("peer", handler); err != nil || len(reply) != 3 || reply[1] == "" || reply[2] != "exit status 1" {
				t.Errorf("%s: the reply is %q, %v", handler, reply, err)
			}
		}
		s.expect("peer", []string{"hello"}, "hello")
	})
}

// A startedService is a program that calls start. Its handler says begun, and replies after a line of
// input. After start the program tells whether the handlers of signals are as they were.
type startedService struct {
	*exec.Cmd
	input  io.Writer
	output *bufio.Scanner
	worker string
}

// callStart starts such a program with a raw broker, and sends a request to it.
func callStart(t *testing.T, language string) (service startedService, broker peer) {
	t.Helper()
	s, broker := newSystemWithRawBroker(t)
	service.Cmd = s.inlineCommand(language, map[string]string{
		"python": `
import signal
from backbone import *
before = signal.SIG_DFL, signal.default_int_handler
signal.signal(signal.SIGINT, before[1])  # it may have been ignored
def on_request(message, reply):
    print('begun', flush=True)
    input()
    reply('replied')
BackboneService('peer', on_request).start()
print('restored' if (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before else 'changed')`,
		"javascript": `
const { BackboneService } = require('backbone');
new BackboneService('peer', (message, reply) => {
  console.log('begun');
  process.stdin.once('data', () => { process.stdin.destroy(); reply('replied'); });
}).start().then(() => console.log(process.listenerCount('SIGTERM') + process.listenerCount('SIGINT') ? 'changed' : 'restored'));`,
	}[language])
	input, err := service.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := service.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	service.input, service.output = input, bufio.NewScanner(output)
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	service.worker, _ = broker.nextFromWorker()
	broker.send(toWorker(service.worker, "client")...)
	service.says(t, "begun")
	return service, broker
}

func (s startedService) says(t *testing.T, want string) {
	t.Helper()
	if s.output.Scan(); s.output.Text() != want {
		t.Fatalf("it printed %q, want %q", s.output.Text(), want)
	}
}

func TestSignalEndsStartCleanlyInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
			service, broker := callStart(t, language)
			service.Process.Signal(signal)
			fmt.Fprintln(service.input)
			_, reply := broker.nextFromWorker()
			broker.want(reply, "", "MDPW01", "\x03", "client", "", "replied")
			_, farewell := broker.nextFromWorker()
			broker.want(farewell, "", "MDPW01", "\x05")
			service.says(t, "restored")
			if err := service.Wait(); err != nil {
				t.Errorf("after %v it ended with %v", signal, err)
			}
		}
	})
}

func TestSecondSignalEndsStartAtOnceInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		service, _ := callStart(t, language)
		ended := make(chan error, 1)
		go func() { ended <- service.Wait() }()
		for signals := 0; ; signals++ { // one that comes before the first was handled is not a second one
			service.Process.Signal(syscall.SIGTERM)
			select {
			case <-ended:
				if status := exitStatus(service.ProcessState); status != 143 || signals == 0 {
					t.Errorf("after %d signals it ended with status %d", signals+1, status)
				}
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
}

func TestStartLeavesHandlersOfTheProgramAloneInAnyLanguage(t *testing.T) {
	t.Parallel()
	programs := map[string]string{
		"python": `
import os, signal
from backbone import *
before = signal.getsignal(signal.SIGTERM)
try: BackboneService('peer', print, broker='tcp://x:y').start()
except UsageError: print(signal.getsignal(signal.SIGTERM) is before)
signal.signal(signal.SIGINT, signal.SIG_IGN)
def mine(*_):
    service.disconnect()
    print('mine', flush=True)
signal.signal(signal.SIGTERM, mine)
service = BackboneService('peer', lambda message, reply: reply([str(os.getpid())]))
service.start()
print(signal.getsignal(signal.SIGTERM) is mine, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)`,
		"javascript": `
const { BackboneService } = require('backbone');
(async () => {
  await new BackboneService('peer', () => {}, { broker: 'tcp://x:y' }).start().catch(() => {});
  console.log(process.listenerCount('SIGTERM') === 0);
  process.on('SIGINT', () => {});
  process.on('SIGTERM', () => { service.disconnect(); console.log('mine'); });
  const service = new BackboneService('peer', () => String(process.pid));
  await service.start();
  console.log(process.listenerCount('SIGTERM') === 1, process.listenerCount('SIGINT') === 1);
  process.exit();
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		service, output := s.inlineCommand(language, programs[language]), &strings.Builder{}
		service.Stdout = output
		if err := service.Start(); err != nil {
			t.Fatal(err)
		}
		pid := fmt.Sprint(service.Process.Pid)
		s.expect("peer", nil, pid)
		service.Process.Signal(syscall.SIGINT)
		s.expect("peer", nil, pid)
		service.Process.Signal(syscall.SIGTERM)
		if err := service.Wait(); err != nil || strings.ToLower(output.String()) != "true\nmine\ntrue true\n" {
			t.Errorf("it printed %q, %v", output, err)
		}
	})
}

// zeromq rejects what it was asked for with EAGAIN if the connection breaks at that moment.
func TestClientAsksZeroMQAgainAfterEAGAIN(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	s.startShellService("echo", `printf %s "$1"`)
	output, err := s.inlineCommand("javascript", `
const { Dealer } = require('zeromq');
for (const name of ['send', 'receive']) {
  const original = Dealer.prototype[name];
  let calls = 0;
  Object.defineProperty(Dealer.prototype, name, { value(...args) {
    return calls++ ? original.apply(this, args) : Promise.reject(Object.assign(new Error(name), { code: 'EAGAIN' }));
  } });
}
const { BackboneClient } = require('backbone');
new BackboneClient().send('echo', 'again').then(reply => console.log(String(reply)), console.log).finally(process.exit);`).Output()
	if err != nil || string(output) != "again\n" {
		t.Errorf("it printed %q, %v", output, err)
	}
}

func TestCloseEndsClientsAndServicesInAnyLanguage(t *testing.T) {
	t.Parallel()
	programs := map[string]string{
		"python": `
import asyncio
from backbone import *
async def ask():
    async with AsyncBackboneClient() as client: print(await client.send('peer', '', 20))
with BackboneService('peer', lambda message, reply: 'one'): asyncio.run(ask())
service, client = BackboneService('peer', lambda message, reply: 'two').connect(), BackboneClient()
print(client.send('peer', '', 20))
service.close()
client.close()
input()`,
		"javascript": `
const { BackboneClient, BackboneService } = require('backbone');
(async () => {
  for (const reply of ['one', 'two']) {
    const service = new BackboneService('peer', () => reply).connect(), client = new BackboneClient();
    console.log(await client.send('peer', '', 20000));
    await service.close();
    await client.close();
  }
  process.stdin.once('data', () => process.stdin.destroy());
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		program := s.inlineCommand(language, programs[language])
		input, replies := startDialogue(t, program)
		for _, want := range []string{"one", "two"} {
			if replies.Scan(); replies.Text() != want {
				t.Errorf("the reply is %q, want %q", replies.Text(), want)
			}
		}
		s.waitForMetric("backbone_workers", 0)
		if lost := s.metric("backbone_lost_workers_total"); lost != 0 {
			t.Error("a service ended without DISCONNECT")
		}
		fmt.Fprintln(input)
		if err := program.Wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestSecondReplyIsDroppedInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		s.startServiceIn(language)
		s.expect("peer", []string{"twice"}, "first")
		s.expect("peer", []string{"late"}, "late")
		s.expect("peer", []string{"hello"}, "hello")
	})
}

func TestEveryErrorIsABackboneErrorInAnyLanguage(t *testing.T) {
	t.Parallel()
	programs := map[string]string{
		"python": `
import os, sys, zmq
from backbone import *
def attempt(act):
    try: print(act())
    except BackboneError as error: print(type(error).__name__, error.status, error)
attempt(lambda: BackboneClient(broker='nonsense'))
attempt(lambda: BackboneService('x', print, broker='nonsense'))
attempt(lambda: BackboneClient('localhost', 65536))
attempt(lambda: BackboneClient(broker='tcp://x:y').send('peer', ''))
attempt(lambda: BackboneService('x', print, broker='tcp://x:y').start())
attempt(lambda: BackboneClient('no.such.host.invalid').send('peer', '', 0.1))
attempt(lambda: BackboneClient().send('peer', '\ud800'))
attempt(lambda: BackboneClient().send('peer', '', 'soon'))
attempt(lambda: BackboneClient().send('peer', '', float('nan')))
os.environ['BACKBONE_PORT'] = 'tcp://10.0.0.1:5555'
attempt(lambda: BackboneClient('localhost'))
del os.environ['BACKBONE_PORT']
taken = []
try:
    while True: taken.append(zmq.Context.instance().socket(zmq.PAIR))
except zmq.ZMQError: pass
attempt(lambda: BackboneClient(broker='ipc://x').send('peer', ''))
attempt(lambda: BackboneClient(broker='ipc://x').connect())
attempt(lambda: BackboneService('x', print, broker='ipc://x').start())`,
		"javascript": `
const { BackboneClient, BackboneService, BackboneError } = require('backbone');
const client = (host, port, broker) => new BackboneClient(host, port, { broker });
const service = broker => new BackboneService('x', () => {}, { broker });
async function attempt(act) {
  try { console.log(await act()); } catch (error) {
    if (error instanceof BackboneError) console.log(error.name, error.status, error.message);
    else throw error;
  }
}
(async () => {
  await attempt(() => client(null, null, 'nonsense'));
  await attempt(() => service('nonsense'));
  await attempt(() => client('localhost', 65536));
  await attempt(() => client(null, null, 'tcp://x:y').send('peer', ''));
  await attempt(() => service('tcp://x:y').connect());
  await attempt(() => client('no.such.host.invalid').send('peer', '', 100));
  await attempt(() => client().send('peer', { toString() { throw new Error('why'); } }));
  await attempt(() => client().send('peer', '', 'soon'));
  await attempt(() => client().send('peer', '', NaN));
  process.env.BACKBONE_PORT = 'tcp://10.0.0.1:5555';
  await attempt(() => client('localhost'));
  delete process.env.BACKBONE_PORT;
  const taken = [];
  try { for (;;) taken.push(new (require('zeromq').Pair)()); } catch {}
  await attempt(() => client(null, null, 'ipc://x').send('peer', ''));
  await attempt(() => client(null, null, 'ipc://x').connect());
  await attempt(() => service('ipc://x').connect());
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		output, err := newSystemWithoutBroker(t).inlineCommand(language, programs[language]).Output()
		if err != nil {
			t.Fatal(err)
		}
		unit := "seconds"
		if language == "javascript" {
			unit = "milliseconds"
		}
		got := strings.Split(strings.TrimSpace(string(output)), "\n")
		for i, want := range []string{
			"UsageError 64 broker must be tcp://HOST:PORT or ipc:///PATH, not 'nonsense'",
			"UsageError 64 broker must be tcp://HOST:PORT or ipc:///PATH, not 'nonsense'",
			"UsageError 64 port must be a number from 0 to 65535, not '65536'",
			"UsageError 64 connect tcp://x:y: Invalid argument",
			"UsageError 64 connect tcp://x:y: Invalid argument",
			"NoBroker 69 no broker at tcp://no.such.host.invalid:5555 within ",
			"UsageError 64 cannot send ",
			"UsageError 64 a timeout must be a number of " + unit + ", not 'soon'",
			"UsageError 64 a timeout must be a number of " + unit + ", not ",
			"UsageError 64 BACKBONE_PORT must be a number from 0 to 65535, not 'tcp://10.0.0.1:5555'",
			"BackboneError 74 ipc://x: Too many open file",
			"BackboneError 74 ipc://x: Too many open file",
			"BackboneError 74 ipc://x: Too many open file",
		} {
			if i >= len(got) || !strings.HasPrefix(got[i], want) {
				t.Errorf("it printed %q, want %q in line %d", got, want, i+1)
			}
		}
	})
}

func TestProgramsInEveryLanguageTakeShortFlagsForTheBroker(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystemWithoutBroker(t)
		broker, endpoint := bindPeer(t)
		for _, flags := range [][]string{{"-b", endpoint}, {"-p", endpoint[strings.LastIndex(endpoint, ":")+1:]}} {
			request := s.command(language, slices.Concat([]string{libraries[language].library, "request", "-n"}, flags, []string{"echo"})...)
			answered := answerOnce(broker, func(request []string) []string {
				return []string{request[0], "", "MDPC01", "echo", "hello"}
			})
			if output, err := request.Output(); err != nil || string(output) != "hello" {
				t.Errorf("%q: it printed %q, %v", flags, output, err)
			}
			<-answered
		}
	})
}

func TestThousandRequestsAtOnceSucceedInAnyLanguage(t *testing.T) {
	t.Parallel()
	programs := map[string]string{
		"python": `
import asyncio, threading
from backbone import *
right = 0
def check(reply, want):
    global right
    right += reply == want
async def ask(clients, count):
    async def send(client, number): check(await client.send('peer', str(number), 30), str(number))
    await asyncio.gather(*[send(client, number) for client in clients for number in range(count)])
several = [AsyncBackboneClient() for _ in range(5)]
asyncio.run(ask(several[:1], 1000))
for client in several: asyncio.run(ask([client], 200))
asyncio.run(ask(several, 200))
client = BackboneClient()
threads = [threading.Thread(target=lambda: check(client.send('peer', 'x', 30), 'x')) for _ in range(1000)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(right)`,
		"javascript": `
const { BackboneClient } = require('backbone');
let right = 0;
const ask = (clients, count) => Promise.all(clients.flatMap(client => [...Array(count).keys()].map(async number => {
  if (await client.send('peer', String(number), 30000) === String(number)) right++;
})));
(async () => {
  const several = [...Array(5)].map(() => new BackboneClient());
  await ask(several.slice(0, 1), 2000);
  for (const client of several) await ask([client], 200);
  await ask(several, 200);
  console.log(right);
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		s.startServiceIn("go")
		if output, err := s.inlineCommand(language, programs[language]).Output(); err != nil || string(output) != "4000\n" {
			t.Errorf("it printed %q, %v, want 4000 right replies", output, err)
		}
	})
}

func TestRequestsWaitForTheirTurnInAnyLanguage(t *testing.T) {
	t.Parallel()
	// The programs have as many requests in progress as they can, and wait for a line of input.
	programs := map[string]string{
		"python": `
import asyncio
from backbone import *
async def main():
    client, order = AsyncBackboneClient(), []
    start = lambda *request: asyncio.ensure_future(client.send(*request))
    taken = [start('nobody', '', 0) for _ in range(128)]
    await asyncio.get_running_loop().run_in_executor(None, input)
    blocking = asyncio.get_running_loop().run_in_executor(None, BackboneClient().send, 'peer', '', 0.2)
    for request in client.send('peer', '', 0.2), blocking:
        try: await request
        except RequestTimeout as error: print(error.status, error)
    cancelled = [start('peer', 'cancelled', 0) for _ in range(200)]
    async def note(number): order.append(await client.send('peer', number, 20))
    noted = [asyncio.ensure_future(note(str(number))) for number in range(5)]
    await asyncio.sleep(0)
    for request in cancelled + taken[:1]: request.cancel()
    await asyncio.gather(*noted)
    print(*order)
    for request in taken: request.cancel()
    print(await client.send('peer', 'last', 20))
asyncio.run(main())`,
		"javascript": `
const { BackboneClient, RequestTimeout } = require('backbone');
(async () => {
  const client = new BackboneClient(), order = [];
  const start = (service, message) => {
    const stop = new AbortController();
    client.send(service, message, 0, { signal: stop.signal }).catch(() => {});
    return stop;
  };
  const taken = [...Array(128)].map(() => start('nobody', ''));
  await new Promise(resolve => process.stdin.once('data', resolve));
  process.stdin.destroy();
  await client.send('peer', '', 200).catch(error => console.log(error.status, error.message));
  await new BackboneClient().send('peer', '', 200).catch(error => console.log(error.status, error.message));
  const cancelled = [...Array(200)].map(() => start('peer', 'cancelled'));
  const noted = [...Array(5).keys()].map(async number => { order.push(await client.send('peer', String(number), 20000)); });
  for (const request of [...cancelled, taken[0]]) request.abort();
  await Promise.all(noted);
  console.log(order.join(' '));
  for (const request of taken) request.abort();
  console.log(await client.send('peer', 'last', 20000));
})();`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		s.startServiceIn("go")
		program := s.inlineCommand(language, programs[language])
		full, err := program.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var output strings.Builder
		program.Stdout = &output
		if err := program.Start(); err != nil {
			t.Fatal(err)
		}
		s.waitForMetric("backbone_queue_length", 128)
		fmt.Fprintln(full)
		timeout := map[string]string{"python": "0.2s", "javascript": "200ms"}[language]
		late := "124 not sent within " + timeout + ": 128 other requests are in progress\n"
		if err := program.Wait(); err != nil || output.String() != late+late+"0 1 2 3 4\nlast\n" {
			t.Errorf("it printed %q, %v", output.String(), err)
		}
	})
}

// rfc7Command returns a command that runs one of testdata/peers/rfc7_*.py.
func (s *system) rfc7Command(name string, args ...string) *exec.Cmd {
	return s.peerCommand("python", "rfc7_"+name, append([]string{s.endpoint}, args...)...)
}

func TestPeersThatKnowNothingButRFC7(t *testing.T) {
	t.Parallel()
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
		s := newSystem(t) // its broker drops silent idle workers after half a second
		background(t, s.rfc7Command("worker", "slow", "1"))
		output, err := s.rfc7Command("client", "slow", "a", "b").Output()
		if err != nil || string(output) != "a\nb\n" {
			t.Errorf("it printed %q, %v", output, err)
		}
		s.expect("slow", []string{"c"}, "c")
	})
	t.Run("a broker", func(t *testing.T) {
		t.Parallel()
		s := newSystemWithoutBroker(t)
		background(t, s.rfc7Command("broker"))
		s.start("bservice", "args", "printf", "<%s>")
		s.start("bservice", "fail", "sh", "-c", "echo out; echo err >&2; exit 3")
		s.expect("args", []string{"a", "b"}, "<a><b>")
		s.expect("fail", nil, "out\n", "err\n", "exit status 3")
		lines := exec.Command("brequest", "-e", "-j1", "args")
		lines.Env, lines.Stdin = s.peerEnv(), strings.NewReader("1\n2\n")
		if output, err := lines.CombinedOutput(); err != nil || string(output) != "<1>\n<2>\n" {
			t.Errorf("it printed %q, %v", output, err)
		}
		for language := range libraries {
			t.Run(language, func(t *testing.T) {
				s := &system{t: t, dir: s.dir, endpoint: s.endpoint}
				stop := s.startServiceIn(language)
				for i, got := range s.requestFrom(language, 20, []string{"x", ""}, []string{"fail"}) {
					if want := []string{`["78" ""]`, "StatusError 3 6f7574ff 6572720a"}[i]; got != want {
						t.Errorf("got %s, want %s", got, want)
					}
				}
				stop()
			})
		}
	})
}

// A peerKeysSystem has a broker that takes keys, at a TCP endpoint, and a directory with the keys: ann may
// call, build may serve and call what begins with test, and the broker does not know stranger.
type peerKeysSystem struct {
	*system
	broker string // the public key
}

// newPeerKeysSystem returns a system whose programs have the broker and its key in their environment.
func newPeerKeysSystem(t *testing.T) *peerKeysSystem {
	t.Helper()
	s := &peerKeysSystem{system: newSystemWithoutBroker(t)}
	s.broker = s.keygen("broker")
	rules := fmt.Sprintf("%s ann call=peer,go\n%s build serve=peer,go call=test-*\n", s.keygen("ann"), s.keygen("build"))
	s.keygen("stranger")
	if err := os.WriteFile(s.path("authorized"), []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	s.system.endpoint = peerKeysEndpoint(s.start("bbroker", "--port", "0", "--key", "broker.key", "--authorized", "authorized")) + "#" + s.broker
	return s
}

func (s *peerKeysSystem) path(name string) string { return filepath.Join(s.dir, name) }

// keygen makes a key in the file NAME.key and returns the public key.
func (s *peerKeysSystem) keygen(name string) string {
	s.t.Helper()
	public, err := exec.Command("backbone", "--keygen", s.path(name+".key")).Output()
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(public))
}

// secret returns the secret key in the file NAME.key.
func (s *peerKeysSystem) secret(name string) string {
	s.t.Helper()
	content, err := os.ReadFile(s.path(name + ".key"))
	if err != nil {
		s.t.Fatal(err)
	}
	lines := strings.Fields(string(content))
	return lines[len(lines)-1]
}

// tcp returns the endpoint without the key.
func (s *peerKeysSystem) tcp() string {
	endpoint, _, _ := strings.Cut(s.endpoint, "#")
	return endpoint
}

// peerKeysEndpoint waits until a broker listens, and returns its endpoint.
func peerKeysEndpoint(broker *childProcess) string {
	broker.t.Helper()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case line := <-broker.lines:
			if _, rest, ok := strings.Cut(line, "endpoints="); ok {
				return strings.Fields(rest)[0]
			}
		case <-deadline:
			broker.t.Fatal("the broker does not listen")
		}
	}
}

// with adds variables to the environment of a command.
func peerKeysWith(cmd *exec.Cmd, variables ...string) *exec.Cmd {
	cmd.Env = append(cmd.Env, variables...)
	return cmd
}

type peerKeysOptions map[string]string

// peerKeysAsk calls peer with a client of each of the options. It returns a line for each: the reply, or
// the class, status and text of the error.
func peerKeysAsk(s *system, language string, variables []string, options ...peerKeysOptions) []string {
	s.t.Helper()
	program := map[string]string{
		"python": `
import json, sys
from backbone import *
for options in json.load(sys.stdin):
    try: print(BackboneClient(**options).send('peer', 'hello', 20))
    except BackboneError as error: print(type(error).__name__, error.status, error)`,
		"asyncio": `
import asyncio, json, sys
from backbone import *
for options in json.load(sys.stdin):
    try: print(asyncio.run(AsyncBackboneClient(**options).send('peer', 'hello', 20)))
    except BackboneError as error: print(type(error).__name__, error.status, error)`,
		"javascript": `
const { BackboneClient } = require('backbone');
(async () => {
  for (const { broker_key: brokerKey, ...options } of JSON.parse(require('fs').readFileSync(0))) {
    try { console.log(await new BackboneClient(null, null, { brokerKey, ...options }).send('peer', 'hello', 20000)); }
    catch (error) { console.log(error.name, error.status, error.message.replaceAll('brokerKey', 'broker_key')); }
  }
})();`,
	}[language]
	if language == "asyncio" {
		language = "python"
	}
	input, err := json.Marshal(options)
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := peerKeysWith(s.inlineCommand(language, program), variables...)
	cmd.Stdin = bytes.NewReader(input)
	output, err := cmd.Output()
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	if err != nil || len(lines) != len(options) {
		s.t.Fatalf("it printed %q, %v, want %d lines", output, err, len(options))
	}
	return lines
}

func TestKeysAdmitClientsAndServicesInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newPeerKeysSystem(t)
		library := libraries[language].library
		// One service has all from the environment, the other from flags.
		if err := peerKeysWith(s.peerCommand(language, "service", "peer"), "BACKBONE_KEY="+s.path("build.key")).Start(); err != nil {
			t.Fatal(err)
		}
		if err := s.command(language, library, "service", "-b", s.tcp(), "--broker-key", s.broker, "--key", s.path("build.key"), "peer", "echo", "-n").Start(); err != nil {
			t.Fatal(err)
		}
		s.start("bservice", "--key", "build.key", "go", "echo", "-n")

		public, err := parsePublicKey(s.broker)
		if err != nil {
			t.Fatal(err)
		}
		key := s.path("ann.key")
		for _, got := range append(peerKeysAsk(s.system, language, []string{"BACKBONE_KEY=" + key, "BACKBONE_BROKER_KEY=" + s.broker},
			peerKeysOptions{}, // the key of the broker is in BACKBONE_BROKER
			peerKeysOptions{"broker": s.tcp()},
			peerKeysOptions{"broker": s.tcp(), "key": key}),
			peerKeysAsk(s.system, language, nil,
				peerKeysOptions{"broker": s.endpoint, "key": key},
				peerKeysOptions{"broker": s.tcp(), "key": key, "broker_key": s.broker},
				peerKeysOptions{"broker": s.tcp(), "key": key, "broker_key": public.z85()},
				peerKeysOptions{"broker": s.tcp(), "key": key, "broker_key": publicPrefix + strings.ToUpper(s.broker[len(publicPrefix):])})...) {
			if got != "hello" {
				t.Errorf("the reply is %q", got)
			}
		}
		for _, request := range []*exec.Cmd{
			s.command(language, library, "request", "-n", "--key", key, "go", "hello"),
			s.command(language, library, "request", "-n", "--key", key, "--broker-key="+s.broker, "-b", s.tcp(), "peer", "hello"),
			peerKeysWith(exec.Command("brequest", "-n", "--key", key, "peer", "hello"), s.peerEnv()...),
		} {
			if output, err := request.Output(); err != nil || string(output) != "hello" {
				t.Errorf("%q: the reply is %q, %v", request.Args, output, err)
			}
		}
	})
}

func TestRefusalOfAKeyFailsARequestAtOnceInAnyLanguage(t *testing.T) {
	t.Parallel()
	s := newPeerKeysSystem(t)
	plain := peerKeysEndpoint(s.start("bbroker", "--port", "0"))
	const known, stranger = "ann.key", "stranger.key"
	for _, language := range []string{"python", "asyncio", "javascript"} {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			s := &peerKeysSystem{&system{t, s.dir, s.endpoint, nil}, s.broker}
			var options []peerKeysOptions
			var want []string
			// ZeroMQ does not always tell the same, so ask more than once.
			for range 5 {
				for _, test := range []struct {
					options peerKeysOptions
					want    string
				}{
					{peerKeysOptions{"broker": s.endpoint, "key": s.path(stranger)}, "NotAllowed 77 the broker does not know this key: " + s.tcp()},
					{peerKeysOptions{"broker": s.endpoint}, "NotAllowed 77 the broker admits only keys that it knows: " + s.tcp()},
					{peerKeysOptions{"broker": s.tcp()}, "NotAllowed 77 the broker wants a key: " + s.tcp()},
					{peerKeysOptions{"broker": s.tcp(), "key": s.path(known), "broker_key": publicPrefix + strings.Repeat("0f", keyLength)},
						"NotAllowed 77 the broker has another key than expected: " + s.tcp()},
					{peerKeysOptions{"broker": plain, "key": s.path(known), "broker_key": s.broker}, "ProtocolError 76 the broker takes no keys: " + plain},
					{peerKeysOptions{"broker": plain + "#" + s.broker}, "ProtocolError 76 the broker takes no keys: " + plain},
					{peerKeysOptions{"broker": s.endpoint, "key": s.path("build.key")}, "StatusError 77 bbroker: peer: build may not call it"},
				} {
					options, want = append(options, test.options), append(want, test.want)
				}
			}
			for i, got := range peerKeysAsk(s.system, language, nil, options...) {
				if got != want[i] {
					t.Errorf("the result is %q, want %q", got, want[i])
				}
			}
		})
	}
}

func TestRefusedServiceSaysWhyAndWaitsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newPeerKeysSystem(t)
		plain := peerKeysEndpoint(s.start("bbroker", "--port", "0"))
		for _, test := range []struct{ endpoint, key, want string }{
			{s.endpoint, "ann.key", "ann may not serve peer"},
			{s.endpoint, "stranger.key", "the broker does not know this key: " + s.tcp()},
			{s.tcp() + "#" + publicPrefix + strings.Repeat("0f", keyLength), "build.key", "the broker has another key than expected: " + s.tcp()},
			{plain + "#" + s.broker, "build.key", "the broker takes no keys: " + plain},
		} {
			t.Run(test.want, func(t *testing.T) {
				t.Parallel()
				s := &system{t, s.dir, s.endpoint, nil}
				cmd := s.command(language, libraries[language].library, "service", "-b", test.endpoint, "--key", filepath.Join(s.dir, test.key), "peer", "true")
				cmd.Stderr = nil
				stderr, err := cmd.StderrPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				log := bufio.NewReader(stderr)
				line, err := log.ReadString('\n')
				if got := strings.ReplaceAll(line, "brokerKey", "broker_key"); err != nil || got != "peer: refused: "+test.want+"; trying again in 30s\n" {
					t.Errorf("it said %q, %v, want %q", got, err, test.want)
				}
				time.Sleep(time.Second) // It does not try again so soon,
				begin := time.Now()     // and ends when it is told.
				cmd.Process.Signal(syscall.SIGTERM)
				rest, _ := io.ReadAll(log)
				if err := cmd.Wait(); err != nil || len(rest) > 0 || time.Since(begin) > 10*time.Second {
					t.Errorf("it ended with %v after %v and said %q", err, time.Since(begin), rest)
				}
			})
		}
	})
}

func TestBadKeysAreUsageErrorsWithoutTheSecretInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := &peerKeysSystem{system: newSystemWithoutBroker(t)}
		s.broker = s.keygen("broker")
		s.keygen("ann")
		secret := s.secret("ann")
		for name, content := range map[string]string{
			"public.key": s.broker + "\n", "empty.key": "# nothing\n\n", "short.key": secret[:50] + "\n", "two.key": secret + "\n" + secret + "\n",
		} {
			if err := os.WriteFile(s.path(name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s.keygen("shared")
		if err := os.Chmod(s.path("shared.key"), 0o644); err != nil {
			t.Fatal(err)
		}
		const tcp, digits = "tcp://127.0.0.1:1", "(bbsec- and 64 hexadecimal digits)"
		file := func(name string) peerKeysOptions {
			return peerKeysOptions{"broker": tcp + "#" + s.broker, "key": s.path(name)}
		}
		var options []peerKeysOptions
		var want []string
		for _, test := range []struct {
			options peerKeysOptions
			want    string
		}{
			{file("shared.key"), "key: " + s.path("shared.key") + " has mode 0644: others may read it"},
			{file("public.key"), "key: " + s.path("public.key") + ": that is a public key; a secret key is wanted"},
			{file("empty.key"), "key: " + s.path("empty.key") + ": the file has no secret key"},
			{file("short.key"), "key: " + s.path("short.key") + ": not a file with one secret key " + digits},
			{file("two.key"), "key: " + s.path("two.key") + ": not a file with one secret key " + digits},
			{file("missing.key"), "key: "},
			{file("nul\x00.key"), "key: "},
			{peerKeysOptions{"broker": tcp + "#" + s.broker, "key": secret}, "key: that is a secret key; the name of the file that has it is wanted"},
			{peerKeysOptions{"broker": tcp, "key": s.path("ann.key")}, "key needs broker_key, the public key of the broker"},
			{peerKeysOptions{"broker": tcp, "broker_key": secret}, "broker_key: that is a secret key, which nobody else may see; a public key is wanted"},
			{peerKeysOptions{"broker": tcp, "broker_key": " " + secret}, "broker_key: that is a secret key, which nobody else may see; a public key is wanted"},
			{peerKeysOptions{"broker": tcp + "#" + secret}, "the key in " + tcp + ": that is a secret key, which nobody else may see; a public key is wanted"},
			{peerKeysOptions{"broker": "127.0.0.1:1#" + secret}, "broker must be tcp://HOST:PORT or ipc:///PATH, not '127.0.0.1:1'"},
			{peerKeysOptions{"broker": tcp, "broker_key": "bbpub-12"}, "broker_key: 'bbpub-12' is not a public key (bbpub- and 64 hexadecimal digits)"},
			{peerKeysOptions{"broker": tcp, "broker_key": strings.Repeat("~", 40)}, "broker_key: '" + strings.Repeat("~", 40) + "' is not a public key (bbpub- and 64 hexadecimal digits)"},
			{peerKeysOptions{"broker": tcp, "broker_key": strings.Repeat("#", 40)}, "broker_key: '" + strings.Repeat("#", 40) + "' is not a public key (bbpub- and 64 hexadecimal digits)"},
			{peerKeysOptions{"broker": tcp + "#"}, "the key in " + tcp + ": '' is not a public key (bbpub- and 64 hexadecimal digits)"},
			{peerKeysOptions{"broker": tcp + "#" + s.broker, "broker_key": publicPrefix + strings.Repeat("0f", keyLength)}, "broker_key is another key than that in " + tcp},
			{peerKeysOptions{"broker": "ipc://x", "key": s.path("ann.key")}, "an ipc endpoint takes no keys: ipc://x"},
			{peerKeysOptions{"broker": "ipc://x", "broker_key": s.broker}, "an ipc endpoint takes no keys: ipc://x"},
		} {
			options, want = append(options, test.options), append(want, "UsageError 64 "+test.want)
		}
		for i, got := range peerKeysAsk(s.system, language, nil, options...) {
			if got != want[i] && (!strings.HasSuffix(want[i], ": ") || !strings.HasPrefix(got, want[i])) {
				t.Errorf("the result of %q is %q, want %q", options[i], got, want[i])
			}
			if strings.Contains(got, secret[len(secretPrefix):][:40]) {
				t.Errorf("the result of %q shows the secret key: %q", options[i], got)
			}
		}
		// A variable is named as what it is.
		got := peerKeysAsk(s.system, language, []string{"BACKBONE_KEY=" + s.path("shared.key"), "BACKBONE_BROKER_KEY=x"},
			peerKeysOptions{"broker": tcp}, peerKeysOptions{"broker": tcp, "key": s.path("ann.key")})
		if want := []string{"UsageError 64 BACKBONE_KEY: " + s.path("shared.key") + " has mode 0644: others may read it",
			"UsageError 64 BACKBONE_BROKER_KEY: 'x' is not a public key (bbpub- and 64 hexadecimal digits)"}; !slices.Equal(got, want) {
			t.Errorf("the results are %q, want %q", got, want)
		}
	})
}

func TestClientsAndServicesDoNotShowTheirSecretInAnyLanguage(t *testing.T) {
	t.Parallel()
	programs := map[string]string{
		"python": `
import sys
from backbone import *
for peer in BackboneClient(key=sys.argv[1]), BackboneService('peer', print, key=sys.argv[1]):
    print(peer, vars(peer), peer.get_endpoint())`,
		"javascript": `
const { BackboneClient, BackboneService } = require('backbone');
const options = { key: process.argv[1] };
for (const peer of [new BackboneClient(null, null, options), new BackboneService('peer', () => {}, options)]) {
  console.log(require('util').inspect(peer, { showHidden: true, depth: null }), JSON.stringify(peer), peer.getEndpoint());
}`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		s := &peerKeysSystem{system: newSystemWithoutBroker(t)}
		s.endpoint = "tcp://127.0.0.1:1#" + s.keygen("broker")
		s.keygen("ann")
		output, err := s.inlineCommand(language, programs[language], s.path("ann.key")).Output()
		if err != nil {
			t.Fatal(err)
		}
		raw, _ := hex.DecodeString(s.secret("ann")[len(secretPrefix):])
		secret := secretKey(raw)
		var spelled []string // as hexadecimal, Z85, and the first bytes as JavaScript prints them
		for _, b := range raw[:8] {
			spelled = append(spelled, fmt.Sprint(b))
		}
		for _, form := range []string{hex.EncodeToString(raw[:8]), secret.z85(), strings.Join(spelled, ","), fmt.Sprintf("% x", raw[:8])} {
			if strings.Contains(string(output), form) {
				t.Errorf("it printed %q, which has the secret key as %s", output, form)
			}
		}
	})
}

func TestKeysOfTheEnvironmentAreNotForIPCInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		variables := []string{"BACKBONE_KEY=/no/such/file", "BACKBONE_BROKER_KEY=nonsense"}
		if err := peerKeysWith(s.peerCommand(language, "service", "peer"), variables...).Start(); err != nil {
			t.Fatal(err)
		}
		if got := peerKeysAsk(s, language, variables, peerKeysOptions{}); got[0] != "hello" {
			t.Errorf("the result is %q", got)
		}
	})
}

// A brokersPeer is a fake broker. It answers mmi.service with a code, if it has one, and other requests with
// its endpoint. It does not answer the message never, and it ends without an answer to the message die.
type brokersPeer struct {
	endpoint string
	ended    <-chan struct{}
	mu       sync.Mutex
	requests []string // the services and messages that it received, but not mmi.service
}

// newBrokersPeer starts one at an endpoint, and keeps it waiting before it answers mmi.service.
func newBrokersPeer(t *testing.T, endpoint, code string, wait time.Duration) *brokersPeer {
	t.Helper()
	p := newPeer(t, zmq.ROUTER)
	if err := errors.Join(p.Bind(endpoint), p.SetRcvtimeo(10*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	bound, _ := p.GetLastEndpoint()
	ended := make(chan struct{})
	b := &brokersPeer{endpoint: bound, ended: ended}
	ctx, cancel := context.WithCancel(context.Background())
	p.inBackground(func() {
		defer close(ended)
		for ctx.Err() == nil {
			message, err := p.RecvMessageBytes(0)
			if err != nil {
				continue
			}
			request := spell(message)
			service, body := request[3], strings.Join(request[4:], " ")
			if service == "mmi.service" {
				time.Sleep(wait)
				if code != "" {
					p.SendMessage(request[0], "", "MDPC01", service, code)
				}
				continue
			}
			b.mu.Lock()
			b.requests = append(b.requests, strings.TrimSpace(service+" "+body))
			b.mu.Unlock()
			switch {
			case body == "die":
				p.Close()
				return
			case body != "never":
				p.SendMessage(request[0], "", "MDPC01", service, bound)
			}
		}
	})
	t.Cleanup(cancel)
	return b
}

func (b *brokersPeer) got() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.requests)
}

// brokersListener returns the endpoint of a listener that says nothing. If it is one that accepts or closes,
// it does so with each connection.
func brokersListener(t *testing.T, kind string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for kind != "silent" {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			if kind == "closes" {
				connection.Close()
			} else {
				t.Cleanup(func() { connection.Close() })
			}
		}
	}()
	return "tcp://" + listener.Addr().String()
}

// A brokersClient is a client of a library, for one request at a time.
type brokersClient struct {
	t      testing.TB
	input  io.Writer
	output *bufio.Scanner
}

// newBrokersClient starts a client with options, and with variables in its environment.
func newBrokersClient(t *testing.T, language string, options map[string]any, variables ...string) *brokersClient {
	t.Helper()
	program := map[string]string{
		"python": `
import json, sys
from backbone import *
client = BackboneClient(**json.loads(input()))
def ask(*request):
    if request[0] != 'close': return client.send(*request)
    client.close()
for line in sys.stdin:
    try: print(ask(*json.loads(line)), flush=True)
    except BackboneError as error: print(type(error).__name__, error.status, error, flush=True)`,
		"asyncio": `
import asyncio, json, sys
from backbone import *
async def main():
    client = AsyncBackboneClient(**json.loads(input()))
    async def ask(*request):
        if request[0] != 'close': return await client.send(*request)
        client.close()
    for line in sys.stdin:
        try: print(await ask(*json.loads(line)), flush=True)
        except BackboneError as error: print(type(error).__name__, error.status, error, flush=True)
asyncio.run(main())`,
		"javascript": `
const { BackboneClient } = require('backbone');
let client;
(async () => {
  for await (const line of require('readline').createInterface({ input: process.stdin })) {
    const given = JSON.parse(line);
    if (!client) {
      client = new BackboneClient(null, null, given);
      continue;
    }
    if (given[0] === 'close') {
      await client.close();
      console.log('None');
      continue;
    }
    try { console.log(await client.send(given[0], given[1], 1000 * given[2])); }
    catch (error) { console.log(error.name, error.status, error.message.replace(/(\d+)ms$/, (_, ms) => ms / 1000 + 's')); }
  }
})();`,
	}[language]
	if language == "asyncio" {
		language = "python"
	}
	cmd := peerKeysWith(newSystemWithoutBroker(t).inlineCommand(language, program), variables...)
	input, replies := startDialogue(t, cmd)
	c := &brokersClient{t, input, replies}
	json.NewEncoder(input).Encode(options)
	return c
}

// ask sends a request. It returns the reply, or the class, status and text of the error.
func (c *brokersClient) ask(service, message string, timeout float64) string {
	c.t.Helper()
	json.NewEncoder(c.input).Encode([]any{service, message, timeout})
	if !c.output.Scan() {
		c.t.Fatal("the client ended")
	}
	return c.output.Text()
}

func (c *brokersClient) expect(service, message string, timeout float64, want string) {
	c.t.Helper()
	if got := c.ask(service, message, timeout); got != want {
		c.t.Errorf("the result of %s %s is %q, want %q", service, message, got, want)
	}
}

// inEachClient runs a test for each kind of client, in parallel.
func inEachClient(t *testing.T, test func(t *testing.T, language string)) {
	for _, language := range []string{"python", "asyncio", "javascript"} {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			test(t, language)
		})
	}
}

func TestFirstOfSeveralBrokersThatServesGetsTheRequestInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		for _, test := range []struct {
			brokers string
			want    int
		}{
			{"serves serves", 0},
			{"refused serves", 1},
			{"nohost serves", 1},
			{"silent serves", 1},
			{"accepts serves", 1},
			{"closes serves", 1},
			{"refused accepts serves", 2},
			{"vacant serves", 1},
			{"refused vacant serves", 2},
			{"vacant vacant", 0},
			{"refused vacant vacant", 1},
			{"accepts vacant", 1},
			{"vacant accepts", 0},
			{"vacant mute refused", 0},
			{"mute serves", 1},
			{"mute vacant", 1},
			{"slow refused", 0},
			{"refused slow vacant", 1},
			{"odd serves", 0},
		} {
			t.Run(test.brokers, func(t *testing.T) {
				t.Parallel()
				var endpoints []string
				var brokers []*brokersPeer
				for _, kind := range strings.Fields(test.brokers) {
					codes := map[string]string{"serves": "200", "vacant": "404", "mute": "", "slow": "200", "odd": "501"}
					code, ok := codes[kind]
					switch {
					case ok:
						wait := time.Duration(0)
						if kind == "slow" {
							wait = 500 * time.Millisecond
						}
						broker := newBrokersPeer(t, "tcp://127.0.0.1:*", code, wait)
						endpoints, brokers = append(endpoints, broker.endpoint), append(brokers, broker)
						continue
					case kind == "refused":
						endpoints = append(endpoints, "tcp://127.0.0.1:"+freePort(t))
					case kind == "nohost":
						endpoints = append(endpoints, "tcp://no.such.host.invalid:5555")
					default:
						endpoints = append(endpoints, brokersListener(t, kind))
					}
					brokers = append(brokers, nil)
				}
				client := newBrokersClient(t, language, map[string]any{"broker": endpoints})
				client.expect("peer", "hello", 20, endpoints[test.want])
				client.expect("peer", "again", 20, endpoints[test.want])
				for i, broker := range brokers {
					if broker == nil {
						continue
					}
					var want []string
					if i == test.want {
						want = []string{"peer hello", "peer again"}
					}
					if got := broker.got(); !slices.Equal(got, want) {
						t.Errorf("broker %d got %q, want %q", i, got, want)
					}
				}
			})
		}
	})
}

func TestErrorNamesAllBrokersThatAreAwayInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		away, silent := "tcp://127.0.0.1:"+freePort(t), brokersListener(t, "accepts")
		client := newBrokersClient(t, language, map[string]any{"broker": []string{away, silent, "ipc:///no/such/socket"}})
		client.expect("peer", "hello", 0.6, "NoBroker 69 no broker at "+away+", "+silent+", ipc:///no/such/socket within 0.6s")
		client.expect("mmi.services", "", 0.1, "NoBroker 69 no broker at "+away+", "+silent+", ipc:///no/such/socket within 0.1s")

		// One that comes within the timeout gets the request.
		begun := make(chan string)
		go func() { begun <- client.ask("peer", "hello", 20) }()
		time.Sleep(500 * time.Millisecond)
		newBrokersPeer(t, away, "200", 0)
		if got := <-begun; got != away {
			t.Errorf("the result is %q, want %q", got, away)
		}
	})
}

func TestRequestAfterALostBrokerGoesToTheNextInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		one, two := newBrokersPeer(t, "tcp://127.0.0.1:*", "200", 0), newBrokersPeer(t, "tcp://127.0.0.1:*", "200", 0)
		client := newBrokersClient(t, language, map[string]any{"broker": []string{one.endpoint, two.endpoint}})
		client.expect("peer", "hello", 20, one.endpoint)
		client.expect("peer", "die", 20, "ConnectionLost 69 lost the broker at "+one.endpoint+" before its reply")
		if got := two.got(); got != nil {
			t.Errorf("the request was sent again: %q", got)
		}
		<-one.ended
		one = newBrokersPeer(t, one.endpoint, "200", 0) // It is back at once,
		client.expect("peer", "hello", 20, two.endpoint)
		time.Sleep(300 * time.Millisecond) // (a connection of backbone.js ends when it is idle)
		client.expect("peer", "hello", 20, two.endpoint)
		client.expect("other", "hello", 20, two.endpoint)
		client.expect("mmi.services", "", 20, two.endpoint)
		client.expect("peer", "die", 20, "ConnectionLost 69 lost the broker at "+two.endpoint+" before its reply")
		client.expect("peer", "hello", 20, one.endpoint) // and gets requests when the other is lost,
		client.expect("peer", "die", 20, "ConnectionLost 69 lost the broker at "+one.endpoint+" before its reply")
		<-two.ended
		newBrokersPeer(t, two.endpoint, "200", 0)
		client.expect("peer", "hello", 20, two.endpoint)
		<-one.ended
		newBrokersPeer(t, one.endpoint, "200", 0)
		client.expect("close", "", 0, "None")
		client.expect("peer", "hello", 20, one.endpoint) // or when the client was closed.
	})
}

func TestTimeoutCancelsTheRequestAtItsBrokerInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		one, two := newBrokersPeer(t, "tcp://127.0.0.1:*", "404", 0), newBrokersPeer(t, "tcp://127.0.0.1:*", "200", 0)
		client := newBrokersClient(t, language, map[string]any{"broker": []string{one.endpoint, two.endpoint}})
		client.expect("peer", "never", 0.5, "RequestTimeout 124 no reply from "+two.endpoint+" within 0.5s")
		if got, want := two.got(), []string{"peer never", "mmi.cancel"}; !slices.Equal(got, want) || one.got() != nil {
			t.Errorf("the brokers got %q and %q", one.got(), got)
		}
	})
}

func TestSeveralEndpointsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		away, broker := "tcp://127.0.0.1:"+freePort(t), newBrokersPeer(t, "tcp://127.0.0.1:*", "200", 0)
		client := newBrokersClient(t, language, map[string]any{}, "BACKBONE_BROKER= "+away+"  "+broker.endpoint+"\t")
		client.expect("peer", "hello", 20, broker.endpoint)
		client = newBrokersClient(t, language, map[string]any{"broker": []string{away, away}})
		client.expect("peer", "hello", 0.1, "NoBroker 69 no broker at "+away+" within 0.1s")
	})
	programs := map[string]string{
		"python": `
import sys
from backbone import *
for make in lambda broker: BackboneClient(broker=broker), lambda broker: BackboneService('peer', print, broker=broker):
    for brokers in sys.argv[1:]:
        try:
            peer = make(brokers.split(','))
            print(peer.endpoint, peer.get_endpoint() == peer.endpoint)
        except UsageError as error: print(error)`,
		"javascript": `
const { BackboneClient, BackboneService, UsageError } = require('backbone');
for (const make of [broker => new BackboneClient(null, null, { broker }), broker => new BackboneService('peer', () => {}, { broker })]) {
  for (const brokers of process.argv.slice(1)) {
    try {
      const peer = make(brokers.split(','));
      console.log(peer.endpoint, peer.getEndpoint() === peer.endpoint);
    } catch (error) {
      if (!(error instanceof UsageError)) throw error;
      console.log(error.message);
    }
  }
}`,
	}
	inEachLanguage(t, func(t *testing.T, language string) {
		key := keyOf("broker").String()
		var args, want []string
		for _, test := range []struct{ brokers, want string }{
			{"tcp://a:1,ipc:///b", "tcp://a:1 ipc:///b true"},
			{"tcp://a:1,ipc:///b,tcp://a:1#" + key, "tcp://a:1 ipc:///b true"},
			{"tcp://a:1#" + key + ",tcp://[::1]:2", "tcp://a:1 tcp://[::1]:2 true"},
			{"tcp://a:1,tcp://a:1", "tcp://a:1 true"},
			{"tcp://a:1", "tcp://a:1 true"},
			{"tcp://a:1,nonsense", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'nonsense'"},
			{"tcp://a:1,", "broker must be tcp://HOST:PORT or ipc:///PATH, not ''"},
			{"tcp://a:1,ipc://", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'ipc://'"},
			{"tcp://a:1,tcp://b:http", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'tcp://b:http'"},
			{"tcp://a:65536,tcp://b:1", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'tcp://a:65536'"},
			{"tcp://a:1,tcp://b", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'tcp://b'"},
			{"tcp://a:1,tcp://b:1#secret,c#secret", "broker must be tcp://HOST:PORT or ipc:///PATH, not 'c'"},
			{"tcp://a:1,tcp://b:1#x", "the key in tcp://b:1: 'x' is not a public key (bbpub- and 64 hexadecimal digits)"},
		} {
			args, want = append(args, test.brokers), append(want, test.want)
		}
		output, err := newSystemWithoutBroker(t).inlineCommand(language, programs[language], args...).Output()
		got := strings.Split(strings.ToLower(strings.TrimSpace(string(output))), "\n")
		if want := strings.ToLower(strings.Join(append(want, want...), "\n")); err != nil || strings.Join(got, "\n") != want {
			t.Errorf("it printed, %v\n%s\nwant\n%s", err, output, want)
		}
	})
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystem(t, "--heartbeat", "1s")
		s.startServiceIn("go")
		cmd := s.command(language, libraries[language].library, "request", "-n", "-b", "ipc:///no/such/socket", "--broker="+s.endpoint, "peer", "hello")
		if output, err := cmd.Output(); err != nil || string(output) != "hello" {
			t.Errorf("it printed %q, %v", output, err)
		}
	})
}

func TestEachOfSeveralBrokersHasItsKeyInAnyLanguage(t *testing.T) {
	t.Parallel()
	s := newPeerKeysSystem(t) // it has no services
	other := s.keygen("other")
	served := peerKeysEndpoint(s.start("bbroker", "--port", "0", "--key", "other.key", "--authorized", "authorized"))
	serving := exec.Command("bservice", "--key", s.path("build.key"), "-b", served+"#"+other, "peer", "echo", "-n")
	if err := serving.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		serving.Process.Kill()
		serving.Wait()
	})
	wrong := publicPrefix + strings.Repeat("0f", keyLength)
	inEachClient(t, func(t *testing.T, language string) {
		for _, test := range []struct {
			key, brokerKey string
			brokers        []string
			want           string
		}{
			{"ann.key", "", []string{s.endpoint, served + "#" + other}, "hello"},
			{"ann.key", s.broker, []string{s.tcp(), served + "#" + other}, "hello"},
			{"ann.key", other, []string{served, s.endpoint}, "hello"},
			{"ann.key", other, []string{s.tcp() + "#" + wrong, served}, "hello"},
			{"ann.key", other, []string{"ipc:///no/such/socket", served}, "hello"},
			{"stranger.key", "", []string{s.endpoint, served + "#" + other}, "NotAllowed 77 the broker does not know this key: " + s.tcp()},
			{"stranger.key", "", []string{served + "#" + other, s.tcp() + "#" + wrong}, "NotAllowed 77 the broker does not know this key: " + served},
		} {
			options := map[string]any{"broker": test.brokers, "key": s.path(test.key)}
			if name := map[bool]string{true: "brokerKey", false: "broker_key"}[language == "javascript"]; test.brokerKey != "" {
				options[name] = test.brokerKey
			}
			newBrokersClient(t, language, options).expect("peer", "hello", 20, test.want)
		}
	})
	inEachLanguage(t, func(t *testing.T, language string) {
		s := &system{t, s.dir, "ipc:///a ipc:///b", nil}
		cmd := s.command(language, libraries[language].library, "request", "-n", "--broker-key", other, "peer")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		cmd.Run()
		if status := exitStatus(cmd.ProcessState); status != exitUsage || !strings.Contains(stderr.String(), "an ipc endpoint takes no keys: ipc:///a\n") {
			t.Errorf("it ended with status %d and said %q", status, stderr.String())
		}
	})
}

// newBrokersService starts a service named peer with a number of raw brokers. It returns them, and the
// identity that the service has with each.
func newBrokersService(t *testing.T, language string, number int) (s *system, stop func(), brokers []peer, workers []string) {
	t.Helper()
	s = newSystemWithoutBroker(t)
	var endpoints []string
	for range number {
		broker, endpoint := bindPeer(t)
		brokers, endpoints = append(brokers, broker), append(endpoints, endpoint)
	}
	s.endpoint = strings.Join(endpoints, " ")
	stop = s.startServiceIn(language)
	for _, broker := range brokers {
		worker, ready := broker.nextFromWorker()
		broker.want(ready, "", "MDPW01", "\x01", "peer")
		workers = append(workers, worker)
	}
	return s, stop, brokers, workers
}

// wantFrom checks the next message from a worker.
func (p peer) wantFrom(worker string, want ...string) {
	p.t.Helper()
	identity, message := p.nextFromWorker()
	p.want(append([]string{identity}, message...), append([]string{worker, "", "MDPW01"}, want...)...)
}

func TestServiceHandsBackRequestsOfOtherBrokersInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, stop, brokers, workers := newBrokersService(t, language, 3)
		request := func(broker int, body ...string) {
			brokers[broker].send(toWorker(workers[broker], "client", body...)...)
		}
		for i, broker := range brokers { // All of them are served.
			request(i, fmt.Sprint(i))
			broker.wantFrom(workers[i], "\x03", "client", "", fmt.Sprint(i))
		}
		late, release := s.lateRequest()
		request(0, late...)
		for _, i := range []int{2, 1} {
			time.Sleep(300 * time.Millisecond)
			request(i, "too early")
			brokers[i].wantFrom(workers[i], "\x05", "75", "busy")
		}
		release()
		brokers[0].wantFrom(workers[0], "\x03", "client", "", "late")
		begin := time.Now()
		brokers[2].wantFrom(workers[2], "\x01", "peer")
		if time.Since(begin) > 5*time.Second {
			t.Error("the first that had to wait registered late")
		}
		brokers[1].wantFrom(workers[1], "\x01", "peer")   // even if the first does nothing
		brokers[1].send(workers[1], "", "MDPW01", "\x04") // It has no request, so that nothing is reserved.
		time.Sleep(100 * time.Millisecond)
		for _, i := range []int{0, 1, 2} {
			request(i, "again")
			brokers[i].wantFrom(workers[i], "\x03", "client", "", "again")
		}

		// At the end only those that are registered leave.
		late, release = s.lateRequest()
		request(1, late...)
		time.Sleep(300 * time.Millisecond)
		request(0, "too early")
		brokers[0].wantFrom(workers[0], "\x05", "75", "busy")
		ended := make(chan struct{})
		go func() {
			stop()
			close(ended)
		}()
		brokers[2].wantFrom(workers[2], "\x05")
		release()
		brokers[1].wantFrom(workers[1], "\x03", "client", "", "late")
		brokers[1].wantFrom(workers[1], "\x05")
		<-ended
	})
}

func TestServiceKeepsTheTurnOfAWaitingBrokerInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		_, _, brokers, workers := newBrokersService(t, language, 2)
		// Each broker always has a request. Both must get on.
		var replies [2]int
		for i, broker := range brokers {
			if err := broker.SetRcvtimeo(time.Millisecond); err != nil {
				t.Fatal(err)
			}
			broker.send(toWorker(workers[i], "client", "x")...)
		}
		for deadline := time.Now().Add(20 * time.Second); replies[0] < 20 || replies[1] < 20; {
			if time.Now().After(deadline) {
				t.Fatalf("the brokers got %v replies", replies)
			}
			for i, broker := range brokers {
				message, err := broker.RecvMessage(0)
				switch {
				case err != nil || message[3] == "\x04":
				case message[3] == "\x05":
					broker.want(message, workers[i], "", "MDPW01", "\x05", "75", "busy")
				default: // READY or a reply
					if message[3] == "\x03" {
						replies[i]++
					}
					broker.send(toWorker(workers[i], "client", "x")...)
				}
			}
		}
	})
}

func TestServiceDoesWithoutABrokerThatIsAwayInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s := newSystemWithoutBroker(t)
		here, endpoint := bindPeer(t)
		away := "tcp://127.0.0.1:" + freePort(t)
		s.endpoint = away + " " + endpoint
		cmd := s.peerCommand(language, "service", "peer")
		cmd.Stderr = nil
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		log := bufio.NewScanner(stderr)
		logged := func(want string) {
			t.Helper()
			if log.Scan(); log.Text() != want {
				t.Errorf("it logged %q, want %q", log.Text(), want)
			}
		}
		serve := func(broker peer, worker string) {
			t.Helper()
			broker.send(toWorker(worker, "client", "x")...)
			broker.wantFrom(worker, "\x03", "client", "", "x")
		}
		worker, _ := here.nextFromWorker()
		serve(here, worker)
		back := newPeer(t, zmq.ROUTER)
		if err := back.Bind(away); err != nil {
			t.Fatal(err)
		}
		returned, ready := back.nextFromWorker()
		back.want(ready, "", "MDPW01", "\x01", "peer")
		serve(back, returned)
		serve(here, worker)
		back.send(disconnectTo(returned)...)
		logged("peer: the broker sent DISCONNECT; reconnecting to " + away)
		returned, _ = back.nextFromWorker()
		back.send(returned, "", "MDPW01", "\x05", "77", "it may not")
		logged("peer: " + away + ": refused: it may not; trying again in 30s")
		serve(here, worker)
	})
}
