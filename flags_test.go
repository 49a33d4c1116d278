package main

import (
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"
)

func TestFlagsOverrideTheEnvironmentAndEndpointsOverrideHostAndPort(t *testing.T) {
	for _, test := range []struct {
		name  string
		env   map[string]string
		flags commonFlags
		want  string
	}{
		{"defaults", nil, commonFlags{}, "tcp://127.0.0.1:5555"},
		{"host", nil, commonFlags{Host: "build"}, "tcp://build:5555"},
		{"port", nil, commonFlags{Port: "6000"}, "tcp://127.0.0.1:6000"},
		{"IPv6", nil, commonFlags{Host: "::1"}, "tcp://[::1]:5555"},
		{"IPv6 in brackets", nil, commonFlags{Host: "[::1]"}, "tcp://[::1]:5555"},
		{"endpoint", nil, commonFlags{Broker: []string{"ipc:///b"}, Host: "h", Port: "1"}, "ipc:///b"},
		{"environment", map[string]string{"HOST": "h", "PORT": "1"}, commonFlags{}, "tcp://h:1"},
		{"port over the environment", map[string]string{"HOST": "h", "PORT": "1"}, commonFlags{Port: "2"}, "tcp://h:2"},
		{"endpoint of the environment", map[string]string{"BROKER": "ipc:///b", "HOST": "h"}, commonFlags{}, "ipc:///b"},
		{"port over the endpoint of the environment", map[string]string{"BROKER": "ipc:///b", "HOST": "h"}, commonFlags{Port: "2"}, "tcp://h:2"},
		{"several endpoints", nil, commonFlags{Broker: []string{"ipc:///b", "tcp://a:1", "ipc:///b"}}, "ipc:///b tcp://a:1"},
		{"several endpoints of the environment", map[string]string{"BROKER": " ipc:///b  tcp://a:1\ttcp://a:1 "}, commonFlags{}, "ipc:///b tcp://a:1"},
		{"blanks in the environment", map[string]string{"BROKER": " "}, commonFlags{}, "tcp://127.0.0.1:5555"},
		{"the same with and without a key", nil, commonFlags{Broker: []string{"tcp://a:1#" + keyOf("a").String(), "tcp://a:1"}}, "tcp://a:1"},
		{"empty environment", map[string]string{"BROKER": "", "HOST": "", "PORT": ""}, commonFlags{}, "tcp://127.0.0.1:5555"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, name := range []string{"BROKER", "HOST", "PORT"} {
				t.Setenv("BACKBONE_"+name, test.env[name])
			}
			flags := clientFlags{commonFlags: test.flags}
			if got, err := flags.addresses(); err != nil || endpointsOf(got) != test.want {
				t.Errorf("got %q, %v, want %q", endpointsOf(got), err, test.want)
			}
		})
	}
}

func TestEndpointsOfZeroMQAreTaken(t *testing.T) {
	for _, endpoint := range []string{
		"tcp://*:5555", "tcp://eth0:5555", "tcp://[::1]:5555", "tcp://127.0.0.1:*", "tcp://h:0",
		"tcp://127.0.0.1:0;127.0.0.1:5555", "ipc:///run/b", "ipc://@abstract",
	} {
		if !isEndpoint(endpoint) {
			t.Errorf("%s is refused", endpoint)
		}
	}
}

func TestWrongEndpointsAreWrongUsage(t *testing.T) {
	for _, flags := range []commonFlags{
		{Port: "http"}, {Port: "65536"}, {Port: "-1"},
		{Broker: []string{"localhost:5555"}}, {Broker: []string{"inproc://x"}},
		{Broker: []string{"ipc:///a", "b"}}, {Broker: []string{"tcp://a:1", "tcp://b:1#"}},
	} {
		var f *failure
		if got, err := (&clientFlags{commonFlags: flags}).addresses(); !errors.As(err, &f) || f.status != exitUsage || f.hint == "" {
			t.Errorf("%+v: got %q, %v, want wrong usage with a hint", flags, endpointsOf(got), err)
		}
	}
}

