package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The spellings of RFC 18, as a ROUTER sends and receives them.
func part(client, service string, body ...string) []string {
	return append([]string{client, "MDPC02", "\x02", service}, body...)
}

func final(client, service string, body ...string) []string {
	return append([]string{client, "MDPC02", "\x03", service}, body...)
}

// streamWorker is a worker of ours, which registers as one of MDP/0.1.
const streamWorker = workerPrefix + "W"

func credit(token, parts string) []string {
	return []string{streamWorker, "", "MDPW02", "\x07", token, "", parts}
}

// beginStream registers a worker of ours and gives it a request of a client of MDP/0.2.
func (r *fakeRouter) beginStream() (token string) {
	r.t.Helper()
	r.from(streamWorker, "", "MDPW01", "\x01", "dump")
	r.Receive(frames("C", "MDPC02", "\x01", "dump", "x"), sender{source: 7}, r.clock)
	return r.expect(toWorker(streamWorker, "*", "x"))[0]
}

// sendParts lets the worker of a stream send parts, and discards what becomes of them.
func (r *fakeRouter) sendParts(token string, n int) {
	for range n {
		r.from(streamWorker, "MDPW02", "\x03", token, "", "part")
	}
	r.sent = nil
}

// spendCredit lets the worker of a stream send n parts. The client gives no credit, so the broker gives as much
// after the last one.
func (r *fakeRouter) spendCredit(token string, n int) {
	r.t.Helper()
	r.sendParts(token, n-1)
	r.from(streamWorker, "MDPW02", "\x03", token, "", "x")
	r.expect(part("C", "dump", "x"), credit(token, fmt.Sprint(n)))
}

func TestClientsAndWorkersOfBothVersionsMeet(t *testing.T) {
	requests := map[string][]string{
		"0.1":                       {"C", "", "MDPC01", "echo", "hello"},
		"0.2":                       {"C", "MDPC02", "\x01", "echo", "hello"},
		"0.2 behind an empty frame": {"C", "", "MDPC02", "\x01", "echo", "hello"},
		"0.2 with an address":       {"C", "1", "2", "MDPC02", "\x01", "echo", "hello"},
	}
	replies := map[string][]string{
		"0.1":                       {"C", "", "MDPC01", "echo", "bye"},
		"0.2":                       {"C", "MDPC02", "\x03", "echo", "bye"},
		"0.2 behind an empty frame": {"C", "", "MDPC02", "\x03", "echo", "bye"},
		"0.2 with an address":       {"C", "1", "2", "MDPC02", "\x03", "echo", "bye"},
	}
	for name, worker := range map[string]struct{ protocol, final []string }{
		"0.1":                       {[]string{"", "MDPW01"}, []string{"\x03"}},
		"0.2":                       {[]string{"MDPW02"}, []string{"\x04"}},
		"0.2 behind an empty frame": {[]string{"", "MDPW02"}, []string{"\x04"}},
	} {
		for client, request := range requests {
			t.Run("client "+client+", worker "+name, func(t *testing.T) {
				r := newFakeRouter(t)
				spelled := func(more ...string) []string { return append(append([]string{"W"}, worker.protocol...), more...) }
				r.from(spelled("\x01", "echo")...)
				r.from(request...)
				token := r.expect(spelled("\x02", "*", "", "hello"))[0]
				r.from(spelled(append(worker.final, token, "", "bye")...)...)
				r.expect(replies[client])
				r.pass(1)
				heartbeat := map[bool]string{true: "\x04", false: "\x05"}[name == "0.1"]
				r.expect(spelled(heartbeat))
				r.from(spelled("\x01", "echo")...)
				disconnect := map[bool]string{true: "\x05", false: "\x06"}[name == "0.1"]
				r.expect(spelled(disconnect))
			})
		}
	}
}

func TestPartsArePassedOnInOrderAndTheWorkerIsBusyUntilTheEnd(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "MDPW02", "\x01", "dump")
	r.from("C", "MDPC02", "\x01", "dump")
	r.from("D", "MDPC02", "\x01", "dump")
	token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
	r.from("W", "MDPW02", "\x03", token, "", "one")
	r.from("W", "MDPW02", "\x03", token, "", "two", "frames")
	r.from("W", "MDPW02", "\x03", token, "")
	r.expect(part("C", "dump", "one"), part("C", "dump", "two", "frames"), part("C", "dump"))
	r.from("W", "MDPW02", "\x04", token, "", "three")
	r.expect(final("C", "dump", "three"), []string{"W", "MDPW02", "\x02", "*", ""})
}

