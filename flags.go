package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// commonFlags are the flags of every tool.
type commonFlags struct {
	Help    helpFlag `short:"h"`
	Version versionFlag
	Quiet   bool `short:"q" xor:"verbosity"`
	Verbose bool `short:"v" xor:"verbosity"`

	Host   string
	Port   string   `short:"p"`
	Broker []string `short:"b" sep:"none"`
	Key    string
}

const (
	defaultHost = "127.0.0.1"
	defaultPort = "5555"
)

func (f *commonFlags) console(name string) console {
	return console{name: name, quiet: f.Quiet, verbose: f.Verbose}
}

const endpointForm = "tcp://HOST:PORT or ipc:///PATH"

// endpoints returns the endpoints of the brokers, at least one. Flags override the
// environment, and in each of the two an endpoint overrides host and port.
func (f *commonFlags) endpoints() ([]string, error) {
	source, endpoints := "--broker", f.Broker
	if env := os.Getenv("BACKBONE_BROKER"); env != "" && endpoints == nil && f.Host == "" && f.Port == "" {
		source, endpoints = "BACKBONE_BROKER", strings.Fields(env)
	}
	for _, endpoint := range endpoints {
		if !isEndpoint(endpoint) {
			endpoint, _, _ = strings.Cut(endpoint, "#") // What follows may be a secret key, by mistake.
			return nil, misuse("--broker tcp://localhost:5555", "%s must be %s, not %q", source, endpointForm, endpoint)
		}
	}
	if len(endpoints) == 0 {
		endpoint, err := f.hostAndPort()
		return []string{endpoint}, err
	}
	return endpoints, nil
}

// isTCP tells whether an endpoint is one where keys may be used. At the others, those of ipc, the permissions
// of the socket say who may connect.
func isTCP(endpoint string) bool { return strings.HasPrefix(endpoint, "tcp://") }

// isEndpoint tells whether text has endpointForm, as far as that can be told before it is used.
func isEndpoint(text string) bool {
	if hostPort, ok := strings.CutPrefix(text, "tcp://"); ok {
		hostPort, _, _ = strings.Cut(hostPort, "#")
		hostPort = hostPort[strings.LastIndexByte(hostPort, ';')+1:] // ZeroMQ takes a source address before it.
		host, port, err := net.SplitHostPort(hostPort)
		_, portErr := strconv.ParseUint(port, 10, 16)
		return err == nil && host != "" && (portErr == nil || port == "*")
	}
	return strings.HasPrefix(text, "ipc://") && text != "ipc://"
}

// hostAndPort returns the endpoint for a host and a port.
func (f *commonFlags) hostAndPort() (string, error) {
	host := cmp.Or(f.Host, os.Getenv("BACKBONE_HOST"), defaultHost)
	source, port := "--port", f.Port
	if port == "" {
		source, port = "BACKBONE_PORT", cmp.Or(os.Getenv("BACKBONE_PORT"), defaultPort)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", misuse("--port 5555", "%s must be a number from 0 to 65535, not %q", source, port)
	}
	if strings.Contains(host, ":") {
		host = "[" + strings.Trim(host, "[]") + "]"
	}
	return "tcp://" + host + ":" + port, nil
}

// key returns the secret key of --key or BACKBONE_KEY, nil if there is none, and the name of the one that
// is set.
func (f *commonFlags) key() (key *secretKey, source string, err error) {
	source, file := setBy("--key", f.Key, "BACKBONE_KEY")
	if file == "" {
		return nil, source, nil
	}
	key, err = readSecretKey(file, source)
	return key, source, err
}

// setBy returns the value of a flag, or else of an environment variable, and the name of the one that it
// has.
func setBy(flag, value, variable string) (source, text string) {
	if value != "" {
		return flag, value
	}
	return variable, os.Getenv(variable)
}

// clientFlags are those of services and requests.
type clientFlags struct {
	commonFlags
	BrokerKey string
}

// A brokerAddress is where a broker is, and the keys for connections to it, nil for none.
type brokerAddress struct {
	endpoint string
	keys     *linkKeys
}

