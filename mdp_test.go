package main

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// wellFormed lists the messages of RFC 7 and of RFC 18, some with an address stack. Parse must accept the frames,
// and Frames must return them.
var wellFormed = []struct {
	name    string
	frames  [][]byte
	message Message
}{
	{"request", frames("", "MDPC01", "echo", "hello"),
		Message{Dialect: client01, Kind: KindRequest, Service: []byte("echo"), Body: frames("hello")}},
	{"request without body", frames("", "MDPC01", "ls"),
		Message{Dialect: client01, Kind: KindRequest, Service: []byte("ls")}},
	{"request with empty frames", frames("", "MDPC01", "echo", "", ""),
		Message{Dialect: client01, Kind: KindRequest, Service: []byte("echo"), Body: frames("", "")}},
	{"request of any bytes", frames("", "MDPC01", "\x00\xff", "\x00\n\xfe", "MDPW01"),
		Message{Dialect: client01, Kind: KindRequest, Service: []byte("\x00\xff"), Body: frames("\x00\n\xfe", "MDPW01")}},
	{"request with an address stack", frames("\x00abcd", "7", "", "MDPC01", "echo", "hello"),
		Message{Address: frames("\x00abcd", "7"), Dialect: client01, Kind: KindRequest, Service: []byte("echo"), Body: frames("hello")}},
	{"address like a protocol", frames("MDPW01", "", "MDPC01", "echo"),
		Message{Address: frames("MDPW01"), Dialect: client01, Kind: KindRequest, Service: []byte("echo")}},
	{"ready", frames("", "MDPW01", "\x01", "echo"),
		Message{Kind: KindReady, Service: []byte("echo")}},
	{"request to a worker", frames("", "MDPW01", "\x02", "A", "", "hello"),
		Message{Kind: KindRequest, Client: frames("A"), Body: frames("hello")}},
	{"request to a worker without body", frames("", "MDPW01", "\x02", "A", ""),
		Message{Kind: KindRequest, Client: frames("A")}},
	{"request to a worker with an address stack", frames("", "MDPW01", "\x02", "A", "7", "", "", "x"),
		Message{Kind: KindRequest, Client: frames("A", "7"), Body: frames("", "x")}},
	{"reply", frames("", "MDPW01", "\x03", "A", "", "one", "two"),
		Message{Kind: KindReply, Client: frames("A"), Body: frames("one", "two")}},
	{"heartbeat", frames("", "MDPW01", "\x04"), Message{Kind: KindHeartbeat}},
	{"disconnect", frames("", "MDPW01", "\x05"), Message{Kind: KindDisconnect}},
	{"ready of a worker that can be cancelled", frames("", "MDPW01", "\x01", "echo", "cancel"),
		Message{Kind: KindReady, Service: []byte("echo"), Body: frames("cancel")}},

	{"0.2 request", frames("MDPC02", "\x01", "echo", "hello"),
		Message{Dialect: client02, Kind: KindRequest, Service: []byte("echo"), Body: frames("hello")}},
	{"0.2 request of a REQ socket", frames("", "MDPC02", "\x01", "echo"),
		Message{Dialect: client02Delimited, Kind: KindRequest, Service: []byte("echo")}},
	{"0.2 request with an address stack", frames("\x00abcd", "7", "MDPC02", "\x01", "echo", "", "MDPC01", "x"),
		Message{Dialect: client02, Address: frames("\x00abcd", "7"), Kind: KindRequest, Service: []byte("echo"), Body: frames("", "MDPC01", "x")}},
	{"0.2 partial", frames("MDPC02", "\x02", "echo", "one"),
		Message{Dialect: client02, Kind: KindPartial, Service: []byte("echo"), Body: frames("one")}},
	{"0.2 final", frames("MDPC02", "\x03", "echo"),
		Message{Dialect: client02, Kind: KindReply, Service: []byte("echo")}},
	{"0.2 ready", frames("MDPW02", "\x01", "echo"),
		Message{Dialect: worker02, Kind: KindReady, Service: []byte("echo")}},
	{"0.2 ready behind an empty frame", frames("", "MDPW02", "\x01", "echo"),
		Message{Dialect: worker02Delimited, Kind: KindReady, Service: []byte("echo")}},
	{"0.2 request to a worker", frames("MDPW02", "\x02", "A", "", "hello"),
		Message{Dialect: worker02, Kind: KindRequest, Client: frames("A"), Body: frames("hello")}},
	{"0.2 partial of a worker", frames("MDPW02", "\x03", "A", "", "one"),
		Message{Dialect: worker02, Kind: KindPartial, Client: frames("A"), Body: frames("one")}},
	{"0.2 final of a worker", frames("MDPW02", "\x04", "A", ""),
		Message{Dialect: worker02, Kind: KindReply, Client: frames("A")}},
	{"0.2 heartbeat", frames("MDPW02", "\x05"), Message{Dialect: worker02, Kind: KindHeartbeat}},
	{"0.2 disconnect", frames("MDPW02", "\x06"), Message{Dialect: worker02, Kind: KindDisconnect}},
	{"credit", frames("", "MDPW02", "\x07", "A", "", "8"),
		Message{Dialect: worker02Delimited, Kind: KindCredit, Client: frames("A"), Body: frames("8")}},
}

