package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"
)

// beginStream begins a call that takes partial replies. The outputs of those are appended to parts.
func (f *fakeConnection) beginStream(service string, timeout time.Duration, retries int) (c *call, parts *[]string) {
	parts = new([]string)
	c = &call{service: service, body: frames("body of " + service), timeout: timeout, retries: retries}
	c.stream = &callStream{take: func(part Reply) { *parts = append(*parts, string(bytes.Join(part.Output, []byte("|")))) }}
	f.begin(c, f.clock)
	f.settle()
	return c, parts
}

// streams begins such a call at a broker that has answered the question with 200.
func (f *fakeConnection) streams(service string, timeout time.Duration, retries int) (c *call, parts *[]string) {
	f.t.Helper()
	c, parts = f.beginStream(service, timeout, retries)
	f.up()
	f.expect(question01)
	f.from(answer01("200")...)
	f.expect(request02(service), credit02("0"))
	return c, parts
}

// write lets parts of a call be written.
func (f *fakeConnection) write(c *call, outputs ...string) {
	var parts []Reply
	for _, output := range outputs {
		parts = append(parts, Reply{Output: frames(output)})
	}
	f.written(c, parts, f.clock)
	f.settle()
}

// The spellings of RFC 18, as a DEALER sends and receives them, and the question.
var (
	question01 = []string{"", "MDPC01", "mmi.service", "mmi.credit"}
	question02 = []string{"MDPC02", "\x01", "mmi.service", "mmi.credit"}
	cancel02   = []string{"MDPC02", "\x01", "mmi.cancel", ""}
)

func answer01(body ...string) []string {
	return append([]string{"", "MDPC01", "mmi.service"}, body...)
}
func credit02(n string) []string    { return []string{"MDPC02", "\x01", "mmi.credit", n} }
func credited(code string) []string { return []string{"MDPC02", "\x03", "mmi.credit", code} }
func request02(service string) []string {
	return []string{"MDPC02", "\x01", service, "body of " + service}
}
func part02(service string, body ...string) []string {
	return append([]string{"MDPC02", "\x02", service}, body...)
}
func final02(service string, body ...string) []string {
	return append([]string{"MDPC02", "\x03", service}, body...)
}

// expectParts checks the parts of a call up to now.
func (f *fakeConnection) expectParts(parts *[]string, want ...string) {
	f.t.Helper()
	if !slices.Equal(*parts, want) {
		f.t.Fatalf("the parts are %q, want %q", *parts, want)
	}
}

func TestPartsReachTheirCallInOrderBeforeItsEnd(t *testing.T) {
	f := newFakeConnection(t, false)
	_, parts := f.streams("dump", 0, 0)
	f.from(part02("dump", "a")...)
	f.from(part02("dump")...)
	f.from(part02("dump", "b", "c")...)
	f.from(part02("dump", "d", "text", "exit status 0")...)
	f.expectEnded()
	f.from(final02("dump", "rest", "sorry", "exit status 3")...)
	f.from(part02("dump", "after the end")...)
	f.expectParts(parts, "a", "", "b|c", "d")
	f.expectEnded(`dump: ["rest"] 3`)
}

func TestEachOfManyStreamsGetsItsOwnParts(t *testing.T) {
	f := newFakeConnection(t, true)
	_, first := f.beginStream("a", 0, 0)
	f.call("plain", 0, 0)
	_, second := f.beginStream("b", 0, 0)
	f.up()
	f.from(answer01("200")...)
	for _, message := range [][]string{part02("b", "x"), part02("a", "y"), part02("b", "z"), final02("b", "end"), part02("b", "late")} {
		f.from(append([]string{map[string]string{"a": "1.1", "b": "3.1"}[message[2]]}, message...)...)
	}
	f.from(append([]string{"9.1"}, part02("a", "whose?")...)...)
	f.expectParts(first, "y")
	f.expectParts(second, "x", "z")
	f.expectEnded(`b: ["end"] 0`)
}

