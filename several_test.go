package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The tests in this file run several brokers, with services and clients that know all of them.

// each starts a brequest --each with a line for each request. What it returns checks that each reply is
// what the service makes of its line.
func (s *system) each(name string, lines []string, reply func(line string) string) (wait func()) {
	s.t.Helper()
	client := exec.Command("brequest", "--broker", s.endpoint, "--each", name)
	client.Stdin = strings.NewReader(strings.Join(lines, "\n"))
	var stdout, stderr strings.Builder
	client.Stdout, client.Stderr = &stdout, &stderr
	if err := client.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- client.Wait() }()
	s.t.Cleanup(func() { client.Process.Kill() })
	return func() {
		s.t.Helper()
		select {
		case err := <-ended:
			if err != nil {
				s.t.Errorf("brequest: %v\n%s", err, &stderr)
			}
		case <-time.After(60 * time.Second):
			s.t.Fatal("brequest did not end")
		}
		want := ""
		for _, line := range lines {
			want += reply(line) + "\n"
		}
		if got := stdout.String(); got != want {
			s.t.Errorf("the replies are\n%s, want\n%s", got, want)
		}
	}
}

// expectNothingLost checks what a broker counted.
func (s *system) expectNothingLost(requests int) {
	s.t.Helper()
	for name, want := range map[string]int{"requests": requests, "replies": requests, "lost_workers": 0, "poisoned": 0, "refused": 0, "failures": 0} {
		if got := s.metric("backbone_" + name + "_total"); got != want {
			s.t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
}

func TestBrokersOfAServiceShareItsJobInTurn(t *testing.T) {
	const total = 200
	a, b := newSystem(t), newSystem(t)
	var lines [2][]string
	var waits [2]func()
	for i, s := range []*system{a, b} {
		for n := range total {
			lines[i] = append(lines[i], fmt.Sprintf("%c%d", "ab"[i], n))
		}
		waits[i] = s.each("work", lines[i], func(line string) string { return "done " + line })
		s.waitForMetric("backbone_queue_length", defaultJobs)
	}
	// The directory exists while a command runs.
	service := a.start("bservice", "--heartbeat", "100ms", "-j1", "--broker", a.endpoint, "--broker", b.endpoint, "work", "sh", "-c",
		`mkdir busy || echo "$1" >>overlaps; echo "$1" >>runs; echo "done $1"; rmdir busy`, "sh")
	for _, wait := range waits {
		wait()
	}
	if overlaps := a.runs("overlaps"); len(overlaps) > 0 {
		t.Errorf("these commands began while another ran: %q", overlaps)
	}
	if got, want := a.runs("runs"), slices.Sorted(slices.Values(slices.Concat(lines[0], lines[1]))); !slices.Equal(got, want) {
		t.Errorf("%d commands ran, want each of %d once: %q", len(got), len(want), got)
	}
	// With turns, both brokers have work until the end.
	ran := a.words("runs")
	for _, broker := range []string{"a", "b"} {
		isOf := func(run string) bool { return strings.HasPrefix(run, broker) }
		if half := slices.DeleteFunc(slices.Clone(ran[:total]), func(run string) bool { return !isOf(run) }); len(half) < total/4 {
			t.Errorf("of the first %d commands, only %d are of broker %s", total, len(half), broker)
		}
	}
	a.expectNothingLost(total)
	b.expectNothingLost(total)

	service.signal(syscall.SIGTERM)
	if got := service.waitForExit(); got != 0 {
		t.Errorf("the service ended with status %d", got)
	}
	for _, s := range []*system{a, b} {
		s.waitForMetric("backbone_workers", 0)
	}
	a.expectNoDescendants()
}

func TestRequestThatIsHandedBackGoesToAnIdleService(t *testing.T) {
	a, release := newHangingSystem(t)
	b := newSystem(t, "-v")
	busy := a.start("bservice", "--heartbeat", "100ms", "-v", "--broker", a.endpoint, "--broker", b.endpoint, "work", "sh", "-c", hang, "sh")
	busy.waitForLines(2, "service connected")
	held := a.each("work", []string{"x"}, func(string) string { return "done" })
	a.waitForRuns(1)
	b.startShellService("work", `printf "idle $1"`)

	// The service that came first is the next one to get a request.
	b.expect("work", []string{"1"}, "idle 1")
	b.broker.waitForLines(1, "request handed back")
	busy.waitForLines(1, `msg="request handed back" service=work broker=`+b.endpoint+` request=`)
	for i := range 50 { // The broker knows that the other one is busy.
		b.expect("work", []string{fmt.Sprint(i)}, fmt.Sprint("idle ", i))
	}
	release()
	held()
	b.waitForMetric("backbone_idle_workers", 2)
	b.expectNothingLost(51)
}

func TestJobsOfSeveralBrokersRunSideBySide(t *testing.T) {
	const total, jobs = 100, 3
	a, b := newSystem(t), newSystem(t)
	service := a.start("bservice", "--heartbeat", "100ms", "-q", "--coproc", "-j", fmt.Sprint(jobs), "--broker", a.endpoint, "--broker", b.endpoint, "work",
		"sh", "-c", `while read -r line; do mkdir $$ || echo $line >>overlaps; echo $$ >>runs; rmdir $$; echo "done $line"; done`)
	var waits []func()
	for _, s := range []*system{a, b} {
		var lines []string
		for n := range total {
			lines = append(lines, fmt.Sprintf("%s-%d", filepath.Base(s.dir), n))
		}
		waits = append(waits, s.each("work", lines, func(line string) string { return "done " + line }))
	}
	for _, wait := range waits {
		wait()
	}
	if overlaps := a.runs("overlaps"); len(overlaps) > 0 {
		t.Errorf("a coprocess had these requests before it had answered another: %q", overlaps)
	}
	runs := a.runs("runs")
	if processes := slices.Compact(slices.Clone(runs)); len(runs) != 2*total || len(processes) != jobs {
		t.Errorf("%d processes answered %d requests, want %d and %d", len(processes), len(runs), jobs, 2*total)
	}
	a.expectNothingLost(total)
	b.expectNothingLost(total)
	service.signal(syscall.SIGTERM)
	if got := service.waitForExit(); got != 0 {
		t.Errorf("the service ended with status %d", got)
	}
	a.expectNoDescendants()
}

// TestServiceIsStoppedWhileItWaitsForAJob stops a service that handed a request back.
func TestServiceIsStoppedWhileItWaitsForAJob(t *testing.T) {
	a, release := newHangingSystem(t)
	b := newSystem(t, "-v")
	service := a.start("bservice", "--heartbeat", "100ms", "--broker", a.endpoint, "--broker", b.endpoint, "work", "sh", "-c", hang, "sh")
	service.waitForLines(2, "service connected")
	held := a.each("work", []string{"x"}, func(string) string { return "done" })
	a.waitForRuns(1)
	other := b.each("work", []string{"y"}, func(line string) string { return "other " + line })
	b.broker.waitForLines(1, "request handed back")
	service.signal(syscall.SIGTERM)
	b.waitForMetric("backbone_workers", 0) // although the command still runs
	b.startShellService("work", `printf "other $1"`)
	other()
	release()
	held()
	if got := service.waitForExit(); got != 0 {
		t.Errorf("the service ended with status %d", got)
	}
	b.expectNothingLost(1)
}

// twoBrokers is a network with two brokers, services and clients. Each of these four has a host, and there is
// a link from each broker to the other two.
type twoBrokers struct {
	*network
	brokers [2]*childProcess
}

const (
	servicesHost = 2
	clientsHost  = 3
)

// addressOf returns the address of a broker on its link to the services or the clients.
func addressOf(broker, host int) string {
	return fmt.Sprint("192.0.2.", 1+8*broker+4*(host-servicesHost))
}

// toBrokers returns the flags for the brokers, as seen from a host.
func toBrokers(host int) []string {
	return []string{"-b", "tcp://" + addressOf(0, host) + ":5555", "-b", "tcp://" + addressOf(1, host) + ":5555"}
}

func newTwoBrokers(t *testing.T) *twoBrokers {
	t.Helper()
	n := &twoBrokers{network: newHosts(t, 4)}
	for i := range n.brokers {
		for _, host := range []int{servicesHost, clientsHost} {
			ip := addressOf(i, host)
			last, _ := strconv.Atoi(ip[strings.LastIndexByte(ip, '.')+1:])
			n.join(i, deviceTo(host), ip, host, deviceTo(i), fmt.Sprint("192.0.2.", last+1))
		}
		n.startBroker(i)
	}
	return n
}

func deviceTo(host int) string { return fmt.Sprint("to", host) }

func (n *twoBrokers) startBroker(i int) {
	n.t.Helper()
	n.brokers[i] = n.startOn(i, "", "bbroker", "--heartbeat", "100ms", "--broker", n.local(i),
		"--broker", "tcp://"+addressOf(i, servicesHost)+":5555", "--broker", "tcp://"+addressOf(i, clientsHost)+":5555")
	n.brokers[i].waitForLines(1, "broker started")
}

// local returns an endpoint of a broker that each host can reach.
func (n *twoBrokers) local(broker int) string {
	return fmt.Sprintf("ipc://%s/broker-%d", n.dir, broker)
}

// cable plugs the link from a broker to a host in, or pulls it out.
func (n *twoBrokers) cable(broker, host int, state string) {
	n.t.Helper()
	n.ip(broker, "link", "set", deviceTo(host), state)
}

// lines returns the lines of a file.
func (n *twoBrokers) lines(name string) []string {
	content, err := os.ReadFile(filepath.Join(n.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	return strings.Fields(string(content))
}

func TestServicesAndClientsGoOnWithoutABrokerAndEachReplyIsForItsRequest(t *testing.T) {
	n := newTwoBrokers(t)
	for range 5 {
		args := append(toBrokers(servicesHost), "--heartbeat", "100ms", "-j2", "work", "sh", "-c", `echo "$1" >>runs; printf "reply-%s" "$1"`, "sh")
		n.startOn(servicesHost, "", "bservice", args...)
	}
	for i := range n.brokers {
		(&system{t: t, dir: n.dir, endpoint: n.local(i)}).waitForMetric("backbone_workers", 10)
	}

	// Each client makes one request after the other, and records how it ended.
	const clients = 20
	var running []*childProcess
	for i := range clients {
		running = append(running, n.startOn(clientsHost, "", "sh", append([]string{"-c", `
			name=$1
			shift
			for i in $(seq 100000); do
				[ ! -e stop ] || exit 0
				output=$(brequest -q -t 3 "$@" work "$name.$i" 2>>errors)
				echo "$name.$i:$?:$output" >>ended
			done`, "sh", fmt.Sprint("client", i)}, toBrokers(clientsHost)...)...))
	}
	const batchLines = 5000
	var input, output, complaints bytes.Buffer
	for i := range batchLines {
		fmt.Fprintf(&input, "line%d\n", i)
	}
	batch := exec.Command("ip", append([]string{"netns", "exec", n.hosts[clientsHost], "brequest", "--each", "-t", "3", "--retries", "3"}, append(toBrokers(clientsHost), "work")...)...)
	batch.Dir, batch.Stdin, batch.Stdout, batch.Stderr = n.dir, &input, &output, &complaints
	batch.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	if err := batch.Start(); err != nil {
		t.Fatal(err)
	}

	// After each fault, clients must go on.
	goOn := func(what string) {
		t.Helper()
		succeeded := func() (count int) {
			for _, line := range n.lines("ended") {
				if strings.Contains(line, ":0:") {
					count++
				}
			}
			return count
		}
		before := succeeded()
		for deadline := time.Now().Add(30 * time.Second); succeeded() < before+clients; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the clients do not go on", what)
			}
		}
	}
	goOn("two brokers")
	for i := range n.brokers {
		n.brokers[i].signal(syscall.SIGKILL)
		goOn("killed")
		n.startBroker(i)
		goOn("started again")
		n.brokers[i].signal(syscall.SIGSTOP)
		goOn("stopped")
		n.brokers[i].signal(syscall.SIGCONT)
		for _, host := range []int{clientsHost, servicesHost} {
			n.cable(i, host, "down")
			goOn(fmt.Sprint("link to ", host, " down"))
			n.cable(i, host, "up")
		}
		goOn("links up again")
	}
	batchError := batch.Wait()
	if err := os.WriteFile(filepath.Join(n.dir, "stop"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, client := range running {
		if got := client.waitForExit(); got != 0 {
			t.Errorf("a client ended with %d", got)
		}
	}

	runs := map[string]int{}
	for _, line := range n.lines("runs") {
		runs[line]++
	}
	succeeded, failed := 0, map[string]int{}
	for _, line := range n.lines("ended") {
		fields := strings.SplitN(line, ":", 3)
		name, status, reply := fields[0], fields[1], fields[2]
		switch {
		case runs[name] > 1:
			t.Errorf("%s ran %d times", name, runs[name])
		case status == "0" && (reply != "reply-"+name || runs[name] != 1):
			t.Errorf("%s ran %d times, and its reply is %q", name, runs[name], reply)
		case status == "0":
			succeeded++
		case status == "69" || status == "124":
			failed[status]++
		default:
			t.Errorf("%s ended with status %s", name, status)
		}
	}
	t.Logf("%d requests of clients succeeded; failures by status: %v", succeeded, failed)

	// Each line of the batch has its reply, in order, or an error.
	replies := strings.Fields(output.String())
	failures := strings.Count(complaints.String(), "\n")
	next := 0
	for i := range batchLines {
		line := fmt.Sprint("line", i)
		if next < len(replies) && replies[next] == "reply-"+line {
			next++
			if runs[line] == 0 {
				t.Errorf("%s has a reply, but did not run", line)
			}
		}
	}
	if next != len(replies) || len(replies) < batchLines*9/10 || len(replies) < batchLines && batchError == nil {
		t.Errorf("the batch printed %d replies, %d of them in order, and %d lines of errors, and ended with %v", len(replies), next, failures, batchError)
	}
	t.Logf("%d lines of the batch succeeded", len(replies))
}

// Brokers are restarted in turn, as for an upgrade.
func TestNoRequestFailsWhileBrokersAreRestartedInTurn(t *testing.T) {
	s := newSystemWithoutBroker(t)
	endpoints := [2]string{"ipc://" + s.dir + "/a", "ipc://" + s.dir + "/b"}
	flags := []string{"-b", endpoints[0], "-b", endpoints[1]}
	brokers := [2]*childProcess{}
	startBroker := func(i int) {
		brokers[i] = s.start("bbroker", "--heartbeat", "100ms", "--broker", endpoints[i])
		brokers[i].waitForLines(1, "broker started")
	}
	for i := range brokers {
		startBroker(i)
	}
	for range 5 {
		s.start("bservice", append(flags, "--heartbeat", "100ms", "-j2", "work", "printf", "reply-%s")...)
	}
	served := func(i, workers int) {
		(&system{t: t, dir: s.dir, endpoint: endpoints[i]}).waitForMetric("backbone_workers", workers)
	}
	served(0, 10)
	served(1, 10)

	const clients, requests = 20, 100
	var asking sync.WaitGroup
	for i := range clients {
		asking.Go(func() {
			for j := range requests {
				client := newClient(context.Background(), []brokerAddress{{endpoint: endpoints[0]}, {endpoint: endpoints[1]}})
				client.service = "work"
				body := fmt.Sprintf("%d.%d", i, j)
				request := &call{service: "work", body: frames(body), timeout: 20 * time.Second, retries: 1}
				err := client.do(request, func() time.Time { return time.Time{} })
				if got := spell(request.reply.Output); err != nil || request.status() != 0 || !slices.Equal(got, []string{"reply-" + body}) {
					t.Errorf("%s: %v, status %d, %q, %v", body, err, request.status(), got, request.err)
				}
				client.Disconnect()
			}
		})
	}
	ended := make(chan struct{})
	go func() { asking.Wait(); close(ended) }()
	for restarts := 0; ; restarts++ {
		select {
		case <-ended:
			t.Logf("%d restarts", restarts)
			if restarts < 2 {
				t.Error("the requests ended before both brokers were restarted")
			}
			return
		default:
		}
		i := restarts % 2
		brokers[i].signal(syscall.SIGTERM)
		if got := brokers[i].waitForExit(); got != 0 {
			t.Fatalf("broker %d ended with %d", i, got)
		}
		startBroker(i)
		served(i, 10)
	}
}