func TestDurationsHaveUnitsOrAreSeconds(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"5": 5 * time.Second, "0": 0, "0.5": 500 * time.Millisecond, "1.5s": 1500 * time.Millisecond,
		"500ms": 500 * time.Millisecond, "2m": 2 * time.Minute, "1h30m": 90 * time.Minute,
	} {
		if got, err := parseTimeout(t, text); err != nil || got != want {
			t.Errorf("%s is %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "5x", "-1", "-1s", "nan", "inf", "1e300", "1e3"} {
		if got, err := parseTimeout(t, text); err == nil {
			t.Errorf("%q is %v, want an error", text, got)
		}
	}
}

func TestSizesAreBytesOrHaveUnits(t *testing.T) {
	parse := func(text string) (size, error) {
		var tool brokerTool
		_, err := newParser(&tool).Parse([]string{"--max-message=" + text})
		return tool.MaxMessage, err
	}
	for text, want := range map[string]size{"1": 1, "1000": 1000, "64K": 65536, "256M": 256 << 20, "2G": 2 << 30} {
		if got, err := parse(text); err != nil || got != want {
			t.Errorf("%s is %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0", "-1", "K", "1k", "1KB", "1.5G", "x", "9999999999999G", "1K2"} {
		if got, err := parse(text); err == nil {
			t.Errorf("%q is %d, want an error", text, got)
		}
	}
}

func parseTimeout(t *testing.T, text string) (time.Duration, error) {
	t.Helper()
	var tool requestTool
	_, err := newParser(&tool).Parse([]string{"--timeout=" + text, "name"})
	return tool.timeout(), err
}

func TestRequestsOfABatchHaveNoTimeoutUnlessItIsGiven(t *testing.T) {
	for _, test := range []struct {
		args []string
		want time.Duration
	}{
		{[]string{"svc"}, 30 * time.Second},
		{[]string{"--each", "svc"}, 0},
		{[]string{"--each", "-t", "3", "svc"}, 3 * time.Second},
	} {
		var tool requestTool
		if _, err := newParser(&tool).Parse(test.args); err != nil || tool.timeout() != test.want {
			t.Errorf("%q: %v, %v, want %v", test.args, tool.timeout(), err, test.want)
		}
	}
}

func TestFlagsEndAtTheFirstArgument(t *testing.T) {
	for _, test := range []struct {
		args []string
		name string
		rest operands
	}{
		{[]string{"svc"}, "svc", nil},
		{[]string{"-n", "svc", "-q", "a", "-x"}, "svc", operands{"a", "-x"}},
		{[]string{"svc", "--", "-l"}, "svc", operands{"-l"}},
		{[]string{"svc", "--"}, "svc", operands{}},
		{[]string{"svc", "--", "--", "-l"}, "svc", operands{"--", "-l"}},
		{[]string{"svc", "a", "--", "b"}, "svc", operands{"a", "--", "b"}},
		{[]string{"--", "svc", "-l"}, "svc", operands{"-l"}},
		{[]string{"--", "svc", "--", "-l"}, "svc", operands{"--", "-l"}},
		{[]string{"svc", "-", "-n"}, "svc", operands{"-", "-n"}},
		{[]string{"svc", "", "x"}, "svc", operands{"", "x"}},
		{[]string{"s\xff", "\xfe"}, "s\xff", operands{"\xfe"}},
	} {
		var tool requestTool
		if err := parse(&tool, test.args); err != nil || tool.Name != test.name || !slices.Equal(tool.Args, test.rest) {
			t.Errorf("%q: got name %q, arguments %q, %v", test.args, tool.Name, tool.Args, err)
		}
	}
}

func TestRequestWithoutFlagsIsWhatKongMakesOfIt(t *testing.T) {
	for _, args := range [][]string{
		{"svc"}, {""}, {"svc", "a"}, {"svc", ""}, {"svc", "a", "-x", "--", "--each"}, {"s\xff", "a b", "\xfe", "-"},
	} {
		var plain, parsed requestTool
		_, err := newParser(&parsed).Parse(args)
		if !plain.parsePlain(args) || err != nil || plain.Name != parsed.Name || !slices.Equal(plain.Args, parsed.Args) {
			t.Errorf("%q: got %+v, want %+v, %v", args, plain, parsed, err)
		}
		plain.Args, parsed.Args = nil, nil
		if !reflect.DeepEqual(plain, parsed) {
			t.Errorf("%q: got flags %+v, want %+v", args, plain, parsed)
		}
	}
	for _, args := range [][]string{{}, {"-n", "svc"}, {"svc", "-n"}, {"svc", "--", "-l"}, {"svc", "-"}, {"--help"}} {
		if tool := new(requestTool); tool.parsePlain(args) {
			t.Errorf("%q was taken for a request without flags: %+v", args, tool)
		}
	}
}
