package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	commands := map[string]func(){
		"backbone":       main,
		"backbone-1.0":   main,
		"echoworker":     echoWorker,
		"babbler":        babbler,
		"babblingclient": babblingClient,
		"workerfleet":    workerFleet,
		"simplebroker":   simpleBroker,
	}
	for _, a := range applets() {
		commands[a.name] = main
	}
	testscript.Main(m, commands)
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

// TestScripts drives the tools from outside, as a user's shell does.
func TestScripts(t *testing.T) {
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			// A broker of its own for each script, where no other can be.
			env.Setenv("BACKBONE_BROKER", "ipc://"+env.WorkDir+"/broker")
			// The race detector would let each process sleep for a second at its end.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			env.Setenv("ROOT", root)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    status,
			"signalled": signalledTool,
		},
	})
}

// status runs a program and checks its exit status: status N PROGRAM [ARG...].
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N PROGRAM [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exitStatus(exit.ProcessState)
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("%s ended with status %d, want %d", args[1], got, want)
	}
}

// signalledTool runs a program, sends it a signal and checks that it ends by that:
// signalled INT|TERM PROGRAM [ARG...].
func signalledTool(ts *testscript.TestScript, neg bool, args []string) {
	signal, ok := map[string]syscall.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM}[args[0]]
	if neg || !ok || len(args) < 2 {
		ts.Fatalf("usage: signalled INT|TERM PROGRAM [ARG...]")
	}
	cmd := exec.Command(args[1], args[2:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "BACKBONE_BROKER="+ts.Getenv("BACKBONE_BROKER"))
	ts.Check(cmd.Start())
	ts.Check(cmd.Process.Signal(signal))
	cmd.Wait()
	// A shell tells this as status 128 plus the signal's number, and ends its own loops.
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != signal {
		ts.Fatalf("%s ended with %v, want signal %v", args[1], cmd.ProcessState, signal)
	}
}

func TestHelpNamesEveryFlagAndNoOther(t *testing.T) {
	for _, a := range applets() {
		t.Run(a.name, func(t *testing.T) {
			flags := flagsOf(t, a)
			// A line that documents flags starts with them; the examples do not.
			var documented []string
			for line := range strings.Lines(a.usage) {
				if strings.HasPrefix(strings.TrimLeft(line, " "), "-") {
					spec, _, _ := strings.Cut(strings.TrimLeft(line, " "), "  ")
					documented = append(documented, regexp.MustCompile(`--?[a-z0-9][a-z-]*`).FindAllString(spec, -1)...)
				}
			}
			slices.Sort(documented)
			if !slices.Equal(flags, documented) {
				t.Errorf("the flags are\n%q, the help has\n%q", flags, documented)
			}
		})
	}
}

func TestHelpFitsTwoScreens(t *testing.T) {
	for _, a := range applets() {
		lines := strings.Split(a.usage, "\n")
		if len(lines) > 64 {
			t.Errorf("%s --help has %d lines", a.name, len(lines))
		}
		for _, line := range lines {
			if len(line) > 88 {
				t.Errorf("%s --help has a line of %d: %s", a.name, len(line), line)
			}
		}
	}
}

