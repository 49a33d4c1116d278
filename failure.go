package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// The exit statuses of our own; a service's command adds its own to them. They are
// those of sysexits.h, timeout(1) and the shell. README.md tells what each means.
const (
	exitUsage       = 64
	exitUnavailable = 69
	exitIO          = 74
	exitTemporary   = 75
	exitProtocol    = 76
	exitSome        = 123
	exitTimeout     = 124
	exitCannotRun   = 126
	exitNotFound    = 127
	exitSignal      = 128 // plus the signal's number
)

// A failure is an error that knows the exit status it means.
type failure struct {
	status int
	err    error          // nil when there is nothing left to say
	hint   string         // what to try, or empty
	signal syscall.Signal // that ended the tool, or 0
}

// signalled is the failure of a tool that was ended by a signal.
func signalled(s os.Signal) *failure {
	number := s.(syscall.Signal)
	return &failure{status: exitSignal + int(number), signal: number}
}

func (f *failure) Error() string {
	if f.err == nil {
		return fmt.Sprintf("exit status %d", f.status)
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// failureOf is the failure that an error is, or else one of status 1.
func failureOf(err error) *failure {
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{status: 1, err: err}
	}
	return f
}

// misuse is the failure of wrong usage, with a hint at the right one.
func misuse(hint, format string, args ...any) error {
	return &failure{status: exitUsage, err: fmt.Errorf(format, args...), hint: hint}
}

// report tells the person what went wrong and returns the exit status.
func report(name string, err error) int {
	if err == nil {
		return 0
	}
	f := failureOf(err)
	v := voice{tool: name}
	if f.err != nil {
		v.say("%v", err)
	}
	if f.hint != "" {
		v.say("hint: %s", f.hint)
	}
	if f.signal != 0 {
		// A shell ends its loop on Ctrl-C only when the signal ended the command.
		signal.Reset(f.signal)
		syscall.Kill(os.Getpid(), f.signal)
		<-time.After(time.Second) // for the signal to come, were it to another thread
	}
	return f.status
}

// A voice talks to the person at the prompt, on standard error: "tool: message".
type voice struct {
	tool           string
	quiet, verbose bool
}

func (v voice) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s: %s\n", v.tool, fmt.Sprintf(format, args...))
}

// note says what -q silences.
func (v voice) note(format string, args ...any) {
	if !v.quiet {
		v.say(format, args...)
	}
}

// detail says what -v asks for.
func (v voice) detail(format string, args ...any) {
	if v.verbose {
		v.say(format, args...)
	}
}

// printable is a text as it is, or quoted where it would break a line or hide something.
func printable(text string) string {
	if quoted := strconv.Quote(text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

// output writes data, for scripts.
func output(text string) error {
	if _, err := os.Stdout.WriteString(text); err != nil {
		return &failure{status: exitIO, err: err}
	}
	return nil
}

// backoff is the pause after so many failures: short at first, seconds in the end.
func backoff(failures int) time.Duration {
	return min(longestPause, 100*time.Millisecond<<min(failures-1, 10))
}

const longestPause = 5 * time.Second

// onSignals takes the signals that ask a tool to end, SIGTERM and SIGINT, and does one
// step for each; more of them change nothing. After restore they end the process at once.
//
// SIGINT is left alone where whoever started the tool had it ignored, as shells do for
// what a script starts with &.
func onSignals(steps ...func(os.Signal)) (restore func()) {
	wanted := []os.Signal{syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGINT) {
		wanted = append(wanted, syscall.SIGINT)
	}
	signals := make(chan os.Signal, len(steps))
	signal.Notify(signals, wanted...)
	go func() {
		for _, step := range steps {
			step(<-signals)
		}
	}()
	return func() { signal.Stop(signals) }
}

// outputFailure is that of standard output. A reader that has seen enough is none to
// speak of: we end as other tools do.
func outputFailure(err error) *failure {
	if errors.Is(err, syscall.EPIPE) {
		return signalled(syscall.SIGPIPE)
	}
	return &failure{status: exitIO, err: err}
}
