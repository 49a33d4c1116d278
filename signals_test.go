package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestSignalEndsARequestByTheSignalItself(t *testing.T) {
	s, _ := newHangingSystem(t)
	s.startShellService("hang", hang)
	for i, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		request := s.start("brequest", "--no-wait", "hang", "running") // which handles signals twice
		if i == 0 {
			s.waitForRuns(1)
		} else {
			s.waitForMetric("backbone_queue_length", 1)
		}
		request.signal(signal)
		if got := request.waitForExit(); got != 128+int(signal) {
			t.Errorf("%v: status %d, want %d", signal, got, 128+int(signal))
		}
		// SIGQUIT would leave a core.
		if got := request.ProcessState.Sys().(syscall.WaitStatus); got.Signaled() == (signal == syscall.SIGQUIT) {
			t.Errorf("%v: ended with %v", signal, got)
		}
		s.waitForMetric("backbone_cancelled_total", i) // The first one has begun.
	}
}

func TestSignalThatFollowsAnotherAtOnceCountsAsTheSame(t *testing.T) {
	s, release := newHangingSystem(t)
	service := s.startShellService("hang", hang)
	request := s.start("brequest", "hang", "running")
	s.waitForRuns(1)
	service.signal(syscall.SIGTERM)
	service.signal(syscall.SIGINT)
	service.waitForLines(1, "service stopping")
	release()
	if got := service.waitForExit(); got != 0 {
		t.Errorf("the service: status %d, want 0", got)
	}
	if got := request.waitForExit(); got != 0 {
		t.Errorf("the request: status %d, want 0", got)
	}
	// An idle broker has nothing to wait for, and is about to end.
	s.broker.signal(syscall.SIGTERM)
	s.broker.Process.Signal(syscall.SIGINT)
	if got := s.broker.waitForExit(); got != 0 {
		t.Errorf("the broker: status %d, want 0", got)
	}
}

func TestSignalIgnoredAtTheStartStaysIgnored(t *testing.T) {
	s, release := newHangingSystem(t)
	s.startShellService("hang", hang)
	request := s.start("sh", "-c", `trap "" INT HUP; exec brequest hang running`)
	s.waitForRuns(1)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		request.signal(signal)
	}
	release()
	if got := request.waitForExit(); got != 0 {
		t.Errorf("status %d, want 0", got)
	}
}

func TestSignalEndsARequestThatWaitsForTheReaderOfItsReply(t *testing.T) {
	s := newSystem(t)
	s.startShellService("long", "head -c 1M /dev/zero")
	unread := newFifo(t)
	reader, err := os.OpenFile(unread, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	printing := func(command string) *childProcess {
		request := s.start("sh", "-c", "ulimit -c 0; exec "+command+" -v long >"+unread)
		request.waitForLines(1, "received a reply")
		return request
	}
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT} {
		request := printing("brequest")
		request.signal(signal)
		status := request.waitForExit()
		signaled := request.ProcessState.Sys().(syscall.WaitStatus).Signaled()
		if status != 128+int(signal) || signaled == (signal == syscall.SIGQUIT) {
			t.Errorf("%v: status %d, by a signal: %v", signal, status, signaled)
		}
	}

	if os.Geteuid() != 0 {
		t.Skip("only root may start a process with the ID 1")
	}
	// The kernel ignores signals to that process unless it handles them.
	request := printing("unshare --pid --fork brequest")
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", request.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(pid, syscall.SIGTERM)
	if got := request.waitForExit(); got != 143 {
		t.Errorf("process 1: status %d, want 143", got)
	}
}