func TestFlagsBeatTheEnvironmentAndEndpointsBeatHostAndPort(t *testing.T) {
	for _, test := range []struct {
		name  string
		env   map[string]string
		flags commonFlags
		want  string
	}{
		{"defaults", nil, commonFlags{}, "tcp://127.0.0.1:5555"},
		{"host", nil, commonFlags{Host: "build"}, "tcp://build:5555"},
		{"port", nil, commonFlags{Port: "6000"}, "tcp://127.0.0.1:6000"},
		{"IPv6", nil, commonFlags{Host: "::1"}, "tcp://[::1]:5555"},
		{"IPv6 in brackets", nil, commonFlags{Host: "[::1]"}, "tcp://[::1]:5555"},
		{"endpoint", nil, commonFlags{Broker: []string{"ipc:///b"}, Host: "h", Port: "1"}, "ipc:///b"},
		{"environment", map[string]string{"HOST": "h", "PORT": "1"}, commonFlags{}, "tcp://h:1"},
		{"half of it", map[string]string{"HOST": "h", "PORT": "1"}, commonFlags{Port: "2"}, "tcp://h:2"},
		{"endpoint of the environment", map[string]string{"BROKER": "ipc:///b", "HOST": "h"}, commonFlags{}, "ipc:///b"},
		{"flag against it", map[string]string{"BROKER": "ipc:///b", "HOST": "h"}, commonFlags{Port: "2"}, "tcp://h:2"},
		{"empty environment", map[string]string{"BROKER": "", "HOST": "", "PORT": ""}, commonFlags{}, "tcp://127.0.0.1:5555"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, name := range []string{"BROKER", "HOST", "PORT"} {
				t.Setenv("BACKBONE_"+name, test.env[name])
			}
			if got, err := test.flags.endpoint(); err != nil || got != test.want {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func TestWrongEndpointsAreWrongUsage(t *testing.T) {
	for _, flags := range []commonFlags{
		{Port: "http"}, {Port: "65536"}, {Port: "-1"},
		{Broker: []string{"localhost:5555"}}, {Broker: []string{"inproc://x"}},
		{Broker: []string{"ipc:///a", "ipc:///b"}},
	} {
		var f *failure
		if got, err := flags.endpoint(); !errors.As(err, &f) || f.status != exitUsage || f.hint == "" {
			t.Errorf("%+v: got %q, %v, want wrong usage with a hint", flags, got, err)
		}
	}
}

func TestNamesOfHostsBecomeAddresses(t *testing.T) {
	for endpoint, want := range map[string]string{
		"tcp://localhost:5555":          "tcp://127.0.0.1:5555",
		"tcp://127.0.0.1:5555":          "tcp://127.0.0.1:5555",
		"tcp://[::1]:5555":              "tcp://[::1]:5555",
		"tcp://*:5555":                  "tcp://*:5555",
		"tcp://127.0.0.1:0;localhost:1": "tcp://127.0.0.1:0;localhost:1",
		"tcp://localhost":               "tcp://localhost",
		"ipc:///localhost:5555":         "ipc:///localhost:5555",
	} {
		if got, err := lookUp(context.Background(), endpoint); err != nil || got != want {
			t.Errorf("%s is looked up as %s, %v, want %s", endpoint, got, err, want)
		}
	}
	// A name that no DNS server is asked for.
	var f *failure
	if got, err := lookUp(context.Background(), "tcp://no..such:5555"); !errors.As(err, &f) || f.status != exitUnavailable || f.hint == "" {
		t.Errorf("got %s, %v, want status 69 with a hint", got, err)
	}
}

func TestDurationsHaveUnitsOrAreSeconds(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"5": 5 * time.Second, "0": 0, "0.5": 500 * time.Millisecond, "1.5s": 1500 * time.Millisecond,
		"500ms": 500 * time.Millisecond, "2m": 2 * time.Minute, "1h30m": 90 * time.Minute,
	} {
		if got, err := parseTimeout(t, text); err != nil || got != want {
			t.Errorf("%s is %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "5x", "-1", "-1s", "nan", "inf", "1e300", "1e3"} {
		if got, err := parseTimeout(t, text); err == nil {
			t.Errorf("%q is %v, want an error", text, got)
		}
	}
}

func TestSizesAreBytesOrHaveUnits(t *testing.T) {
	parse := func(text string) (size, error) {
		var tool brokerTool
		parser, err := newParser(&tool)
		if err != nil {
			t.Fatal(err)
		}
		_, err = parser.Parse([]string{"--max-message=" + text})
		return tool.MaxMessage, err
	}
	for text, want := range map[string]size{"1": 1, "1000": 1000, "64K": 65536, "256M": 256 << 20, "2G": 2 << 30} {
		if got, err := parse(text); err != nil || got != want {
			t.Errorf("%s is %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0", "-1", "K", "1k", "1KB", "1.5G", "x", "9999999999999G", "1K2"} {
		if got, err := parse(text); err == nil {
			t.Errorf("%q is %d, want an error", text, got)
		}
	}
}

func parseTimeout(t *testing.T, text string) (time.Duration, error) {
	t.Helper()
	var tool requestTool
	parser, err := newParser(&tool)
	if err != nil {
		t.Fatal(err)
	}
	_, err = parser.Parse([]string{"--timeout=" + text, "name"})
	return time.Duration(tool.Timeout), err
}

func TestFlagsEndAtTheFirstArgument(t *testing.T) {
	for _, test := range []struct {
		args []string
		name string
		rest operands
	}{
		{[]string{"svc"}, "svc", nil},
		{[]string{"-n", "svc", "-q", "a", "-x"}, "svc", operands{"a", "-x"}},
		{[]string{"svc", "--", "-l"}, "svc", operands{"-l"}},
		{[]string{"svc", "--"}, "svc", operands{}},
		{[]string{"svc", "--", "--", "-l"}, "svc", operands{"--", "-l"}},
		{[]string{"svc", "a", "--", "b"}, "svc", operands{"a", "--", "b"}},
		{[]string{"--", "svc", "-l"}, "svc", operands{"-l"}},
		{[]string{"--", "svc", "--", "-l"}, "svc", operands{"--", "-l"}},
		{[]string{"svc", "-", "-n"}, "svc", operands{"-", "-n"}},
		{[]string{"svc", "", "x"}, "svc", operands{"", "x"}},
		{[]string{"s\xff", "\xfe"}, "s\xff", operands{"\xfe"}},
	} {
		var tool requestTool
		parser, err := newParser(&tool)
		if err != nil {
			t.Fatal(err)
		}
		_, err = parser.Parse(test.args)
		if err != nil || tool.Name != test.name || !slices.Equal(tool.Args, test.rest) {
			t.Errorf("%q: %q asks %q, %v", test.args, tool.Name, tool.Args, err)
		}
	}
}