func TestEveryMessageOfTheProtocolIsParsedAndFormatted(t *testing.T) {
	for _, test := range wellFormed {
		t.Run(test.name, func(t *testing.T) {
			m, err := Parse(test.frames)
			if err != nil {
				t.Fatal(err)
			}
			if !sameMessage(m, test.message) {
				t.Errorf("Parse(%q) = %+v, want %+v", test.frames, m, test.message)
			}
			if got := m.Frames(); !reflect.DeepEqual(spell(got), spell(test.frames)) {
				t.Errorf("Frames() = %q, want %q", got, test.frames)
			}
		})
	}
}

func TestKnownMistakesOfRealPeersAreAccepted(t *testing.T) {
	for _, test := range []struct {
		name   string
		frames [][]byte
		want   Message
	}{
		{"DISCONNECT of Dispatchr Backbone's broker", frames("MDPW01", "\x05"), Message{Kind: KindDisconnect}},
		{"DISCONNECT of its Node.js service", frames("", "MDPW01", "\x05", "echo"), Message{Kind: KindDisconnect, Body: frames("echo")}},
		{"an extra frame after READY", frames("", "MDPW01", "\x01", "echo", "1.0"),
			Message{Kind: KindReady, Service: []byte("echo"), Body: frames("1.0")}},
		{"an extra frame after HEARTBEAT", frames("", "MDPW01", "\x04", ""), Message{Kind: KindHeartbeat}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, err := Parse(test.frames)
			if err != nil {
				t.Fatal(err)
			}
			if !sameMessage(m, test.want) {
				t.Errorf("Parse(%q) = %+v, want %+v", test.frames, m, test.want)
			}
		})
	}
}

func TestMalformedMessagesAreRefusedWithAReason(t *testing.T) {
	for _, test := range []struct {
		name   string
		frames [][]byte
		reason string
	}{
		{"no frames", nil, "no frame MDPC01"},
		{"an empty frame", frames(""), "no frame MDPC01"},
		{"one frame", frames("hello"), "no frame MDPC01"},
		{"wrong version", frames("", "MDPC03", "echo", "x"), "no frame MDPC01"},
		{"0.2 request without a command", frames("MDPC02", "echo", "x"), "no one-byte command after MDPC02"},
		{"0.2 request without service", frames("MDPC02", "\x01"), "no service name"},
		{"0.2 command 4 of a client", frames("MDPC02", "\x04", "echo"), "unknown command 0x04 of MDPC02"},
		{"0.2 command 8 of a worker", frames("MDPW02", "\x08"), "unknown command 0x08 of MDPW02"},
		{"PARTIAL without address", frames("MDPW02", "\x03"), "no empty frame"},
		{"protocol after two empty frames", frames("", "", "MDPC01", "echo"), "no frame MDPC01"},
		{"no service", frames("", "MDPC01"), "no service name"},
		{"empty service", frames("", "MDPC01", "", "x"), "no service name"},
		{"READY without service", frames("", "MDPW01", "\x01"), "no service name"},
		{"READY with an empty service", frames("", "MDPW01", "\x01", ""), "no service name"},
		{"no command", frames("", "MDPW01"), "no one-byte command"},
		{"empty command", frames("", "MDPW01", ""), "no one-byte command"},
		{"long command", frames("", "MDPW01", "\x01\x01", "echo"), "no one-byte command"},
		{"command 0", frames("", "MDPW01", "\x00", "echo"), "unknown command 0x00"},
		{"command 6", frames("", "MDPW01", "\x06"), "unknown command 0x06"},
		{"command 255", frames("", "MDPW01", "\xff"), "unknown command 0xff"},
		{"REPLY without address", frames("", "MDPW01", "\x03"), "no empty frame"},
		{"REPLY without delimiter", frames("", "MDPW01", "\x03", "A", "x"), "no empty frame"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, err := Parse(test.frames)
			if err == nil {
				t.Fatalf("Parse(%q) = %+v, want an error", test.frames, m)
			}
			if !strings.Contains(err.Error(), test.reason) {
				t.Errorf("Parse(%q): %v, want %q in it", test.frames, err, test.reason)
			}
		})
	}
}

