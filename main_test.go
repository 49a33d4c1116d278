package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	commands := map[string]func(){
		"backbone":      main,
		"backbone-1.0":  main,
		"echoworker":    echoWorker,
		"garbageserver": garbageServer,
		"garbageclient": garbageClient,
		"workerfleet":   workerFleet,
		"simplebroker":  simpleBroker,
		"patternwriter": patternWriter,
		"terminalsh":    terminalShell,
	}
	for _, a := range applets() {
		commands[a.name] = main
	}
	testscript.Main(m, commands)
}

// TestScripts runs the scripts in testdata/script, which call the tools like a user of a shell.
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
			// Each script has an endpoint of its own.
			env.Setenv("BACKBONE_BROKER", "ipc://"+env.WorkDir+"/broker")
			// By default the race detector lets each process sleep for a second before it exits.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			env.Setenv("ROOT", root)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    statusCommand,
			"signalled": signalledCommand,
		},
	})
}

// terminalShell runs sh, and waits until all of its output on the terminal was read: testscript reads no more once
// a command has ended. A terminal holds some 10 KiB that were not read, so more empty lines push the rest out.
func terminalShell() {
	shell := exec.Command("sh", os.Args[1:]...)
	shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
	shell.Run()
	terminal, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	raw := exec.Command("stty", "-opost") // no carriage return before a newline
	raw.Stdin = terminal
	if err = errors.Join(err, raw.Run()); err == nil {
		_, err = terminal.Write(bytes.Repeat([]byte("\n"), 64<<10))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(shell.ProcessState.ExitCode())
}

// statusCommand runs a program and checks its exit status: status N PROGRAM [ARG...].
func statusCommand(ts *testscript.TestScript, neg bool, args []string) {
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

// signalledCommand runs a program, sends it a signal and checks that the signal ends it:
// signalled INT|TERM PROGRAM [ARG...].
func signalledCommand(ts *testscript.TestScript, neg bool, args []string) {
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
	// A shell reports this as status 128 plus the number of the signal, and leaves its own loops.
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != signal {
		ts.Fatalf("%s ended with %v, want signal %v", args[1], cmd.ProcessState, signal)
	}
}
