package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"
)

var testBroker = brokerAddress{endpoint: "tcp://broker:5555"}

func testRequest(token string, body [][]byte) Request {
	return Request{Broker: testBroker, Token: token, Body: body, Context: context.Background()}
}

// testCommand returns a service that runs a command like bservice without flags.
func testCommand(command ...string) *CmdService {
	return &CmdService{
		Name:         "svc",
		Command:      command,
		Abort:        context.Background(),
		commandFlags: commandFlags{KillAfter: 2 * time.Second, MaxOutput: 64 << 20, StderrTo: "log"},
		Stderr:       toStderr{},
	}
}

func TestFramesBecomeArgumentsByteForByte(t *testing.T) {
	for _, test := range []struct {
		name    string
		command []string
		body    [][]byte
		argv    []string
	}{
		{"none", []string{"ls"}, nil, []string{"ls"}},
		{"at the end", []string{"ls", "-l"}, frames("a b", "", "$x;`y`", "\xff\n"),
			[]string{"ls", "-l", "a b", "", "$x;`y`", "\xff\n"}},
		{"in place of {}", []string{"cp", "{}", "/dest"}, frames("a", "b"), []string{"cp", "a", "b", "/dest"}},
		{"nothing in place of {}", []string{"cp", "{}", "/dest"}, nil, []string{"cp", "/dest"}},
		{"{} that does not stand alone", []string{"echo", "<{}>"}, frames("a"), []string{"echo", "<{}>", "a"}},
		{"a {} in the request", []string{"echo"}, frames("{}"), []string{"echo", "{}"}},
		{"a command named {}", []string{"{}"}, frames("a"), []string{"{}", "a"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := CmdService{Command: test.command}
			argv, err := c.argv(test.body)
			if err != nil || !reflect.DeepEqual(argv, test.argv) {
				t.Errorf("argv(%q) = %q, %v, want %q", test.body, argv, err, test.argv)
			}
		})
	}
}

