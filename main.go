// Backbone turns any command into a network service and lets a shell script call it.
//
// It is one binary that is bbroker, bservice or brequest by the name it is called by.
package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
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

func newParser(t tool) (*kong.Kong, error) {
	// kong's own way with strings is through JSON, which replaces what is no UTF-8.
	exact := func(ctx *kong.DecodeContext, target reflect.Value) error {
		text, err := popText(ctx)
		target.SetString(text)
		return err
	}
	return kong.New(t, kong.NoDefaultHelp(), kong.KindMapper(reflect.String, kong.MapperFunc(exact)))
}

// popText takes the next value, byte for byte.
func popText(ctx *kong.DecodeContext) (string, error) {
	token, err := ctx.Scan.PopValue("string")
	text, _ := token.Value.(string)
	return text, err
}

// usageFailure says in our words what kong found wrong with the arguments, and
// guesses what was meant.
func usageFailure(tool string, err error) error {
	text, hint := err.Error(), tool+" --help"
	if flag, ok := strings.CutPrefix(text, "unknown flag "); ok {
		flag, _, _ = strings.Cut(flag, ",")
		if !strings.HasPrefix(flag, "--") {
			text = "unknown flag " + flag // kong's guesses at single letters help nobody
		}
		if tool != "bbroker" {
			hint = fmt.Sprintf("put -- before arguments that are not for %s: %s NAME -- %s", tool, tool, flag)
		}
	}
	if flag, _, ok := strings.Cut(text, ": expected "); ok && strings.HasSuffix(text, "(<EOL>)") {
		text = flag + " needs a value"
	}
	return misuse(hint, "%s", text)
}

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

// commonFlags are the flags that every tool has.
type commonFlags struct {
	Help    helpFlag `short:"h"`
	Version versionFlag
	Quiet   bool `short:"q" xor:"voice"`
	Verbose bool `short:"v" xor:"voice"`

	Host   string
	Port   string
	Broker []string `sep:"none"`
}

const endpointHint = "tcp://HOST:PORT or ipc:///PATH"

// endpoints are those of the broker, never none of them. Flags beat the environment,
// and in each of the two the endpoint beats host and port.
func (f *commonFlags) endpoints() ([]string, error) {
	endpoints := f.Broker
	if env := os.Getenv("BACKBONE_BROKER"); env != "" && endpoints == nil && f.Host == "" && f.Port == "" {
		endpoints = []string{env}
	}
	for _, e := range endpoints {
		if !strings.HasPrefix(e, "tcp://") && !strings.HasPrefix(e, "ipc://") {
			return nil, misuse(endpointHint, "%q is no endpoint", e)
		}
	}
	if endpoints != nil {
		return endpoints, nil
	}

	host := cmp.Or(f.Host, os.Getenv("BACKBONE_HOST"), "127.0.0.1")
	port := cmp.Or(f.Port, os.Getenv("BACKBONE_PORT"), "5555")
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, misuse("a number from 1 to 65535", "%q is no port", port)
	}
	if strings.Contains(host, ":") {
		host = "[" + strings.Trim(host, "[]") + "]"
	}
	return []string{"tcp://" + host + ":" + port}, nil
}

// endpoint is that of the one broker that a service or a request goes to.
func (f *commonFlags) endpoint() (string, error) {
	endpoints, err := f.endpoints()
	if err != nil {
		return "", err
	}
	if len(endpoints) > 1 {
		return "", misuse("only bbroker takes several", "more than one --broker")
	}
	return endpoints[0], nil
}

func (f *commonFlags) quiet() bool { return f.Quiet }

// voice is how a tool with these flags talks.
func (f *commonFlags) voice(tool string) voice {
	return voice{tool, f.Quiet, f.Verbose}
}

// heartbeatFlags are those of the two tools that must know of each other whether
// they live: each sends a heartbeat every Heartbeat, and holds the other for dead
// when it has heard nothing for Liveness heartbeats of its own.
type heartbeatFlags struct {
	Heartbeat duration `default:"1s"`
	Liveness  int      `default:"5"`
}