func TestBrokerIsAskedOnceWhetherItSendsPartialReplies(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("plain", 0, 0)
	f.up()
	f.expect(plain("plain"))
	f.from("", "MDPC01", "plain", "done")
	f.streams("dump", 0, 0)
	f.from(credited("200")...)
	f.from(final02("dump", "done")...)
	f.beginStream("dump", 0, 0)
	f.expect(request02("dump"), credit02("0"))
	f.from(credited("200")...)
	f.from(final02("dump", "done")...)
	f.call("plain", 0, 0)
	f.expect(plain("plain"))
}

func TestRequestGoesOutInTheVersionThatTheBrokerKnows(t *testing.T) {
	never := []string(nil)
	for name, test := range map[string]struct {
		first, second []string // answers
		want          [][]string
	}{
		"0.1, not found":                    {answer01("404"), nil, [][]string{plain("dump")}},
		"0.1, not implemented":              {answer01("501"), nil, [][]string{plain("dump")}},
		"0.1, nothing":                      {answer01(), nil, [][]string{plain("dump")}},
		"0.1, not allowed":                  {answer01("", "no", "exit status 077"), nil, [][]string{plain("dump")}},
		"neither":                           {never, never, [][]string{plain("dump")}},
		"0.1, late":                         {never, answer01("404"), [][]string{plain("dump")}},
		"with credit, late":                 {never, answer01("200"), [][]string{request02("dump"), credit02("0")}},
		"0.2":                               {never, final02("mmi.service", "404"), [][]string{request02("dump")}},
		"0.2 with credit":                   {never, final02("mmi.service", "200"), [][]string{request02("dump"), credit02("0")}},
		"0.2 behind an empty frame":         {never, append([]string{""}, final02("mmi.service", "501")...), [][]string{request02("dump")}},
		"0.2 without the name of a service": {never, final02("404"), [][]string{request02("dump")}},
		"0.2 without anything":              {never, []string{"MDPC02", "\x03"}, [][]string{request02("dump")}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeConnection(t, false)
			f.beginStream("dump", time.Minute, 0)
			f.pass(time.Second) // without a broker
			f.up()
			f.expect(question01)
			answer := func(message []string) {
				f.pass(supportPatience - 1)
				f.expect()
				if message != nil {
					f.from(message...)
				} else {
					f.pass(1)
				}
			}
			answer(test.first)
			if test.first == nil {
				f.expect(question02)
				answer(test.second)
			}
			f.expect(test.want...)
			f.from(answer01("200")...) // too late
			f.expectEnded()
		})
	}
}

func TestQuestionLeavesHalfOfAShortTimeoutForTheReply(t *testing.T) {
	f := newFakeConnection(t, false)
	f.beginStream("dump", 400*time.Millisecond, 0)
	f.up()
	for range 2 {
		f.clock = f.deadline()
		f.settle()
	}
	f.expect(question01, question02, plain("dump"))
	if took := f.clock.Sub(time.Unix(0, 0)); took > 200*time.Millisecond {
		t.Errorf("the questions took %v", took)
	}
	f.pass(400*time.Millisecond - f.clock.Sub(time.Unix(0, 0)))
	f.from("", "MDPC01", "mmi.cancel", "404")
	f.expectEnded("dump: no reply from tcp://broker within 400ms")
}

func TestBrokerThatComesInThePlaceOfAnotherIsAskedAgain(t *testing.T) {
	f := newFakeConnection(t, false)
	f.beginStream("dump", time.Minute, 0)
	f.up()
	f.expect(question01)
	f.breaks()
	f.pass(time.Second)
	f.expect(question01)
	f.up()
	f.from(answer01("404")...)
	f.from(answer01("200")...) // the first question reached it, too
	f.expect(plain("dump"))
	f.from("", "MDPC01", "dump", "done")
	f.expectEnded(`dump: ["done"] 0`)
}