func TestOutcomeOfACommandDeterminesItsReply(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("not executable"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		command []string
		body    [][]byte
		want    []string // for the standard error of a status reply, a prefix
	}{
		{"success", []string{"printf", `a\000\377`}, nil, []string{"a\x00\xff"}},
		{"success without output", []string{"true"}, nil, []string{""}},
		{"empty standard input", []string{"cat"}, nil, []string{""}},
		{"environment", []string{"sh", "-c", "printf %s $BACKBONE_SERVICE"}, nil, []string{"svc"}},
		{"failure", []string{"sh", "-c", "printf out; printf err >&2; exit 3"}, nil, []string{"out", "err", "exit status 3"}},
		{"killed", []string{"sh", "-c", "kill -9 $$"}, nil, []string{"", "", "exit status 137"}},
		{"not found", []string{"no-such-command"}, nil, []string{"", "bservice: svc: ", "exit status 127"}},
		{"no such file", []string{"/no/such/file"}, nil, []string{"", "bservice: svc: ", "exit status 127"}},
		{"not executable", []string{plain}, nil, []string{"", "bservice: svc: ", "exit status 126"}},
		{"NUL byte", []string{"echo"}, frames("a", "b\x00c"), []string{"", "bservice: svc: frame 2 contains a NUL byte", "exit status 126"}},
		{"too long", []string{"echo"}, [][]byte{make([]byte, 0), []byte(strings.Repeat("x", 1<<20))},
			[]string{"", "bservice: svc: ", "exit status 126"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := testCommand(test.command...)
			got := spell(c.Handle(testRequest("token", test.body)).Body())
			if len(got) == 3 && len(test.want) == 3 {
				got[1] = got[1][:min(len(got[1]), len(test.want[1]))]
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestCommandKnowsItsServiceAndItsRequest(t *testing.T) {
	c := testCommand("sh", "-c", `printf '%s %s %s %s' "$BACKBONE_SERVICE" "$BACKBONE_ENDPOINT" "$BACKBONE_REQUEST" "$GREETING in $PWD"`)
	c.Env = []string{"GREETING=hello"}
	c.Cwd = "/"
	if got := spell(c.Handle(testRequest("abc.1", nil)).Body()); !reflect.DeepEqual(got, []string{"svc tcp://broker:5555 abc.1 hello in /"}) {
		t.Errorf("got %q", got)
	}
}

func TestLastFrameIsTheStandardInputWhereAskedFor(t *testing.T) {
	c := testCommand("sh", "-c", `cat; printf ' %s' "$@"`, "sh")
	c.Stdin = true
	for _, test := range []struct {
		body []string
		want string
	}{
		{nil, " "},
		{[]string{"in\x00\xff\n"}, "in\x00\xff\n "},
		{[]string{"a", "b", "in"}, "in a b"},
		{[]string{"a", ""}, " a"},
	} {
		if got := spell(c.Handle(testRequest("token", frames(test.body...))).Body()); !reflect.DeepEqual(got, []string{test.want}) {
			t.Errorf("%q: got %q, want %q", test.body, got, test.want)
		}
	}
}

func TestCommandNeedNotReadItsStandardInput(t *testing.T) {
	c := testCommand("echo", "done")
	c.Stdin = true
	if got := spell(c.Handle(testRequest("token", [][]byte{make([]byte, 1<<22)})).Body()); !reflect.DeepEqual(got, []string{"done\n"}) {
		t.Errorf("got %.99q", got)
	}
}

func TestStandardErrorGoesWhereItIsWanted(t *testing.T) {
	const fine, wrong = "echo 1; echo 2 >&2; echo 3", "echo 1; echo 2 >&2; echo 3; exit 4"
	for _, test := range []struct {
		stderr, line string
		log          string
		want         []string
	}{
		{"log", fine, "2\n", []string{"1\n3\n"}},
		{"log", wrong, "2\n", []string{"1\n3\n", "2\n", "exit status 4"}},
		{"reply", fine, "", []string{"1\n3\n", "2\n", "exit status 0"}},
		{"reply", wrong, "", []string{"1\n3\n", "2\n", "exit status 4"}},
		{"merge", fine, "", []string{"1\n2\n3\n"}},
		{"merge", wrong, "", []string{"1\n2\n3\n", "", "exit status 4"}},
	} {
		c := testCommand("sh", "-c", test.line)
		c.StderrTo = test.stderr
		var got []string
		log := captureStderr(t, func() { got = spell(c.Handle(testRequest("token", nil)).Body()) })
		if !reflect.DeepEqual(got, test.want) || log != test.log {
			t.Errorf("--stderr %s, %s: got %q and the log %q, want %q and %q", test.stderr, test.line, got, log, test.want, test.log)
		}
	}
}

func TestFailureIncludesTheEndOfALongStandardError(t *testing.T) {
	c := testCommand("sh", "-c", "seq 1 100000 >&2; exit 1")
	var got [][]byte
	log := captureStderr(t, func() { got = c.Handle(testRequest("token", nil)).Body() })
	if stderr := string(got[1]); len(stderr) != 64<<10 || !strings.HasSuffix(log, stderr) {
		t.Errorf("got %d bytes of standard error that end in %q", len(stderr), stderr[len(stderr)-10:])
	}
}

func TestOutputBeyondItsBoundEndsTheCommand(t *testing.T) {
	for _, test := range []struct{ stderr, line string }{
		{"log", "yes"},
		{"merge", "yes >&2"},
		{"reply", "yes >&2"},
	} {
		c := testCommand("sh", "-c", test.line)
		c.MaxOutput, c.StderrTo = 1000, test.stderr
		got := spell(c.Handle(testRequest("token", nil)).Body())
		if len(got) != 3 || len(got[0])+len(got[1]) > 1200 || got[2] != "exit status 74" ||
			!strings.Contains(got[1], "bservice: svc: ended because it printed more than --max-output 1000 bytes\n") {
			t.Errorf("--stderr %s: got %.1500q", test.stderr, got)
		}
	}
}

func TestEndOfACommandEndsItsProcessGroup(t *testing.T) {
	for _, test := range []struct {
		name, line string
		status     string
	}{
		{"both obey SIGTERM", `sleep 1000 3>"$0" & wait`, "exit status 143"},
		{"both ignore SIGTERM", `trap "" TERM; sleep 1000 3>"$0" & wait`, "exit status 137"},
		{"the child ignores SIGTERM and holds the output", `(trap "" TERM; exec sleep 1000 3>"$0") & wait`, "exit status 143"},
		{"the child ignores SIGTERM and holds no output", `(trap "" TERM; exec sleep 1000 3>"$0" >&3 2>&3) & wait`, "exit status 143"},
		{"the child outlives the command", `trap "exit 0" TERM; (trap "" TERM; exec sleep 1000 3>"$0") & wait`, ""},
	} {
		for _, timeout := range []bool{false, true} {
			t.Run(fmt.Sprint(test.name, "/timeout=", timeout), func(t *testing.T) {
				now, end := context.WithCancel(context.Background())
				defer end()
				fifo := newFifo(t)
				c := testCommand("sh", "-c", test.line, fifo)
				c.Abort, c.KillAfter = now, 100*time.Millisecond
				if timeout {
					limit := 500 * time.Millisecond
					c.Timeout, test.status = &limit, "exit status 124"
				}
				ended := make(chan [][]byte)
				go func() { ended <- c.Handle(testRequest("token", nil)).Body() }()
				// The child keeps the FIFO open until it ends.
				reader, err := os.Open(fifo)
				if err != nil {
					t.Fatal(err)
				}
				defer reader.Close()
				if !timeout {
					end()
				}
				got := spell(<-ended)
				if last := got[len(got)-1]; last != test.status {
					t.Errorf("got %q, want %s", got, test.status)
				}
				reader.SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := reader.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("reading from the child: %v, want EOF", err)
				}
			})
		}
	}
}

func TestCommandThatIgnoresSIGTERMIsKilledAtOnceWithoutPatience(t *testing.T) {
	c := testCommand("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	timeout := 100 * time.Millisecond
	c.Timeout, c.KillAfter = &timeout, 0
	if got := spell(c.Handle(testRequest("token", nil)).Body()); got[len(got)-1] != "exit status 124" {
		t.Errorf("got %q", got)
	}
}

func TestGrandchildThatKeepsTheOutputOpenDoesNotHoldBackTheReply(t *testing.T) {
	fifo := newFifo(t)
	c := testCommand("sh", "-c", `cat "$0" & echo done`, fifo)
	c.KillAfter = 100 * time.Millisecond
	if got := spell(c.Handle(testRequest("token", nil)).Body()); !reflect.DeepEqual(got, []string{"done\n"}) {
		t.Errorf("got %q", got)
	}
	// Ends the grandchild.
	if f, err := os.OpenFile(fifo, os.O_WRONLY, 0); err == nil {
		f.Close()
	}
}

func newCoprocess(t *testing.T, command ...string) *coprocess {
	t.Helper()
	timeout := 20 * time.Second
	c := &coprocess{CmdService: testCommand(command...), log: noLog, terminator: '\n'}
	c.Timeout = &timeout
	t.Cleanup(c.close)
	return c
}

// expectReply sends a request to a coprocess and checks the reply. For the standard error of a
// status reply, want has a prefix.
func (c *coprocess) expectReply(t *testing.T, body []string, want ...string) {
	t.Helper()
	got := spell(c.Handle(testRequest("token", frames(body...))).Body())
	if len(got) == 3 && len(want) == 3 {
		got[1] = got[1][:min(len(got[1]), len(want[1]))]
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%q: got %q, want %q", body, got, want)
	}
}

func TestCoprocessAnswersLineForLine(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.expectReply(t, nil, "\n")
	c.expectReply(t, []string{""}, "\n")
	c.expectReply(t, []string{"hello"}, "hello\n")
	c.expectReply(t, []string{"a", "", "b\x00\xff"}, "a\t\tb\x00\xff\n")
	long := strings.Repeat("x", 1<<22) // more than a pipe holds
	c.expectReply(t, []string{long}, long+"\n")
}

func TestCoprocessAnswersRecordForRecord(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.terminator = 0
	c.expectReply(t, []string{"two\nlines\n", "x"}, "two\nlines\n\tx")
	c.expectReply(t, []string{"a\x00"}, "", "bservice: svc: frame 1 contains a NUL byte, which ends a request\n", "exit status 126")
}

func TestCoprocessIsOneProcess(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", "while read x; do echo $$; done")
	c.open(context.Background())
	first := fmt.Sprintln(c.running.Process.Pid)
	c.expectReply(t, nil, first)
	c.expectReply(t, nil, first)
}

func TestFramesThatWouldBeMistakenAreRefused(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.expectReply(t, []string{"a", "b\nc"}, "", "bservice: svc: frame 2 contains a newline, which ends a request\n", "exit status 126")
	c.expectReply(t, []string{"a\tb"}, "", "bservice: svc: frame 1 contains a tab, which separates arguments\n", "exit status 126")
	c.expectReply(t, []string{"fine"}, "fine\n")
}

// evalCoprocess is a shell script for a coprocess. It answers an empty line with how often it was
// started, counted in the file $0. It evaluates any other line.
const evalCoprocess = `echo >>"$0"; n=$(wc -l <"$0"); while read -r line; do
	case $line in
	"") echo $n ;;
	*) eval "$line" ;;
	esac
done`

func TestPoisonedRequestHurtsNobodyElse(t *testing.T) {
	for _, test := range []struct {
		poison string
		want   []string
	}{
		{"echo bad >&2; exit 3", []string{"", "bad\n", "exit status 3"}},
		{"printf half; exit 3", []string{"half", "", "exit status 3"}},
		{"kill -9 $$", []string{"", "", "exit status 137"}},
		{"exit", []string{"", "bservice: svc: ended without a reply\n", "exit status 69"}},
		{"exec >&-", []string{"", "bservice: svc: ended after --timeout 300ms without a line of output; if it buffers its output, run it with stdbuf -oL", "exit status 124"}},
		{"read forever", []string{"", "bservice: svc: ended after --timeout 300ms without a line of output; if it buffers its output, run it with stdbuf -oL", "exit status 124"}},
		{`printf 'one\ntwo\n'`, []string{"one\n", "bservice: svc: ended because it printed a line that no request asked for: \"two\"\n", "exit status 76"}},
		{"exec yes", []string{"y\n", "bservice: svc: ended because it printed a line that no request asked for: \"y\"\n", "exit status 76"}},
		{"exec tr '\\0' x </dev/zero", []string{strings.Repeat("x", 100_000), "bservice: svc: ended because it printed more than --max-output 100000 bytes\n", "exit status 74"}},
	} {
		t.Run(test.poison, func(t *testing.T) {
			c := newCoprocess(t, "sh", "-c", evalCoprocess, filepath.Join(t.TempDir(), "count"))
			c.MaxOutput = 100_000
			c.expectReply(t, nil, "1\n")
			*c.Timeout = 300 * time.Millisecond
			c.expectReply(t, []string{test.poison}, test.want...)
			*c.Timeout = 20 * time.Second
			c.expectReply(t, nil, "2\n")
			c.expectReply(t, nil, "2\n")
		})
	}
}

func TestOutputThatNoRequestAskedForFailsTheNextRequestAndIsNobodysReply(t *testing.T) {
	for output, said := range map[string]string{"echo stray": "stray", "printf half": "half", "echo": ""} {
		fifo := newFifo(t)
		c := newCoprocess(t, "sh", "-c", evalCoprocess, filepath.Join(t.TempDir(), "count"))
		c.expectReply(t, []string{"echo first; read go <'" + fifo + "'; " + output}, "first\n")
		if err := os.WriteFile(fifo, []byte("go\n"), 0); err != nil {
			t.Fatal(err)
		}
		<-c.running.ended
		c.expectReply(t, nil, "", fmt.Sprintf("bservice: svc: ended because it printed a line that no request asked for: %q\n", said), "exit status 76")
		c.expectReply(t, nil, "2\n")
	}
}

func TestBannerIsNobodysReply(t *testing.T) {
	for _, banner := range []string{"echo Welcome", "printf Welcome"} {
		c := newCoprocess(t, "sh", "-c", banner+"; exec cat")
		c.open(context.Background())
		for range 3 {
			c.expectReply(t, []string{"x"}, "", `bservice: svc: ended because it printed a line that no request asked for: "Welcome"; --skip-lines `, "exit status 76")
		}
	}
}

func TestLinesToSkipAreAwaitedAtEachStart(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", `printf 'one\ntwo'; sleep 0.3; echo; read -r x; echo "$x"`)
	c.skipLines = 2
	c.open(context.Background())
	for range 2 {
		c.expectReply(t, []string{"x"}, "x\n")
		<-c.running.ended
	}

	c = newCoprocess(t, "sh", "-c", "echo one; exec cat")
	c.skipLines = 2
	*c.Timeout = 300 * time.Millisecond
	c.expectReply(t, []string{"x"}, "", "bservice: svc: ended after --timeout 300ms before it printed the lines to skip", "exit status 124")
}

func TestTimeoutOfRequestsDoesNotLimitTheStart(t *testing.T) {
	c := newCoprocess(t, "cat")
	*c.Timeout = quietStart / 2
	if c.open(context.Background()); c.running == nil {
		t.Error("the process was ended")
	}
}

func TestSignalEndsTheWaitForLinesToSkip(t *testing.T) {
	c := newCoprocess(t, "cat")
	c.skipLines = 1
	stop, cancel := context.WithCancel(context.Background())
	cancel()
	if c.open(stop); c.running != nil {
		t.Error("the process goes on")
	}
}

func TestReplyDuringAPauseHasNothingOfOtherRequests(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", `read -r x; printf %s "$x"; echo "$x" >&2; exit 127`)
	captureStderr(t, func() {
		c.expectReply(t, []string{"one"}, "one", "one\n", "exit status 127")
		c.expectReply(t, []string{"two"}, "two", "two\n", "exit status 127")
	})
	c.expectReply(t, []string{"three"}, "", "bservice: svc: sh ends again and again; it is started again in ", "exit status 75")
}

func TestCoprocessThatCannotBeStartedSaysSoAgain(t *testing.T) {
	c := newCoprocess(t, "/no/such/command")
	var log bytes.Buffer
	c.log = slog.New(slog.NewTextHandler(&log, nil))
	c.open(context.Background())
	if said := log.String(); !strings.Contains(said, `level=ERROR msg="coprocess did not start"`) || !strings.Contains(said, "no such file") {
		t.Errorf("the log has %q", said)
	}
	for range 4 {
		c.expectReply(t, nil, "", "bservice: svc: fork/exec /no/such/command: no such file or directory\n", "exit status 127")
	}
}

func TestLinesOfACoprocessCarryTheRequestThatItHasWhereJobsRunSideBySide(t *testing.T) {
	var log writes
	c := newCoprocess(t, "sh", "-c", "echo hello >&2; while read -r line; do echo got $line >&2; echo $line; done")
	c.Stderr, c.LabelStderr = &log, true
	c.Handle(testRequest("a.1", frames("x")))
	c.close()
	if got, want := strings.Join(log, ""), "hello\na.1: got x\n"; got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
}

func TestStandardErrorOfEarlierRequestsIsNotInAReply(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", evalCoprocess, filepath.Join(t.TempDir(), "count"))
	captureStderr(t, func() {
		c.expectReply(t, []string{"echo secret >&2; echo one"}, "one\n")
		for !strings.Contains(string(c.running.stderr.Bytes()), "secret") {
			runtime.Gosched()
		}
		c.expectReply(t, []string{"echo mine >&2; exit 3"}, "", "mine\n", "exit status 3")
	})
}

func TestCoprocessThatDiedWhileIdleIsReplacedUnnoticed(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", evalCoprocess, filepath.Join(t.TempDir(), "count"))
	c.expectReply(t, nil, "1\n")
	c.running.Process.Kill()
	<-c.running.ended
	c.expectReply(t, nil, "2\n")
}

func TestCoprocessThatEndsAgainAndAgainIsGivenPauses(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", "exit 5")
	c.expectReply(t, nil, "", "", "exit status 5")
	c.expectReply(t, nil, "", "", "exit status 5")
	c.expectReply(t, nil, "", "bservice: svc: sh ends again and again; it is started again in ", "exit status 75")
	c.restarts.next = time.Now()
	c.expectReply(t, nil, "", "", "exit status 5")
}

func TestCoprocessThatAnsweredIsRestartedWithoutPause(t *testing.T) {
	c := newCoprocess(t, "sh", "-c", evalCoprocess, filepath.Join(t.TempDir(), "count"))
	for i := range 5 {
		c.expectReply(t, nil, fmt.Sprintln(i+1))
		c.expectReply(t, []string{"exit 3"}, "", "", "exit status 3")
	}
}

func TestPausesGrowToFiveSeconds(t *testing.T) {
	var l restartLimit
	now := time.Unix(1000, 0)
	var got []time.Duration
	for range 9 {
		l.failed(now)
		got = append(got, max(0, l.next.Sub(now)))
	}
	want := []time.Duration{0, 100, 200, 400, 800, 1600, 3200, 5000, 5000}
	for i := range want {
		want[i] *= time.Millisecond
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the pauses are %v, want %v", got, want)
	}
	for range 1000 {
		l.failed(now)
	}
	if pause := l.next.Sub(now); pause != maxBackoff {
		t.Errorf("after very many failures the pause is %v", pause)
	}
}

func TestCoprocessEndsWithItsInputOrElseBySignals(t *testing.T) {
	for _, test := range []struct {
		line string
		want string
	}{
		{"cat; exit 7", "exit status 7"},
		{"read x; exec sleep 1000", "signal: terminated"},
		{"trap '' TERM; read x; exec sleep 1000", "signal: killed"},
	} {
		c := newCoprocess(t, "sh", "-c", test.line)
		c.KillAfter = 100 * time.Millisecond
		c.open(context.Background())
		c.close()
		if got := c.running.ProcessState.String(); got != test.want {
			t.Errorf("%s: ended with %s, want %s", test.line, got, test.want)
		}
	}
}