func TestTokenTellsThatTheClientTakesParts(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	if !regexp.MustCompile(`^[0-9a-f]{8}\.1~64$`).MatchString(token) {
		t.Errorf("the token is %q", token)
	}
	if token := string(r.nextToken(maxWindow, "ann")); !strings.HasSuffix(token, "~64@ann") {
		t.Errorf("the token is %q", token)
	}
}

func TestPartsOutOfTurnAreProtocolBreaches(t *testing.T) {
	for name, breach := range map[string]func(r *fakeRouter, token string) (from string){
		"an idle worker": func(r *fakeRouter, token string) string {
			r.from("idle", "MDPW02", "\x03", token, "", "x")
			return "idle"
		},
		"a busy worker with the request of another": func(r *fakeRouter, token string) string {
			r.from("D", "MDPC02", "\x01", "dump")
			r.sent = nil
			r.from("idle", "MDPW02", "\x03", token, "", "x")
			return "idle"
		},
		"without a token": func(r *fakeRouter, token string) string {
			r.from("idle", "MDPW02", "\x03", "", "x")
			return "idle"
		},
		"after the end": func(r *fakeRouter, token string) string {
			r.from("W", "MDPW02", "\x04", token, "", "end")
			r.expect(final("C", "dump", "end"))
			r.from("W", "MDPW02", "\x03", token, "", "x")
			return "W"
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			r.from("W", "MDPW02", "\x01", "dump")
			r.from("idle", "MDPW02", "\x01", "dump")
			r.from("C", "MDPC02", "\x01", "dump")
			token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
			from := breach(r, token)
			if want := []string{from, "MDPW02", "\x06"}; fmt.Sprint(r.sent[0]) != fmt.Sprint(want) {
				t.Errorf("the broker sent %q first, want %q", r.sent, want)
			}
			if r.workers[from] != nil {
				t.Errorf("worker %s is still registered", from)
			}
			for _, sent := range r.sent {
				if sent[0] == "C" {
					t.Errorf("the client was sent %q", sent)
				}
			}
		})
	}
}

func TestPartsForAClientThatTakesNoneAreGathered(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "MDPW02", "\x01", "dump")
	r.from("C", "", "MDPC01", "dump")
	token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
	if strings.Contains(token, "~") {
		t.Errorf("the token is %q", token)
	}
	r.from("W", "MDPW02", "\x03", token, "", "one", "two")
	r.from("W", "MDPW02", "\x03", token, "", "three")
	r.expect()
	r.from("W", "MDPW02", "\x04", token, "", "four")
	r.expect([]string{"C", "", "MDPC01", "dump", "one", "two", "three", "four"})
}

func TestGatheredPartsCannotFillTheBroker(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "MDPW02", "\x01", "dump")
	r.from("C", "", "MDPC01", "dump")
	token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
	for range 100_000 {
		r.from("W", "MDPW02", "\x03", token, "", "part of a reply")
		if r.held > r.MaxMemory {
			t.Fatalf("the broker holds %d bytes", r.held)
		}
	}
	r.expect([]string{"C", "", "MDPC01", "dump", "",
		"bbroker: dump: the parts of the reply take more than the share of the client in --max-memory\n", "exit status 069"})
	if r.held != 0 || r.unfinished != 0 {
		t.Errorf("the broker holds %d bytes of %d requests", r.held, r.unfinished)
	}
	r.from("C", "", "MDPC01", "dump", "next")
	r.expect() // until the worker has ended the first
	r.from("W", "MDPW02", "\x04", token, "", "end")
	r.expect([]string{"W", "MDPW02", "\x02", "*", "", "next"})
}

