package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A streamedRequest is brequest --stream dump, and the broker of a test that it calls.
type streamedRequest struct {
	broker   peer
	identity string
	*exec.Cmd
	stdout *os.File // to read, if it is a pipe
	stderr *bytes.Buffer
	ended  chan struct{}
}

// startStream starts a request. Its standard output is a pipe unless a file is given.
func startStream(t *testing.T, stdout *os.File, flags ...string) *streamedRequest {
	t.Helper()
	broker, endpoint := bindPeer(t)
	r := &streamedRequest{broker: broker, stderr: &bytes.Buffer{}, ended: make(chan struct{})}
	r.Cmd = exec.Command("brequest", append(append([]string{"--stream", "--broker", endpoint}, flags...), "dump", "x")...)
	r.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	r.Cmd.Stdout, r.Cmd.Stderr = stdout, r.stderr
	if stdout == nil {
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer write.Close()
		t.Cleanup(func() { read.Close() })
		r.stdout, r.Cmd.Stdout = read, write
	}
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		r.Wait()
		close(r.ended)
	}()
	t.Cleanup(func() {
		r.Process.Kill()
		<-r.ended
	})
	return r
}

// answer answers the question whether the broker sends partial replies with 200, and takes the request.
func (r *streamedRequest) answer() {
	r.broker.t.Helper()
	question := r.broker.recv()
	r.identity = question[0]
	r.broker.want(question[1:], question01...)
	r.send(answer01("200")...)
	r.want("MDPC02", "\x01", "dump", "x")
	r.want(credit02("0")...)
	r.send(credited("200")...)
}

func (r *streamedRequest) send(spelled ...string) {
	r.broker.t.Helper()
	r.broker.send(append([]string{r.identity}, spelled...)...)
}

// want fails the test unless the next message is as wanted.
func (r *streamedRequest) want(want ...string) {
	r.broker.t.Helper()
	r.broker.want(r.broker.recv()[1:], want...)
}

// wantAfterGrants does the same, and ignores grants before.
func (r *streamedRequest) wantAfterGrants(want ...string) {
	r.broker.t.Helper()
	message := r.broker.recv()[1:]
	for len(message) == 4 && message[2] == "mmi.credit" {
		message = r.broker.recv()[1:]
	}
	r.broker.want(message, want...)
}

// read reads what must come on standard output next.
func (r *streamedRequest) read(want string) {
	r.broker.t.Helper()
	r.stdout.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r.stdout, got); err != nil || string(got) != want {
		r.broker.t.Fatalf("it printed %q, %v, want %q", got[:n], err, want)
	}
}

// wantEnd waits for the end, and checks the exit status and what is on standard error.
func (r *streamedRequest) wantEnd(status int, stderr string) {
	r.broker.t.Helper()
	select {
	case <-r.ended:
	case <-time.After(20 * time.Second):
		r.broker.t.Fatal("it did not end")
	}
	if got := exitStatus(r.ProcessState); got != status || !strings.Contains(r.stderr.String(), stderr) || stderr == "" && r.stderr.Len() > 0 {
		r.broker.t.Errorf("it ended with %d and %q, want %d and %q", got, r.stderr, status, stderr)
	}
}

func TestOutputIsPrintedAsItComes(t *testing.T) {
	r := startStream(t, nil)
	r.answer()
	for i, output := range []string{"a", "\x00\xff", "line\n"} {
		r.send(part02("dump", output)...)
		r.read(output)
		r.want(credit02("1")...)
		r.send(credited("200")...)
		if i == 1 {
			r.send(part02("dump", "b", "warning\n", "exit status 0")...)
			r.read("b")
			r.want(credit02("1")...)
			r.send(credited("200")...)
		}
	}
	r.send(part02("dump", "several", "frames")...)
	r.read("several\nframes\n")
	r.send(final02("dump", "end", "sorry\n", "exit status 3")...)
	r.read("end")
	r.wantEnd(3, "warning\nsorry\n")
}