// userOf returns the name of the caller of a request, or nothing if that is not known. Only where a broker
// knows who connects does its token end in the name; another broker may let callers choose it.
func (a brokerAddress) userOf(token string) string {
	knowsUsers := a.keys != nil || strings.HasPrefix(a.endpoint, "ipc://")
	if at := strings.LastIndexByte(token, '@'); knowsUsers && at >= 0 {
		return token[at+1:]
	}
	return ""
}

// addresses returns the addresses of the brokers of a service or a request, at least one, and each once.
func (f *clientFlags) addresses() (addresses []brokerAddress, err error) {
	endpoints, err := f.endpoints()
	if err != nil {
		return nil, err
	}
	if (f.Key != "" || f.BrokerKey != "") && !slices.ContainsFunc(endpoints, isTCP) {
		return nil, misuse("the permissions of the socket say who may connect", "an ipc endpoint takes no keys: %s", endpoints[0])
	}
	for _, endpoint := range endpoints {
		address := brokerAddress{endpoint: endpoint} // ipc: the environment may have keys for others, and a path may have a #
		if isTCP(endpoint) {
			address, err = f.tcpAddress(endpoint, len(endpoints) == 1)
		}
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(addresses, func(a brokerAddress) bool { return a.endpoint == address.endpoint }) {
			addresses = append(addresses, address)
		}
	}
	return addresses, nil
}

// tcpAddress returns the address of an endpoint, perhaps with its own key behind a #, which --broker-key must
// not contradict if it is the only one.
func (f *clientFlags) tcpAddress(text string, only bool) (brokerAddress, error) {
	endpoint, key, hasKey := strings.Cut(text, "#")
	source := "the key in " + endpoint
	switch {
	case !hasKey:
		source, key = setBy("--broker-key", f.BrokerKey, "BACKBONE_BROKER_KEY")
	case only && f.BrokerKey != "" && f.BrokerKey != key:
		return brokerAddress{}, misuse("give the key once", "--broker-key is another key than that in %s", endpoint)
	}
	own, ownSource, err := f.key()
	switch {
	case err != nil:
		return brokerAddress{}, err
	case key == "" && !hasKey && own != nil:
		return brokerAddress{}, misuse("backbone --pubkey <FILE prints the key of a broker", "%s needs --broker-key, the public key of the broker", ownSource)
	case key == "" && !hasKey:
		return brokerAddress{endpoint: endpoint}, nil
	}
	broker, err := parsePublicKey(key)
	if err != nil {
		return brokerAddress{}, misuse(`from a file that backbone --keygen printed: --broker-key "$(cat FILE)"`, "%s: %w", source, err)
	}
	return brokerAddress{endpoint, &linkKeys{broker: broker, own: own}}, nil
}

// endpointsOf returns the endpoints of brokers, separated by blanks.
func endpointsOf(addresses []brokerAddress) string {
	endpoints := make([]string, len(addresses))
	for i, address := range addresses {
		endpoints[i] = address.endpoint
	}
	return strings.Join(endpoints, " ")
}

// heartbeatFlags are those of the broker and of services. Each sends a heartbeat every Heartbeat, and
// gives the other up after it has heard nothing for Liveness such intervals.
type heartbeatFlags struct {
	Heartbeat time.Duration `default:"1s"`
	Liveness  int           `default:"5"`
}

func (f *heartbeatFlags) Validate() error {
	if f.Heartbeat < time.Millisecond {
		return fmt.Errorf("--heartbeat must be 1ms or more, not %v", f.Heartbeat)
	}
	if f.Liveness < 1 {
		return fmt.Errorf("--liveness must be 1 or more, not %d", f.Liveness)
	}
	return nil
}

// silenceLimit is how long a peer may be silent, or away.
func (f *heartbeatFlags) silenceLimit() time.Duration { return time.Duration(f.Liveness) * f.Heartbeat }

type (
	helpFlag    bool
	versionFlag bool
)

var (
	errHelp    = errors.New("help requested")
	errVersion = errors.New("version requested")
)

// BeforeReset runs before kong checks that required arguments are there.
func (helpFlag) BeforeReset() error    { return errHelp }
func (versionFlag) BeforeReset() error { return errVersion }