func TestOneGrantIsUnansweredAtMost(t *testing.T) {
	f := newFakeConnection(t, false)
	c, _ := f.streams("dump", 0, 0)
	for _, output := range []string{"a", "b", "c"} {
		f.from(part02("dump", output)...)
	}
	f.write(c, "a", "b")
	f.expect()
	f.from(credited("200")...)
	f.expect(credit02("2"))
	f.write(c, "c")
	f.expect()
	f.from(credited("200")...)
	f.expect(credit02("1"))
	f.from(credited("200")...)
	f.expect()
	f.from(part02("dump", "d")...)
	f.expect()
	f.write(c, "d")
	f.expect(credit02("1"))
}

func TestBrokerThatRefusesAGrantGetsNoOther(t *testing.T) {
	for _, code := range []string{"400", "404", "501"} {
		f := newFakeConnection(t, false)
		c, parts := f.streams("dump", 0, 0)
		f.from(part02("dump", "a")...)
		f.from(credited(code)...)
		f.write(c, "a")
		f.from(credited("200")...)
		f.expect()
		f.from(final02("dump", "b")...)
		f.expectParts(parts, "a")
		f.expectEnded(`dump: ["b"] 0`)
	}
}

func TestAnswerToTheGrantOfAnEarlierCallIsNotThatOfTheNext(t *testing.T) {
	f := newFakeConnection(t, false)
	f.streams("dump", 0, 0)
	f.from(final02("dump", "done")...)
	c, _ := f.beginStream("dump", 0, 0)
	f.expect(request02("dump"), credit02("0"))
	f.from(credited("404")...) // for the first one
	f.from(part02("dump", "a")...)
	f.write(c, "a")
	f.expect()
	f.from(credited("200")...)
	f.expect(credit02("1"))
}

func TestGrantWaitsForAConnectionThatTakesIt(t *testing.T) {
	f := newFakeConnection(t, false)
	c, _ := f.streams("dump", 0, 0)
	f.from(credited("200")...)
	f.from(part02("dump", "a")...)
	f.err = errWouldBlock
	f.write(c, "a")
	f.err = nil
	f.settle()
	f.expect(credit02("1"))
}

func TestTimeoutOfAStreamIsTheLongestSilence(t *testing.T) {
	f := newFakeConnection(t, false)
	c, _ := f.streams("dump", time.Minute, 0)
	f.from(credited("200")...)
	for range 3 {
		f.pass(time.Minute - 1)
		f.from(part02("dump", "a")...)
		f.write(c, "a")
		f.expect(credit02("1"))
		f.from(credited("200")...)
	}
	f.pass(time.Minute - 1)
	f.expect()
	f.pass(1)
	f.expect(cancel02)
	f.expectEnded()
	f.from(part02("dump", "late")...)
	f.from(final02("mmi.cancel", "200")...)
	f.expectEnded("dump: no reply from tcp://broker within 1m0s of its last output")
}

func TestSilenceWhileTheReaderIsSlowDoesNotCount(t *testing.T) {
	f := newFakeConnection(t, false)
	c, _ := f.streams("dump", time.Minute, 0)
	f.from(part02("dump", "a")...)
	f.from(part02("dump", "b")...)
	f.write(c, "a")
	f.pass(time.Hour)
	f.write(c, "b")
	f.pass(time.Minute - 1)
	f.expectEnded()
	f.expect()
	if deadline := f.deadline(); !deadline.Equal(f.clock.Add(1)) {
		t.Errorf("the deadline is %v, want one at %v", deadline, f.clock.Add(1))
	}
	f.pass(1)
	f.expect(cancel02)
}