func TestCreditOfTheClientGoesToTheWorker(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	for _, step := range []struct {
		parts int // that are sent before
		grant []string
		want  string
	}{
		{0, []string{"0"}, "200"}, // The client will give credit.
		{0, []string{"1"}, "400"},
		{3, []string{"2"}, "200"},
		{0, []string{"2"}, "400"},
		{0, []string{"1"}, "200"},
		{0, nil, "400"},
		{0, []string{"1", "1"}, "400"},
		{0, []string{"-1"}, "400"},
		{0, []string{"99999999999999999999"}, "400"},
		{0, []string{"one"}, "400"},
	} {
		r.sendParts(token, step.parts)
		r.from(append([]string{"C", "MDPC02", "\x01", "mmi.credit"}, step.grant...)...)
		answer := final("C", "mmi.credit", step.want)
		if step.want == "200" && step.grant[0] != "0" {
			r.expect(credit(token, step.grant[0]), answer)
		} else {
			r.expect(answer)
		}
	}
	r.from("D", "MDPC02", "\x01", "mmi.credit", "1")
	r.expect(final("D", "mmi.credit", "404"))
	r.from("C", "other", "MDPC02", "\x01", "mmi.credit", "1")
	r.expect([]string{"C", "other", "MDPC02", "\x03", "mmi.credit", "404"})
}

func TestCreditIsForTheRequestWithItsAddress(t *testing.T) {
	r := newFakeRouter(t)
	tokens := map[string]string{}
	for _, number := range []string{"1", "2"} {
		worker := workerPrefix + number
		r.from(worker, "", "MDPW01", "\x01", "dump")
		r.from("C", number, "MDPC02", "\x01", "dump")
		tokens[number] = r.expect(toWorker(worker, "*"))[0]
		r.from(worker, "MDPW02", "\x03", tokens[number], "", "x")
		r.expect([]string{"C", number, "MDPC02", "\x02", "dump", "x"})
	}
	r.from("C", "2", "MDPC02", "\x01", "mmi.credit", "1")
	r.expect([]string{workerPrefix + "2", "", "MDPW02", "\x07", tokens["2"], "", "1"}, []string{"C", "2", "MDPC02", "\x03", "mmi.credit", "200"})
}

func TestWorkerThatExceedsItsCreditIsDisconnected(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.from("C", "MDPC02", "\x01", "mmi.credit", "0")
	r.sendParts(token, maxWindow)
	r.from(streamWorker, "MDPW02", "\x03", token, "", "one too many")
	r.expect(disconnectTo(streamWorker), final("C", "dump", "",
		"bbroker: dump: the worker was lost while it had the request; the command may have run\n", "exit status 069"))
}

func TestBrokerGivesCreditForAClientThatGivesNoneAsItReads(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	const half = maxWindow / 2
	r.spendCredit(token, half)

	r.MaxMemory = 1 << 30
	queue := r.queues["C"]
	queue.bytes = maxAhead + 1
	r.sendParts(token, half-1)
	r.from(streamWorker, "MDPW02", "\x03", token, "", "x")
	r.expect(part("C", "dump", "x"))
	if queue.low != maxAhead {
		t.Errorf("the queue tells when %d bytes are left", queue.low)
	}
	r.ClientsHaveRead() // It was another one.
	r.expect()
	queue.bytes = maxAhead
	r.ClientsHaveRead()
	r.expect(credit(token, fmt.Sprint(half)))
	r.ClientsHaveRead()
	r.expect()
}

func TestClientThatGivesCreditGetsNoneFromTheBroker(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.from("C", "MDPC02", "\x01", "mmi.credit", "0")
	r.expect(final("C", "mmi.credit", "200"))
	for range maxWindow {
		r.from(streamWorker, "MDPW02", "\x03", token, "", "x")
		r.expect(part("C", "dump", "x"))
	}
}

// TestCreditOfTheBrokerIsNotGivenAgain has the first mmi.credit overtaken by parts, as it is when the worker is fast.
func TestCreditOfTheBrokerIsNotGivenAgain(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	const half = maxWindow / 2
	r.spendCredit(token, half)
	grant := func(parts int, answer string) {
		t.Helper()
		r.from("C", "MDPC02", "\x01", "mmi.credit", fmt.Sprint(parts))
		r.expect(final("C", "mmi.credit", answer))
	}
	grant(0, "200")
	r.sendParts(token, maxWindow)
	grant(half+maxWindow+1, "400")
	grant(half-1, "200")
	r.from("C", "MDPC02", "\x01", "mmi.credit", "3")
	r.expect(credit(token, "2"), final("C", "mmi.credit", "200"))
}

