// Backbone turns any command into a network service and lets a shell script call it.
//
// It is one binary that is bbroker, bservice or brequest by the name it is called by.
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
  backbone APPLET [ARG...]   be that applet; its name may lack the leading b
  backbone --list            print the names of the applets
  backbone --install DIR     link each applet into DIR, overwriting nothing
  backbone --version
  backbone --help

Applets, each with its own --help:
  bbroker                    passes requests to services and replies back
  bservice NAME COMMAND      serves a command under a name
  brequest NAME [ARG...]     asks a service and prints its reply

Called through a link with an applet's name, backbone is that applet:
  $ backbone --install ~/bin
  $ bbroker &
  $ bservice ls-service ls &
  $ ls | brequest ls-service
`

// An applet is one of the tools in this binary.
type applet struct {
	name  string
	usage string
	new   func() tool // called for the applet that runs, so that the others cost nothing
}

// A tool is an applet's flags, for kong to fill in, and the work to do with them.
type tool interface {
	Run() error
	quiet() bool
}

func applets() []applet {
	return []applet{
		{"bbroker", brokerUsage, func() tool { return new(brokerTool) }},
		{"bservice", serviceUsage, func() tool { return new(serviceTool) }},
		{"brequest", requestUsage, func() tool { return new(requestTool) }},
	}
}

func main() {
	os.Exit(run(os.Args))
}

// run is the whole program up to its exit status. The applet is what the program was
// called as, or else the first argument.
func run(argv []string) int {
	words := append([]string{filepath.Base(argv[0])}, argv[1:]...)
	for i, word := range words[:min(2, len(words))] {
		for _, a := range applets() {
			if word == a.name || "b"+word == a.name {
				return report(a.name, a.run(words[i+1:]))
			}
		}
	}
	return report("backbone", backbone(argv[1:]))
}

// backbone is what the binary does under its own name.
func backbone(args []string) error {
	switch {
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h"):
		return output(backboneUsage)
	case len(args) == 1 && args[0] == "--version":
		return output(version("backbone"))
	case len(args) == 1 && args[0] == "--list":
		var names strings.Builder
		for _, a := range applets() {
			fmt.Fprintln(&names, a.name)
		}
		return output(names.String())
	case len(args) == 2 && args[0] == "--install":
		return install(args[1])
	case len(args) == 1 && args[0] == "--install":
		return misuse("backbone --install ~/bin", "--install needs a directory")
	case len(args) == 0:
		return misuse("backbone --help shows them", "no applet named")
	case strings.HasPrefix(args[0], "-"):
		return misuse("backbone --help", "cannot make sense of %q", strings.Join(args, " "))
	}
	return misuse("backbone --list shows them", "no applet %q", args[0])
}

// install links every applet into dir. What is there already stays: our own links
// are left as they are, and anything else is an error before the first link is made.
func install(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	us, err := os.Stat(self)
	if err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	var missing []string
	for _, a := range applets() {
		link := filepath.Join(dir, a.name)
		_, err := os.Lstat(link)
		if errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, link)
			continue
		}
		if there, err := os.Stat(link); err != nil || !os.SameFile(us, there) {
			return fmt.Errorf("%s is there already and not ours; move it away first", link)
		}
	}
	for _, link := range missing {
		if err := os.Symlink(self, link); err != nil {
			return err
		}
	}
	return nil
}

// run parses the applet's arguments and does its work.
func (a applet) run(args []string) error {
	t := a.new()
	parser, err := newParser(t)
	if err != nil {
		return err
	}
	_, err = parser.Parse(args)
	switch {
	case errors.Is(err, errHelp):
		return output(a.usage)
	case errors.Is(err, errVersion):
		return output(version(a.name))
	case err != nil:
		return usageFailure(a.name, err)
	}

	err = t.Run()
	var f *failure
	if t.quiet() && errors.As(err, &f) {
		f.hint = ""
	}
	return err
}

// release is the version that scripts/build stamps into the binary.
var release string

func version(name string) string {
	v := release
	if info, ok := debug.ReadBuildInfo(); ok && v == "" {
		v = info.Main.Version
	}
	major, minor, patch := zmq.Version()
	return fmt.Sprintf("%s %s (libzmq %d.%d.%d)\n", name, v, major, minor, patch)
}