func (f *heartbeatFlags) Validate() error {
	if f.Heartbeat < duration(time.Millisecond) {
		return errors.New("--heartbeat must be 1ms or more")
	}
	if f.Liveness < 1 {
		return errors.New("--liveness must be 1 or more")
	}
	return nil
}

type (
	helpFlag    bool
	versionFlag bool
)

var (
	errHelp    = errors.New("help asked for")
	errVersion = errors.New("version asked for")
)

// BeforeReset stops kong before it misses the arguments that --help can do without.
func (helpFlag) BeforeReset() error    { return errHelp }
func (versionFlag) BeforeReset() error { return errVersion }

// duration is a time as flags take it: with a unit, or a bare number of seconds.
type duration time.Duration

func (d *duration) Decode(ctx *kong.DecodeContext) error {
	text, err := popText(ctx)
	if err != nil {
		return err
	}
	unit := ""
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		unit = "s"
	}
	parsed, err := time.ParseDuration(text + unit)
	if err != nil || parsed < 0 {
		return fmt.Errorf("%q is no duration; try 5, 0.5 or 500ms", text)
	}
	*d = duration(parsed)
	return nil
}

// size is a number of bytes as flags take it: with K, M or G for powers of 1024, or bare.
type size int64

func (s *size) Decode(ctx *kong.DecodeContext) error {
	text, err := popText(ctx)
	if err != nil {
		return err
	}
	digits, shift := text, 0
	if i := strings.IndexAny(text, "KMG"); i >= 0 && i == len(text)-1 {
		digits, shift = text[:i], 10*(1+strings.IndexByte("KMG", text[i]))
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 || n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is no size; try 1000000, 64K, 256M or 1G", text)
	}
	*s = size(n << shift)
	return nil
}

// chunks are bytes of which there may be so many that it matters how often they are held:
// not more than twice, and once in the end.
type chunks struct {
	list [][]byte // all but the last are full
}

// large is such a number of bytes.
const large = 16 << 20

// room is where the next bytes go, one at least, which take then takes. A new chunk has
// room for so many, or else is longer than the last.
func (c *chunks) room(many int) []byte {
	n := len(c.list)
	if n == 0 || len(c.list[n-1]) == cap(c.list[n-1]) {
		if n > 0 {
			many = max(many, min(2*cap(c.list[n-1]), large))
		}
		c.list = append(c.list, make([]byte, 0, many))
	}
	last := c.list[len(c.list)-1]
	return last[len(last):cap(last)]
}

func (c *chunks) take(n int) {
	last := &c.list[len(c.list)-1]
	*last = (*last)[:len(*last)+n]
}

func (c *chunks) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := copy(c.room(len(rest)), rest)
		c.take(n)
		rest = rest[n:]
	}
	return len(p), nil
}

// Bytes are all of them, in one piece.
func (c *chunks) Bytes() []byte {
	if len(c.list) == 1 {
		return c.list[0]
	}
	all := bytes.Join(c.list, nil)
	c.list = [][]byte{all}
	freeIfLarge(size(len(all)))
	return all
}

// freeIfLarge gives back memory that is not used any more, if it may be that much.
func freeIfLarge(length size) {
	if length >= large {
		debug.FreeOSMemory()
	}
}

// operands are the arguments that a tool hands on untouched.
type operands []string

// AfterApply takes off the -- before them. kong leaves it there, since it cannot
// tell whether it ends the flags; it does unless another one already did.
func (o *operands) AfterApply(ctx *kong.Context) error {
	ours := ctx.Args[:len(ctx.Args)-len(*o)]
	if len(*o) > 0 && (*o)[0] == "--" && !slices.Contains(ours, "--") {
		*o = (*o)[1:]
	}
	return nil
}

// with are the operands for some values, which go where one of them is {}, else at the end.
func (o operands) with(values ...string) []string {
	if !slices.Contains(o, "{}") {
		return slices.Concat(o, values)
	}
	var all []string
	for _, operand := range o {
		if operand == "{}" {
			all = append(all, values...)
		} else {
			all = append(all, operand)
		}
	}
	return all
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