func TestStreamThatIsNotReadBreaksAndItsClientIsTold(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "MDPW02", "\x01", "dump")
	r.from("C", "MDPC02", "\x01", "dump")
	token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
	r.from("W", "MDPW02", "\x03", token, "", "x")
	r.expect(part("C", "dump", "x"))

	r.failed["C"] = errWouldBlock
	r.from("W", "MDPW02", "\x03", token, "", "y")
	r.from("W", "MDPW02", "\x03", token, "", "z") // It cannot be told.
	r.pass(1)
	r.sent = nil
	delete(r.failed, "C")
	r.pass(1)
	r.expect([]string{"W", "MDPW02", "\x05"}, final("C", "dump", "", "bbroker: dump: the stream broke, because it was not read\n", "exit status 069"))
	r.from("W", "MDPW02", "\x03", token, "", "more")
	r.from("W", "MDPW02", "\x04", token, "", "end")
	r.expect()
	if r.unfinished != 0 || r.held != 0 || r.workers["W"].idleElement == nil {
		t.Errorf("%d requests of %d bytes are left", r.unfinished, r.held)
	}
}

func TestEndOfAStreamThatIsNotReadIsNotLost(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.sendParts(token, 1)
	r.failed["C"] = errWouldBlock
	r.from(streamWorker, "MDPW02", "\x04", token, "", "end")
	delete(r.failed, "C")
	r.pass(1)
	r.expect(heartbeatTo(streamWorker), final("C", "dump", "", "bbroker: dump: the stream broke, because it was not read\n", "exit status 069"))
}

// giveUps are the ways in which a client gives up its requests.
var giveUps = map[string]func(r *fakeRouter){
	"it takes them back": func(r *fakeRouter) {
		r.from("C", "", "MDPC01", "mmi.cancel", "")
		answer := r.sent[len(r.sent)-1]
		if r.sent = r.sent[:len(r.sent)-1]; fmt.Sprint(answer) != fmt.Sprint([]string{"C", "", "MDPC01", "mmi.cancel", "200"}) {
			r.t.Errorf("mmi.cancel was answered by %q", answer)
		}
	},
	"its connection breaks": func(r *fakeRouter) { r.Disconnected(7, r.clock) },
}

func TestStreamOfAClientThatGivesUpEnds(t *testing.T) {
	for name, giveUp := range giveUps {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			token := r.beginStream()
			r.sendParts(token, 1)
			giveUp(r)
			r.expect(disconnectTo(streamWorker))
			if r.unfinished != 0 || r.workers[streamWorker] != nil || r.total.counts[cancelledTotal] != 1 || r.total.counts[lostWorkersTotal] != 0 {
				t.Errorf("%d requests are left, %d were cancelled", r.unfinished, r.total.counts[cancelledTotal])
			}
			r.expectLog(1, "request cancelled", token)
		})
	}
}

func TestRequestOfAClientThatConnectedAgainOverTheSameDescriptorGoesOn(t *testing.T) {
	for name, request := range map[string][]string{
		"stream":                        {"C", "MDPC02", "\x01", "dump", "x"},
		"request that can be cancelled": {"C", "", "MDPC01", "dump", "x"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			workers := []string{workerPrefix + "1", workerPrefix + "2"}
			for _, worker := range workers {
				r.from(worker, "", "MDPW01", "\x01", "dump", "cancel")
			}
			r.Receive(frames(request...), sender{source: 7}, r.clock)
			r.expect(toWorker(workers[0], "*", "x"))
			r.happened = func() {
				r.Disconnected(7, r.clock)
				r.Accepted(7)
			}
			r.Receive(frames(request...), sender{source: 7}, r.clock)
			r.expect(disconnectTo(workers[0]), toWorker(workers[1], "*", "x"))
			if n := r.total.counts[cancelledTotal]; n != 1 || r.unfinished != 1 {
				t.Errorf("%d requests were cancelled, %d are left", n, r.unfinished)
			}
		})
	}
}

func TestServiceWhoseCommandWasCancelledIsStillThereForAWhile(t *testing.T) {
	r := newFakeRouter(t)
	r.beginStream()
	r.from("C", "", "MDPC01", "mmi.cancel", "")
	r.sent = nil
	asked := func(want string) {
		t.Helper()
		r.from("C", "", "MDPC01", "mmi.service", "dump")
		r.expect([]string{"C", "", "MDPC01", "mmi.service", want})
	}
	asked("200")
	r.pass(r.Liveness - 1)
	asked("200")
	if n := r.services["dump"].tally.counts[cancelledTotal]; n != 1 {
		t.Errorf("the service counts %d cancelled requests", n)
	}
	r.pass(2)
	asked("404")
	if len(r.services) != 0 || r.unserved != 0 {
		t.Error("the service is still there")
	}
}

