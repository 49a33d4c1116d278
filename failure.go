package main

/*
#include <fcntl.h>
#include <unistd.h>

static int closed;

// Go opens /dev/null for a standard descriptor that is closed. This function runs before.
__attribute__((constructor)) static void check_stdout(void) {
	closed = fcntl(STDOUT_FILENO, F_GETFD) < 0;
}

static int stdout_was_closed(void) { return closed; }
*/
import "C"

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

// The exit statuses of the tools themselves; a service's command adds its own. They are those
// of sysexits.h, timeout(1) and the shell.
const (
	exitUsage       = 64
	exitUnavailable = 69
	exitIO          = 74
	exitTemporary   = 75
	exitProtocol    = 76
	exitNotAllowed  = 77
	exitSome        = 123
	exitTimeout     = 124
	exitCannotRun   = 126
	exitNotFound    = 127
	exitSignal      = 128 // plus the number of the signal
)

// A failure is an error with an exit status and, perhaps, a hint. Errors that wrap it have the same
// status and hint. Messages are complete without the hint.
type failure struct {
	status int
	err    error          // nil when nothing is left to say
	hint   string         // what to try, or empty
	signal syscall.Signal // that ended the tool, or 0
}

func (f *failure) Error() string {
	if f.err == nil {
		return fmt.Sprintf("exit status %d", f.status)
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// failureOf returns the failure that err is or wraps; any other error has status 1.
func failureOf(err error) *failure {
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{status: 1, err: err}
	}
	return f
}

// misuse returns the failure of wrong usage, with a hint at correct usage.
func misuse(hint, format string, args ...any) error {
	return &failure{status: exitUsage, err: fmt.Errorf(format, args...), hint: hint}
}

// signalled returns the failure of a tool that was ended by a signal.
func signalled(s syscall.Signal) *failure {
	f := &failure{status: exitSignal + int(s)}
	if s != syscall.SIGQUIT { // which would leave a core
		f.signal = s
	}
	return f
}

// outputFailure returns the failure of writing to standard output, or nil. When the reader has
// gone away, the tool ends quietly with the status of SIGPIPE, as other tools do.
func outputFailure(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EPIPE):
		return &failure{status: exitSignal + int(syscall.SIGPIPE)}
	}
	return &failure{status: exitIO, err: err}
}

// inputFailure returns the failure of reading standard input, or nil.
func inputFailure(err error) error {
	if err == nil {
		return nil
	}
	return &failure{status: exitIO, err: err}
}

// keepStdoutClosed makes writes to standard output fail if it was closed when the process started, as
// it is after >&-. A closed standard input is empty.
func keepStdoutClosed() {
	if C.stdout_was_closed() == 0 {
		return
	}
	if fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY|syscall.O_CLOEXEC, 0); err == nil {
		os.Stdout = os.NewFile(uintptr(fd), "standard output")
	}
}

// printOutput writes text to standard output.
func printOutput(text string) error {
	_, err := os.Stdout.WriteString(text)
	return outputFailure(err)
}

// A console prints messages for a person to standard error, as "tool: message".
type console struct {
	name           string // of the tool
	quiet, verbose bool
}

func (c console) errorf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s: %s\n", c.name, fmt.Sprintf(format, args...))
}

// infof prints what -q silences.
func (c console) infof(format string, args ...any) {
	if !c.quiet {
		c.errorf(format, args...)
	}
}

// debugf prints what -v asks for.
func (c console) debugf(format string, args ...any) {
	if c.verbose {
		c.errorf(format, args...)
	}
}

// report prints an error with its hint, and returns the failure that it is.
func (c console) report(err error) *failure {
	if err == nil {
		return nil
	}
	f := failureOf(err)
	if f.err != nil {
		c.errorf("%v", err)
	}
	if f.hint != "" {
		c.infof("hint: %s", f.hint)
	}
	return f
}

// printable returns text as it is, or quoted if it would break a line or hide something.
func printable(text string) string {
	if quoted := strconv.Quote(text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

const maxBackoff = 5 * time.Second

// backoff returns the pause after a number of failures in a row, at least one: from 0.1 s on,
// doubling up to maxBackoff.
func backoff(failures int) time.Duration {
	return min(maxBackoff, 100*time.Millisecond<<min(failures-1, 10))
}