func TestMissingServiceIsToldApartFromOtherErrors(t *testing.T) {
	if _, err := Parse(frames("", "MDPC01", "")); !errors.Is(err, errNoService) {
		t.Errorf("got %v, want errNoService", err)
	}
}

func TestStatusReplyIsRecognisedByItsThirdAndLastFrame(t *testing.T) {
	for _, test := range []struct {
		name   string
		body   [][]byte
		status int // -1 if the body is data
		stderr string
	}{
		{"failed command", frames("out", "err", "exit status 3"), 3, "err"},
		{"success with standard error", frames("out", "err", "exit status 0"), 0, "err"},
		{"killed command", frames("", "", "exit status 137"), 137, ""},
		{"failure of Dispatchr Backbone", frames("Error", "no such file"), 1, "no such file\n"},
		{"one frame", frames("exit status 1"), -1, ""},
		{"third of four", frames("a", "b", "exit status 1", "c"), -1, ""},
		{"no number", frames("a", "b", "exit status "), -1, ""},
		{"negative", frames("a", "b", "exit status -1"), -1, ""},
		{"more than a status can be", frames("a", "b", "exit status 256"), -1, ""},
		{"in a sentence", frames("a", "b", "exit status 1 or so"), -1, ""},
		{"three frames of data", frames("a", "b", "c"), -1, ""},
		{"two frames of data", frames("error", "x"), -1, ""},
		{"nothing", nil, -1, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			want := Reply{Output: test.body}
			if test.status >= 0 {
				want = Reply{Stderr: []byte(test.stderr), Status: test.status}
				if len(test.body) == 3 {
					want.Output = test.body[:1]
				}
			}
			if got := ParseReply(test.body); got.Status != want.Status || string(got.Stderr) != string(want.Stderr) ||
				!reflect.DeepEqual(spell(got.Output), spell(want.Output)) {
				t.Errorf("got %q, want %q", spell(got.Body()), spell(want.Body()))
			}
		})
	}
}

func TestRepliesAreSpelledAsOthersExpectThem(t *testing.T) {
	for _, test := range []struct {
		reply Reply
		want  []string
	}{
		{Reply{Output: frames("out"), Stderr: []byte("err"), Status: 69}, []string{"out", "err", "exit status 69"}},
		{Reply{Output: frames("out"), Stderr: []byte("err")}, []string{"out", "err", "exit status 0"}},
		{Reply{Stderr: []byte("err"), Status: 1}, []string{"", "err", "exit status 1"}},
		{Reply{Output: frames("a", "b"), Status: 1}, []string{"ab", "", "exit status 1"}},
		{Reply{Output: frames("out")}, []string{"out"}},
		{Reply{Output: frames("")}, []string{""}},
		{Reply{Output: frames("a", "", "b")}, []string{"a", "", "b"}},
		{Reply{}, []string{}},
	} {
		if got := spell(test.reply.Body()); !reflect.DeepEqual(got, test.want) {
			t.Errorf("the body of %q is %q, want %q", test.reply.Body(), got, test.want)
		}
	}
}

// FuzzParse checks that no input crashes Parse, and that a message it accepts is the same after it
// is formatted and parsed again. Newlines separate the frames of an input.
func FuzzParse(f *testing.F) {
	for _, test := range wellFormed {
		f.Add(bytes.Join(test.frames, []byte("\n")))
	}
	f.Add([]byte("MDPW01\n\x05"))
	f.Add([]byte("A\nMDPW02\n\x03\nB\n\nMDPC01\nx"))
	f.Add([]byte("A\nMDPW01\n\x03\nB\n\nMDPC01\nx"))
	f.Fuzz(func(t *testing.T, joined []byte) {
		message := bytes.Split(joined, []byte("\n"))
		m, err := Parse(message)
		if err != nil {
			return
		}
		again, err := Parse(m.Frames())
		if err != nil {
			t.Fatalf("%q is %+v, whose frames %q do not parse: %v", message, m, m.Frames(), err)
		}
		if !sameMessage(m, again) {
			t.Fatalf("%q is %+v, but its frames are %+v", message, m, again)
		}
	})
}

// sameMessage compares messages. A nil slice of frames equals an empty one.
func sameMessage(a, b Message) bool {
	same := func(a, b [][]byte) bool { return reflect.DeepEqual(spell(a), spell(b)) }
	return a.Dialect == b.Dialect && a.Kind == b.Kind && string(a.Service) == string(b.Service) &&
		same(a.Address, b.Address) && same(a.Client, b.Client) && same(a.Body, b.Body)
}