func TestStreamsOfOneClientShareWhatMayBeOnItsWay(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxMemory, r.MaxQueue = 1<<30, 1000
	for i := range 500 {
		r.from(fmt.Sprint("W", i), "", "MDPW01", "\x01", "dump")
		r.from("C", fmt.Sprint(i), "MDPC02", "\x01", "dump")
	}
	for i, want := range map[int]string{0: "~64", 7: "~64", 99: "~5", 499: "~2"} {
		if token := r.sent[i][4]; !strings.HasSuffix(token, want) {
			t.Errorf("the token of stream %d is %s, want %s at its end", i, token, want)
		}
	}
}

func TestStreamOfAClientThatCannotBeReachedEnds(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.failed["C"] = errGone
	r.from(streamWorker, "MDPW02", "\x03", token, "", "x")
	r.expect(disconnectTo(streamWorker))
}

func TestWorkerThatHasNotAnnouncedItHearsNothingOfAClientThatGivesUp(t *testing.T) {
	for name, giveUp := range giveUps {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			r.from("W", "MDPW02", "\x01", "dump")
			r.Receive(frames("C", "MDPC02", "\x01", "dump"), sender{source: 7}, r.clock)
			token := r.expect([]string{"W", "MDPW02", "\x02", "*", ""})[0]
			giveUp(r)
			r.expect()
			r.from("D", "MDPC02", "\x01", "dump") // It waits: the worker is busy.
			r.from("W", "MDPW02", "\x03", token, "", "x")
			r.expect()
			r.from("W", "MDPW02", "\x04", token, "", "end")
			r.expect([]string{"W", "MDPW02", "\x02", "*", ""})
		})
	}
}

func TestRequestIsCancelledWhereItsWorkerHasAnnouncedThat(t *testing.T) {
	for name, giveUp := range giveUps {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			r.from("W", "", "MDPW01", "\x01", "slow", "cancel")
			r.Receive(frames("C", "", "MDPC01", "slow"), sender{source: 7}, r.clock)
			r.expect(toWorker("W", "*"))
			giveUp(r)
			r.expect(disconnectTo("W"))
			if r.unfinished != 0 || r.total.counts[cancelledTotal] != 1 {
				t.Errorf("%d requests are left, %d were cancelled", r.unfinished, r.total.counts[cancelledTotal])
			}
		})
	}
}

func TestRequestThatRunsElsewhereIsNotCancelled(t *testing.T) {
	r := newFakeRouter(t)
	r.from(streamWorker, "", "MDPW01", "\x01", "slow")
	r.Receive(frames("C", "", "MDPC01", "slow"), sender{source: 7}, r.clock)
	token := r.expect(toWorker(streamWorker, "*"))[0]
	r.from("C", "", "MDPC01", "mmi.cancel", "")
	r.expect([]string{"C", "", "MDPC01", "mmi.cancel", "404"})
	r.from(streamWorker, "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C", "", "MDPC01", "slow", "done"})
}

func TestStreamOfALostWorkerEndsWithAFailure(t *testing.T) {
	for name, lose := range map[string]func(r *fakeRouter, token string){
		"it falls silent": func(r *fakeRouter, token string) { r.pass(r.Liveness + 1) },
		"it leaves":       func(r *fakeRouter, token string) { r.from(streamWorker, "", "MDPW01", "\x05") },
		"it hands back":   func(r *fakeRouter, token string) { r.from(streamWorker, "", "MDPW01", "\x05", "75", "busy") },
		"it breaks the protocol": func(r *fakeRouter, token string) {
			r.from(streamWorker, "", "MDPW01", "\x01", "dump")
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFakeRouter(t)
			r.Redeliver = 1 // The client must not get the parts twice.
			token := r.beginStream()
			r.from("other", "", "MDPW01", "\x01", "dump")
			r.sendParts(token, 1)
			lose(r, token)
			ends := 0
			for _, sent := range r.sent {
				if sent[0] == "C" && sent[2] == "\x03" && sent[len(sent)-1] == "exit status 069" {
					ends++
				} else if sent[0] == "C" || len(sent) > 4 {
					t.Errorf("the broker sent %q", sent)
				}
			}
			if ends != 1 {
				t.Errorf("the client was told %d times: %q", ends, r.sent)
			}
		})
	}
}

