package main

// Signals that ask a tool to stop. os/signal would start two threads, and switch to one of them and back for
// each signal that it registers, which takes longer than to connect to a broker.

/*
#include <errno.h>
#include <signal.h>
#include <unistd.h>

static int signal_pipe; // the end to write of the pipe for the numbers of signals; it does not block

static void write_signal(int number) {
	unsigned char byte = number;
	int interrupted = errno; // belongs to what the signal has interrupted

	if (write(signal_pipe, &byte, 1) == -1) {
		// The pipe is full of signals that are still to be read.
	}
	errno = interrupted;
}

static void set_handler(int number, void (*handler)(int)) {
	// Go needs SA_ONSTACK: its own stacks are too small for a handler.
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK | SA_RESTART};
	sigfillset(&action.sa_mask);
	sigaction(number, &action, NULL);
}

static void catch_signal(int number, int pipe) {
	signal_pipe = pipe;
	set_handler(number, write_signal);
}

static void default_signal(int number) { set_handler(number, SIG_DFL); }
*/
import "C"

import (
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

// stopSignals ask a tool to stop, besides SIGTERM.
var stopSignals = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP}

// sameSignal is how long a signal counts as the same as the one before: timeout(1) and terminals
// signal a process and then its group.
const sameSignal = 300 * time.Millisecond

// onSignals calls the steps one after the other, one for each signal that asks the tool to stop:
// SIGTERM and those of others that were not ignored at the start. Shells ignore SIGINT
// for commands that a script starts with &, and nohup(1) ignores SIGHUP. A signal after the last step,
// or after restore, ends the process at once. Another call takes the signals over.
func onSignals(others []syscall.Signal, steps ...func(syscall.Signal)) (restore func()) {
	pipe, err := openPipe()
	if err == nil {
		err = syscall.SetNonblock(pipe[1], true)
	}
	if err != nil {
		return func() {} // The first signal ends the process.
	}
	C.catch_signal(C.int(syscall.SIGTERM), C.int(pipe[1]))
	for _, s := range others {
		if !signal.Ignored(s) {
			C.catch_signal(C.int(s), C.int(pipe[1]))
		}
	}
	var restored atomic.Bool
	go func() {
		for handled := (time.Time{}); ; handled = time.Now() {
			s := readSignal(pipe[0])
			for time.Since(handled) < sameSignal {
				s = readSignal(pipe[0])
			}
			if len(steps) == 0 || restored.Load() {
				exit(signalled(s))
			}
			steps[0](s)
			steps = steps[1:]
		}
	}()
	return func() { restored.Store(true) }
}

// readSignal waits for the number of a signal. The pipe is never closed.
func readSignal(pipe int) syscall.Signal {
	number := []byte{0}
	for {
		if n, _ := syscall.Read(pipe, number); n == 1 {
			return syscall.Signal(number[0])
		}
	}
}

// endBySignal ends the process by a signal: a shell ends its loop on Ctrl-C only if the signal ended the
// command. It returns if the signal is not delivered within a second, as to a process with the ID 1.
func endBySignal(s syscall.Signal) {
	C.default_signal(C.int(s))
	syscall.Kill(syscall.Getpid(), s)
	<-time.After(time.Second)
}