func TestOutputAndErrorsAreWrittenInTheOrderOfArrival(t *testing.T) {
	tool := &requestTool{}
	file := fileWith(t, "")
	defer func(stderr *os.File) { os.Stderr = stderr }(os.Stderr)
	os.Stderr = file
	printer := newStreamPrinter(tool.outputTo(file), func() {}, func(err error) { t.Error(err) })
	var want string
	for i := range 100 {
		printer.add(Reply{Output: frames(fmt.Sprint("a", i))})
		printer.add(Reply{Output: frames(fmt.Sprint("b", i)), Stderr: fmt.Append(nil, "c", i)})
		printer.add(Reply{Stderr: fmt.Append(nil, "d", i)})
		want += fmt.Sprintf("a%[1]db%[1]dc%[1]dd%[1]d", i)
	}
	if err := printer.finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file.Name()); err != nil || string(got) != want {
		t.Errorf("it wrote %q, %v", got, err)
	}
}

func TestStreamEndsWithTheWholeReplyOfABrokerThatSendsNoParts(t *testing.T) {
	r := startStream(t, nil)
	question := r.broker.recv()
	r.identity = question[0]
	r.want(question02...) // It does not answer the first question, nor this one.
	r.want("", "MDPC01", "dump", "x")
	r.send("", "MDPC01", "dump", "all", "sorry\n", "exit status 4")
	r.read("all")
	r.wantEnd(4, "sorry\n")
}

func TestReaderThatIsSlowGetsEveryByteOfABrokerWithoutCredit(t *testing.T) {
	r := startStream(t, nil)
	r.identity = r.broker.recv()[0]
	r.want(question02...)
	r.send(final02("mmi.service", "501")...)
	r.want("MDPC02", "\x01", "dump", "x")
	if err := r.broker.SetRouterMandatory(1); err != nil {
		t.Fatal(err)
	}
	const parts = 2000 // 128 MB
	chunk := strings.Repeat("0123456789abcde\n", 4<<10)
	r.broker.inBackground(func() {
		for i := range parts {
			r.broker.SendMessage(r.identity, "MDPC02", "\x02", "dump", fmt.Sprintf("%08d", i), chunk)
		}
		r.broker.SendMessage(r.identity, "MDPC02", "\x03", "dump", "")
	})
	for i := range parts {
		r.read(fmt.Sprintf("%08d\n", i))
		r.read(chunk + "\n")
	}
	r.wantEnd(0, "")
}

func TestStreamThatNobodyReadsIsTakenBackByASignal(t *testing.T) {
	for signal, status := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		t.Run(signal.String(), func(t *testing.T) {
			r := startStream(t, nil)
			r.answer()
			for range 64 {
				r.send(part02("dump", strings.Repeat("x", 64<<10))...)
			}
			r.read("x")
			r.Process.Signal(signal)
			r.wantAfterGrants(cancel02...)
			r.send(final02("mmi.cancel", "200")...)
			r.wantEnd(status, "")
			if got := r.ProcessState.Sys().(syscall.WaitStatus); !got.Signaled() {
				t.Errorf("no signal ended it, but %v", got)
			}
		})
	}
}

func TestReaderThatGoesAwayEndsTheStream(t *testing.T) {
	r := startStream(t, nil)
	r.answer()
	r.send(part02("dump", "a")...)
	r.read("a")
	r.stdout.Close()
	r.send(part02("dump", "b")...)
	r.wantAfterGrants(cancel02...)
	r.send(final02("mmi.cancel", "200")...)
	r.wantEnd(128+int(syscall.SIGPIPE), "")
}

func TestOutputThatCannotBeWrittenEndsTheStream(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	r := startStream(t, full)
	r.answer()
	r.send(part02("dump", "a")...)
	r.wantAfterGrants(cancel02...)
	r.send(final02("mmi.cancel", "200")...)
	r.wantEnd(exitIO, "no space left on device")
}

func TestStreamThatIsSilentForTooLongIsTakenBack(t *testing.T) {
	r := startStream(t, nil, "--timeout", "2s")
	r.answer()
	r.send(part02("dump", "a")...)
	r.read("a")
	r.wantAfterGrants(cancel02...)
	r.send(final02("mmi.cancel", "200")...)
	r.want("", "MDPC01", "mmi.service", "dump")
	r.wantEnd(exitTimeout, "brequest: dump: no reply from tcp://")
}

