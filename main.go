// Backbone turns any command into a network service and lets a shell script call it.
//
// It is one binary that is bbroker, bservice or brequest, depending on its name.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	zmq "github.com/pebbe/zmq4"
)

const backboneUsage = `Backbone turns any command into a network service and lets a shell script call it.

Usage:
  backbone APPLET [ARG...]   run an applet; the leading b may be omitted
  backbone --list            print the names of the applets
  backbone --install DIR     link the applets into DIR, creating it if needed
  backbone --keygen FILE     make a secret key in FILE, and print its public key
  backbone --pubkey <FILE    print the public key of a secret key
  backbone --version
  backbone --help

Applets, each with its own --help:
  bbroker                    pass requests to services, and their replies back
  bservice NAME COMMAND      serve a command under a name
  brequest NAME [ARG...]     call a service and print its reply

Called through a link with the name of an applet, backbone is that applet:
  $ backbone --install ~/bin
  $ bbroker &
  $ bservice ls-service ls &
  $ ls | brequest ls-service
`

// An applet is one of the tools in this binary.
type applet struct {
	name  string
	usage string
	new   func() command // a function, so that the applets that do not run cost nothing
}

// A command is the flags of an applet, for kong to fill in, and the work to do with them.
type command interface {
	Run() error
	console(name string) console
}

func applets() []applet {
	return []applet{
		{"bbroker", brokerUsage, func() command { return new(brokerTool) }},
		{"bservice", serviceUsage, func() command { return new(serviceTool) }},
		{"brequest", requestUsage, func() command { return new(requestTool) }},
	}
}

func main() {
	keepStdoutClosed()
	exit(run(os.Args))
}

// run is the whole program up to its exit: it returns the failure that was reported, or nil.
// The applet is the name that the program was called by, or else the first argument.
func run(argv []string) *failure {
	words := append([]string{filepath.Base(argv[0])}, argv[1:]...)
	for i, word := range words[:min(2, len(words))] {
		for _, a := range applets() {
			if word == a.name || "b"+word == a.name {
				return a.run(words[i+1:])
			}
		}
	}
	return console{name: "backbone"}.report(backbone(argv[1:]))
}

// run parses the arguments of the applet and does its work.
func (a applet) run(args []string) *failure {
	t := a.new()
	err := parse(t, args)
	switch {
	case err == nil:
		err = t.Run()
	case errors.Is(err, errHelp):
		err = printOutput(a.usage)
	case errors.Is(err, errVersion):
		err = printOutput(version(a.name))
	default:
		err = usageFailure(a.name, err)
	}
	return t.console(a.name).report(err)
}

// exit ends the process with the status of a failure, or by its signal.
func exit(f *failure) {
	if f == nil {
		os.Exit(0)
	}
	if f.signal != 0 {
		endBySignal(f.signal)
	}
	os.Exit(f.status)
}

// backbone is what the binary does under its own name.
func backbone(args []string) error {
	switch {
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h"):
		return printOutput(backboneUsage)
	case len(args) == 1 && args[0] == "--version":
		return printOutput(version("backbone"))
	case len(args) == 1 && args[0] == "--list":
		var names strings.Builder
		for _, a := range applets() {
			fmt.Fprintln(&names, a.name)
		}
		return printOutput(names.String())
	case len(args) == 2 && args[0] == "--keygen":
		return keygen(args[1])
	case len(args) == 1 && args[0] == "--keygen":
		return misuse("backbone --keygen FILE", "--keygen needs a file")
	case len(args) == 1 && args[0] == "--pubkey":
		return pubkey()
	case len(args) == 2 && args[0] == "--pubkey":
		return misuse("backbone --pubkey <"+args[1], "--pubkey reads standard input")
	case len(args) == 2 && args[0] == "--install":
		return install(args[1])
	case len(args) == 1 && args[0] == "--install":
		return misuse("backbone --install ~/bin", "--install needs a directory")
	case len(args) == 0:
		return misuse("backbone --help lists the applets", "no applet given")
	case strings.HasPrefix(args[0], "-"):
		return misuse("backbone --help", "unknown arguments %q", strings.Join(args, " "))
	}
	return misuse("backbone --list prints the applets", "unknown applet %q", args[0])
}

// install creates a link for each applet in a directory, which it makes if need be. It keeps links to
// this binary, and creates none if a name is taken by something else.
func install(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	ours, err := os.Stat(self)
	if err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	var missing []string
	for _, a := range applets() {
		path := filepath.Join(dir, a.name)
		_, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, path)
			continue
		}
		if err != nil {
			return err
		}
		if target, err := os.Stat(path); err != nil || !os.SameFile(ours, target) {
			return fmt.Errorf("%s exists and is not a link to this binary; move it away first", path)
		}
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	for _, path := range missing {
		if err := os.Symlink(self, path); err != nil {
			return err
		}
	}
	return nil
}

// release is the version that scripts/build puts into the binary.
var release string

func version(name string) string {
	return fmt.Sprintf("%s %s (libzmq %s)\n", name, buildVersion(), libraryVersion())
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && release == "" {
		return info.Main.Version
	}
	return release
}

// libraryVersion returns the version of libzmq.
func libraryVersion() string {
	major, minor, patch := zmq.Version()
	return fmt.Sprintf("%d.%d.%d", major, minor, patch)
}