// A size is a number of bytes. As a flag it is a bare number, or one with K, M or G for powers
// of 1024.
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
	unbounded := n == 0 && ctx.Value.Tag.Has("unbounded") // 0 means no bound
	if err != nil || n < 1 && !unbounded || n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is not a size such as 1000000, 64K, 256M or 1G", text)
	}
	*s = size(n << shift)
	return nil
}

// decodeDuration takes a duration with a unit, or a bare number of seconds.
func decodeDuration(ctx *kong.DecodeContext, target reflect.Value) error {
	text, err := popText(ctx)
	if err != nil {
		return err
	}
	unit := ""
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		unit = "s"
	}
	d, err := time.ParseDuration(text + unit)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is not a duration such as 5, 0.5 or 500ms", text)
	}
	target.SetInt(int64(d))
	return nil
}

// decodeString takes text byte for byte. kong itself decodes through JSON, which replaces what
// is not UTF-8.
func decodeString(ctx *kong.DecodeContext, target reflect.Value) error {
	text, err := popText(ctx)
	target.SetString(text)
	return err
}

// decodeNumber takes a whole number. Whether it is in range is for the tool to say.
func decodeNumber(ctx *kong.DecodeContext, target reflect.Value) error {
	text, err := popText(ctx)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", text)
	}
	target.SetInt(int64(n))
	return nil
}

// popText returns the next value as it was typed. A negative number is a value: kong itself would
// take it for a flag. -0 is one.
func popText(ctx *kong.DecodeContext) (string, error) {
	text, _ := ctx.Scan.Peek().Value.(string)
	if _, err := strconv.ParseFloat(text, 64); err == nil && text != "-0" {
		ctx.Scan.Pop()
		return text, nil
	}
	token, err := ctx.Scan.PopValue("string")
	text, _ = token.Value.(string)
	return text, err
}

// operands are arguments that a tool hands on untouched.
type operands []string

// AfterApply removes the -- before them. kong leaves it there because it cannot tell whether
// it ends the flags; it does, unless an earlier one did.
func (o *operands) AfterApply(ctx *kong.Context) error {
	before := ctx.Args[:len(ctx.Args)-len(*o)]
	if len(*o) > 0 && (*o)[0] == "--" && !slices.Contains(before, "--") {
		*o = (*o)[1:]
	}
	return nil
}

// with returns the operands with the values where one of them is {}, or else at the end.
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

// parse fills in the flags and arguments of a tool.
func parse(t command, args []string) error {
	// Most requests have no flags, and kong would take longer than to connect to a broker.
	if r, ok := t.(*requestTool); ok && r.parsePlain(args) {
		return nil
	}
	_, err := newParser(t).Parse(args)
	return err
}

// newParser returns a parser that fills in the flags of a tool.
func newParser(t command) *kong.Kong {
	return kong.Must(t, kong.NoDefaultHelp(),
		kong.KindMapper(reflect.String, kong.MapperFunc(decodeString)),
		kong.KindMapper(reflect.Int, kong.MapperFunc(decodeNumber)),
		kong.TypeMapper(reflect.TypeFor[time.Duration](), kong.MapperFunc(decodeDuration)))
}

// usageFailure returns the failure of arguments that kong could not parse, in our words and
// with a guess at what was meant.
func usageFailure(name string, err error) error {
	text, hint := err.Error(), name+" --help"
	if flag, ok := strings.CutPrefix(text, "unknown flag "); ok {
		flag, _, guessed := strings.Cut(flag, ",")
		if !strings.HasPrefix(flag, "--") {
			text = "unknown flag " + flag // without kong's guess, which a single letter makes useless
		}
		switch {
		case guessed && strings.HasPrefix(flag, "--"):
		case name == "bservice":
			hint = fmt.Sprintf("flags of COMMAND follow it: bservice NAME COMMAND %s", flag)
		case name == "brequest":
			hint = fmt.Sprintf("put -- before arguments that are not for brequest: brequest NAME -- %s", flag)
		}
	}
	if flag, _, ok := strings.Cut(text, ": expected "); ok && strings.HasSuffix(text, "(<EOL>)") {
		text = flag + " needs a value"
	}
	return misuse(hint, "%s", text)
}