func TestStreamGoesOnWhileTheBrokerDrains(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.Drain()
	r.Tick(r.clock)
	r.from(streamWorker, "MDPW02", "\x03", token, "", "x")
	r.from(streamWorker, "MDPW02", "\x04", token, "", "end")
	r.expect(part("C", "dump", "x"), final("C", "dump", "end"))
	if !r.Drained() {
		t.Error("a request is left")
	}
}

func TestStreamEndsWhenTheBrokerStops(t *testing.T) {
	r := newFakeRouter(t)
	token := r.beginStream()
	r.sendParts(token, 1)
	r.Stop()
	r.expect(disconnectTo(streamWorker), final("C", "dump", "", "bbroker: dump: the broker is shutting down; the command may have run\n", "exit status 069"))
}

func TestStreamOfAKeyThatIsRevokedEndsAtOnce(t *testing.T) {
	r := newFakeRouter(t)
	ann := &grant{name: "ann", call: []string{"*"}}
	r.SetAccess(&accessList{grants: map[string]*grant{"key": ann, "worker": {serve: []string{"*"}}}})
	r.Accepted(7)
	r.Accepted(8)
	r.Receive(frames(streamWorker, "", "MDPW01", "\x01", "dump"), sender{source: 8, user: "worker", admitted: 2}, r.clock)
	r.Receive(frames("C", "MDPC02", "\x01", "dump"), sender{source: 7, user: "key", admitted: 1}, r.clock)
	r.expect(toWorker(streamWorker, "*"))
	r.SetAccess(&accessList{grants: map[string]*grant{"key": {name: "ann", call: []string{"other"}}, "worker": {serve: []string{"*"}}}})
	r.expect(disconnectTo(streamWorker), final("C", "dump", "", "bbroker: dump: ann may not call it any more, so its reply is withheld\n", "exit status 077"))
}

func TestBrokerTellsThatItKnowsCredit(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C", "", "MDPC01", "mmi.service", "mmi.credit")
	r.from("C", "MDPC02", "\x01", "mmi.service", "mmi.credit")
	r.from("C", "MDPC02", "\x01", "mmi.service", "mmi.unheard")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "200"}, final("C", "mmi.service", "200"), final("C", "mmi.service", "404"))
}

func TestClientThatSendsNoRequestIsIgnored(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C", "MDPC02", "\x02", "dump", "x")
	r.from("C", "MDPC02", "\x03", "dump", "x")
	r.expect()
	r.expectLog(1, "bad message", "peer=C", "an unexpected PARTIAL")
}

// The socket calls back when ZeroMQ has written what it holds for a peer that reads again.
func TestQueueTellsWhenItsPeerHasRead(t *testing.T) {
	router, bound, err := listen([]string{"tcp://127.0.0.1:0"}, 64<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	waiter := newPollWaiter()
	waker := newQueueWaker(waiter)
	defer waker.close()
	client := connectPeer(t, 5, bound[0]) // a DEALER
	client.send("hello")
	var message [][]byte
	for message == nil {
		if err := waiter.Wait(time.Now().Add(10*time.Second), router); err != nil {
			t.Fatal(err)
		}
		if message, err = router.receive(); err != nil {
			t.Fatal(err)
		}
	}

	queue := newSendQueue(waker)
	defer queue.close()
	queue.notify(0)
	if !waker.woken() || waker.woken() {
		t.Error("an empty queue does not tell once")
	}
	for range 3 {
		if err := router.sendCounted([][]byte{message[0], make([]byte, 32<<20)}, queue); err != nil {
			t.Fatal(err)
		}
	}
	queue.notify(maxAhead)
	if waker.woken() {
		t.Fatal("the queue tells before its peer has read")
	}
	for range 3 {
		client.recv()
	}
	for !waker.woken() {
		if err := waiter.Wait(time.Now().Add(10*time.Second), router); err != nil {
			t.Fatal(err)
		}
	}
	if queue.size() > maxAhead {
		t.Errorf("%d bytes are left", queue.size())
	}
}
