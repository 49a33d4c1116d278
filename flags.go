package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

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