func TestWhatWasPrintedOfAStreamThatBreaksStaysPrinted(t *testing.T) {
	r := startStream(t, nil, "--retries", "3")
	r.answer()
	r.send(part02("dump", "a")...)
	r.read("a")
	r.broker.Close()
	r.wantEnd(exitUnavailable, "brequest: dump: lost the broker")

	r = startStream(t, nil)
	r.answer()
	r.send(part02("dump", "a")...)
	r.send(final02("dump", "", "bbroker: dump: the worker was lost\n", "exit status 069")...)
	r.read("a")
	r.wantEnd(exitUnavailable, "bbroker: dump: the worker was lost\n")
}

func TestStreamPassesThroughTheBroker(t *testing.T) {
	s := newSystem(t)
	worker := connectPeer(t, zmq.DEALER, s.endpoint)
	worker.send("MDPW02", "\x01", "dump")
	cmd := exec.Command("brequest", "--broker", s.endpoint, "--stream", "dump", "x")
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	request := worker.recvSkipping("MDPW02", "\x05")
	worker.want(append(request[:2:2], request[3:]...), "MDPW02", "\x02", "", "x")
	const parts = 1000
	for i := range parts {
		worker.send("MDPW02", "\x03", request[2], "", fmt.Sprintf("%07d\n", i)+strings.Repeat("x", 64<<10-8))
	}
	worker.send("MDPW02", "\x04", request[2], "", "end\n", "sorry", "exit status 5")
	got, err := io.ReadAll(stdout)
	cmd.Wait()
	if len(got) != parts<<16+4 || exitStatus(cmd.ProcessState) != 5 {
		t.Fatalf("it printed %d bytes, and ended with %v, %v", len(got), cmd.ProcessState, err)
	}
	for i := range parts {
		if line := got[i<<16:][:8]; string(line) != fmt.Sprintf("%07d\n", i) {
			t.Fatalf("part %d begins with %q", i, line)
		}
	}
}

func TestProgressOfAStreamIsHiddenWhereSomethingIsPrinted(t *testing.T) {
	shown := func(onTerminal bool, unwritten int, parts ...Reply) string {
		printer := newStreamPrinter((&requestTool{}).outputTo(fileWith(t, "")), func() {}, func(error) {})
		progress := &streamProgress{status: &statusLine{watched: true}, service: "dump", printer: printer, onTerminal: onTerminal}
		for _, part := range parts {
			progress.makeRoom(part)
		}
		printer.bytes = 3 << 29
		progress.begin = time.Now().Add(-10 * time.Second)
		return captureStderr(t, func() { progress.show(unwritten) })
	}
	output, text, unfinished := Reply{Output: frames("x")}, Reply{Stderr: []byte("x\n")}, Reply{Stderr: []byte("x")}
	if got := shown(false, 1, output); !strings.Contains(got, "brequest: dump: 1.5 GiB, 154 MiB/s, 10s\x1b") {
		t.Errorf("it shows %q", got)
	}
	if got := shown(false, 0, text); got == "" {
		t.Error("it shows nothing below a line of standard error that was written")
	}
	for name, got := range map[string]string{
		"output on the terminal":              shown(true, 0, output),
		"standard error that is unwritten":    shown(false, 1, text, output),
		"standard error without a final line": shown(false, 0, unfinished, output),
	} {
		if got != "" {
			t.Errorf("%s: it shows %q", name, got)
		}
	}
}

func TestSizesAreShownInUnits(t *testing.T) {
	for n, want := range map[size]string{0: "0 B", 999: "999 B", 1000: "1.0 KiB", 10 << 10: "10 KiB", 85<<20 + 5: "85 MiB",
		1288490189: "1.2 GiB", 999 << 20: "999 MiB", 3 << 40: "3.0 TiB", 5000 << 40: "5000 TiB"} {
		if got := inUnits(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