func TestStreamIsTriedAgainOnlyBeforeItsFirstPart(t *testing.T) {
	f := newFakeConnection(t, false)
	f.streams("dump", 0, 5)
	f.from(final02("dump", "", "", "exit status 75")...)
	f.pass(time.Second)
	f.expect(request02("dump"), credit02("0"))
	f.breaks()
	f.pass(time.Second)
	f.up()
	f.expect(question01)
	f.from(answer01("200")...)
	f.expect(request02("dump"), credit02("0"))
	f.from(part02("dump", "a")...)
	f.breaks()
	f.pass(time.Minute)
	f.expectEnded("dump: lost the broker at tcp://broker before its reply")

	f = newFakeConnection(t, false)
	f.streams("dump", 0, 5)
	f.from(part02("dump", "a")...)
	f.from(final02("dump", "", "", "exit status 75")...)
	f.expectEnded(`dump: [""] 75`)
}

func TestAbandonedStreamIsTakenBackAndItsPartsAreForNobody(t *testing.T) {
	f := newFakeConnection(t, false)
	_, parts := f.streams("dump", 0, 3)
	f.from(part02("dump", "a")...)
	f.abandon(f.clock)
	f.settle()
	f.expect(cancel02)
	f.from(part02("dump", "b")...)
	f.from(credited("200")...)
	f.from(final02("dump", "c")...)
	f.expect()
	if f.conn == nil {
		t.Error("the connection was dropped before the broker confirmed")
	}
	f.from(final02("mmi.cancel", "200")...)
	f.expectParts(parts, "a")
	f.expectEnded()
	if f.conn != nil {
		t.Error("the connection is kept")
	}
}

func TestPartsThatNobodyAskedForAreABadReply(t *testing.T) {
	f := newFakeConnection(t, false)
	f.call("plain", 0, 0)
	f.up()
	f.from(part02("plain", "a")...)
	f.expectEnded("plain: bad reply from tcp://broker: an unexpected PARTIAL")

	f = newFakeConnection(t, false)
	f.beginStream("dump", 0, 0)
	f.up()
	f.from(answer01("404")...)
	f.from(part02("dump", "a")...)
	f.expectEnded("dump: bad reply from tcp://broker: an unexpected PARTIAL")

	f = newFakeConnection(t, false)
	_, parts := f.streams("dump", 0, 0)
	f.from(part02("other", "a")...)
	f.expectParts(parts)
	f.pass(cancelPatience)
	f.expectEnded(`dump: bad reply from tcp://broker: it is from service "other"`)
}

func TestBrokerOfMDP02MayLeaveOutTheNameOfTheService(t *testing.T) {
	long := strings.Repeat("x", maxName+1)
	f := newFakeConnection(t, false)
	_, parts := f.beginStream("dump", time.Minute, 0)
	f.up()
	f.pass(supportPatience)
	f.from(final02("404")...)
	f.sent = nil
	for _, body := range [][]string{{"a"}, {""}, {}, {long}, {"b", "c"}, {"dump"}, {"mmi.cancel"}} {
		f.from(append([]string{"MDPC02", "\x02"}, body...)...)
		f.from(append([]string{"", "MDPC02", "\x02"}, body...)...)
	}
	f.from("MDPC02", "\x03", "", "sorry", "exit status 3")
	f.expectParts(parts, "a", "a", "", "", "", "", long, long, "b|c", "b|c", "dump", "dump", "mmi.cancel", "mmi.cancel")
	f.expectEnded(`dump: [""] 3`)
	f.expect()
}

func TestReaderThatIsSlowLeavesTheRestInTheConnection(t *testing.T) {
	f := newFakeConnection(t, false)
	c, parts := f.streams("dump", 0, 0)
	chunk := strings.Repeat("x", 64<<10)
	for i := 0; i < 1000 && !f.full(); i++ {
		f.from(part02("dump", chunk)...)
	}
	if n := len(*parts); n < 64 || n > maxUnwritten/len(chunk) {
		t.Errorf("%d parts are received, and not written", n)
	}
	f.write(c, chunk)
	if f.full() {
		t.Error("nothing more is received though there is room")
	}
	f.from(part02("dump", chunk)...)
	f.abandon(f.clock)
	if f.full() {
		t.Error("the confirmation is not received")
	}
}
