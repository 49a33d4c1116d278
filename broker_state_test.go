package main

import (
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRequestGoesToAWorkerAndItsReplyBack(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.expect()
	r.from("C", "", "MDPC01", "echo", "hello", "", "\x00\xff")
	token := r.expect(toWorker("W", "*", "hello", "", "\x00\xff"))[0]
	r.from("W", "", "MDPW01", "\x03", token, "", "good", "bye")
	r.expect([]string{"C", "", "MDPC01", "echo", "good", "bye"})
}

func TestRequestsAndRepliesMayHaveNoBody(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "ls")
	r.from("C", "", "MDPC01", "ls")
	token := r.expect(toWorker("W", "*"))[0]
	r.from("W", "", "MDPW01", "\x03", token, "")
	r.expect([]string{"C", "", "MDPC01", "ls"})
}

func TestAddressStackComesBackUnchanged(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	stack := []string{"proxy", "\x00\x01\x02\x03\x04", "MDPW01", "7"}
	r.from(append(stack, "", "MDPC01", "echo", "x")...)
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.from("W", "", "MDPW01", "\x03", token, "", "y")
	r.expect(append(stack, "", "MDPC01", "echo", "y"))
}

func TestWorkerGetsOnePrintableTokenAndNeverTheSame(t *testing.T) {
	r := newFakeRouter(t)
	seen := map[string]bool{}
	r.from("W", "", "MDPW01", "\x01", "echo")
	for range 100 {
		r.from("\x00bin", "deep", "", "MDPC01", "echo")
		token := r.expect(toWorker("W", "*"))[0]
		for _, c := range []byte(token) {
			if c <= ' ' || c > '~' {
				t.Fatalf("token %q is not printable", token)
			}
		}
		if seen[token] {
			t.Fatalf("token %q was used twice", token)
		}
		seen[token] = true
		r.from("W", "", "MDPW01", "\x03", token, "")
		r.expect([]string{"\x00bin", "deep", "", "MDPC01", "echo"})
	}
}

func TestLeastRecentlyUsedWorkerIsNext(t *testing.T) {
	r := newFakeRouter(t)
	var order []string
	request := func() (worker, token string) {
		r.from("C", "", "MDPC01", "echo")
		wild := r.expect([]string{"*", "", "MDPW01", "\x02", "*", ""})
		order = append(order, wild[0])
		return wild[0], wild[1]
	}
	for _, w := range []string{"W1", "W2", "W3"} {
		r.from(w, "", "MDPW01", "\x01", "echo")
	}
	w1, t1 := request()
	w2, t2 := request()
	r.from(w2, "", "MDPW01", "\x03", t2, "")
	r.from(w1, "", "MDPW01", "\x03", t1, "")
	r.sent = nil
	request()
	request()
	request()
	if want := []string{"W1", "W2", "W3", "W2", "W1"}; !reflect.DeepEqual(order, want) {
		t.Errorf("workers were used in the order %q, want %q", order, want)
	}
}

func TestRequestsWaitInOrderForAServiceThatIsNotThereYet(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C1", "", "MDPC01", "late", "1")
	r.from("C2", "", "MDPC01", "late", "2")
	r.from("W", "", "MDPW01", "\x01", "other")
	r.expect()
	r.from("W1", "", "MDPW01", "\x01", "late")
	token := r.expect(toWorker("W1", "*", "1"))[0]
	r.from("W1", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C1", "", "MDPC01", "late", "done"}, toWorker("W1", "*", "2"))
}

func TestEachServiceHasItsOwnWorkers(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "a")
	r.from("W2", "", "MDPW01", "\x01", "b\x00")
	r.from("C", "", "MDPC01", "b\x00", "x")
	r.expect(toWorker("W2", "*", "x"))
	r.from("C", "", "MDPC01", "b\x00", "y")
	r.expect()
}

func TestWorkerThatRegistersAManagementServiceIsDisconnected(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "mmi.service")
	r.expect(disconnectTo("W"))
	r.from("C", "", "MDPC01", "mmi.service", "mmi.service")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
}

func TestUnknownWorkerIsToldToRegisterAnew(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x04")
	r.expect(disconnectTo("W"))
	r.from("W", "", "MDPW01", "\x03", "old", "", "reply")
	r.expect(disconnectTo("W"))
	r.from("W", "", "MDPW01", "\x05")
	r.expect()
}

func TestProtocolBreakersAreDisconnectedAndTheirClientsTold(t *testing.T) {
	for _, test := range []struct {
		name    string
		message []string
	}{
		{"second READY", []string{"", "MDPW01", "\x01", "echo"}},
		{"READY for another name", []string{"", "MDPW01", "\x01", "other"}},
		{"REQUEST", []string{"", "MDPW01", "\x02", "A", "", "x"}},
		{"reply with the wrong token", []string{"", "MDPW01", "\x03", "wrong", "", "x"}},
		{"reply without a token", []string{"", "MDPW01", "\x03", "", "x"}},
		{"reply to the client itself", []string{"", "MDPW01", "\x03", "C", "", "x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newFakeRouter(t)
			r.from("W", "", "MDPW01", "\x01", "echo")
			r.from("C", "", "MDPC01", "echo")
			r.expect(toWorker("W", "*"))
			r.from(append([]string{"W"}, test.message...)...)
			r.expect(disconnectTo("W"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 69"})
			r.from("C", "", "MDPC01", "mmi.service", "echo")
			r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
		})
	}
}

func TestReplyIsTakenOnceAndOnlyFromTheWorkerThatHasTheRequest(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo")
	token := r.expect(toWorker("W1", "*"))[0]
	r.from("W2", "", "MDPW01", "\x03", token, "", "forged")
	r.expect(disconnectTo("W2"))
	r.from("W1", "", "MDPW01", "\x03", token, "", "true")
	r.expect([]string{"C", "", "MDPC01", "echo", "true"})
	r.from("W1", "", "MDPW01", "\x03", token, "", "again")
	r.expect(disconnectTo("W1"))
}

func TestHeartbeatsGoToIdleAndBusyWorkers(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "a")
	r.from("W2", "", "MDPW01", "\x01", "b")
	r.from("C", "", "MDPC01", "a")
	r.sent = nil
	if next := r.Tick(r.clock.Add(time.Second / 2)); !next.Equal(r.clock.Add(time.Second)) {
		t.Errorf("the next tick is due at %v, want in half a second", next)
	}
	r.expect()
	r.pass(1)
	slices.SortFunc(r.sent, slices.Compare)
	r.expect(heartbeatTo("W1"), heartbeatTo("W2"))
}

func TestHeartbeatIsNeverAnsweredWithOne(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	for range 10 {
		r.from("W", "", "MDPW01", "\x04")
	}
	r.expect()
}

func TestSilentIdleWorkerIsDisconnected(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.pass(5)
	r.expect(slices.Repeat([][]string{heartbeatTo("W")}, 5)...)
	r.pass(1)
	r.expect(disconnectTo("W"))
	r.from("C", "", "MDPC01", "mmi.service", "echo")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
}

func TestAnyCommandCountsAsAHeartbeat(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	for range 4 {
		r.pass(4)
		r.from("C", "", "MDPC01", "echo")
		r.sent = r.sent[4:]
		token := r.expect(toWorker("W", "*"))[0]
		r.from("W", "", "MDPW01", "\x03", token, "")
		r.expect([]string{"C", "", "MDPC01", "echo"})
	}
}

func TestBrokerThatWasSuspendedDropsNoWorker(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.clock = r.clock.Add(time.Hour)
	r.Tick(r.clock)
	r.expect(heartbeatTo("W"))
}

func TestWorkerThatCannotSendWhileBusyNeedOnlyBeReachable(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo")
	token := r.expect(toWorker("W", "*"))[0]
	r.from("W", "", "MDPW01", "\x04") // sent before the request arrived
	r.pass(1)
	r.failed["W"] = errWouldBlock // it does not read either
	r.pass(100)
	delete(r.failed, "W")
	r.from("W", "", "MDPW01", "\x03", token, "", "at last")
	r.expect(heartbeatTo("W"), []string{"C", "", "MDPC01", "echo", "at last"})
}

func TestWorkerThatCanSendWhileBusyMustGoOn(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo")
	r.pass(3)
	r.from("W", "", "MDPW01", "\x04")
	r.pass(5)
	r.sent = nil
	r.pass(1)
	r.expect(disconnectTo("W"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 69"})
}

func TestRequestPassesWorkersThatCannotBeReached(t *testing.T) {
	r := newFakeRouter(t)
	for _, w := range []string{"W1", "W2", "W3"} {
		r.from(w, "", "MDPW01", "\x01", "echo")
	}
	r.failed["W1"], r.failed["W2"] = errGone, errWouldBlock
	r.from("C", "", "MDPC01", "echo", "x")
	r.expect(toWorker("W3", "*", "x"))
	r.expectLog(2, "worker lost")
}

func TestRequestWaitsWhenNoWorkerCanBeReached(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.failed["W1"] = errGone
	r.from("C", "", "MDPC01", "echo", "x")
	r.expect()
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W2", "*", "x"))
}

func TestWorkerFoundGoneAtAHeartbeatIsForgotten(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "idle")
	r.from("W2", "", "MDPW01", "\x01", "busy")
	r.from("C", "", "MDPC01", "busy")
	r.expect(toWorker("W2", "*"))
	r.failed["W1"], r.failed["W2"] = errGone, errGone
	r.pass(1)
	r.expect([]string{"C", "", "MDPC01", "busy", "", "*", "exit status 69"})
	r.from("C", "", "MDPC01", "mmi.service", "idle")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
}

func TestWorkerThatLeavesHandsItsRequestToTheNextAheadOfTheQueue(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.from("C1", "", "MDPC01", "echo", "first")
	r.from("C2", "", "MDPC01", "echo", "second")
	r.expect(toWorker("W1", "*", "first"))
	r.from("W1", "", "MDPW01", "\x05")
	r.expect()
	r.from("W2", "", "MDPW01", "\x01", "echo")
	token := r.expect(toWorker("W2", "*", "first"))[0]
	r.from("W2", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C1", "", "MDPC01", "echo", "done"}, toWorker("W2", "*", "second"))
}

func TestReplyToAClientThatIsGoneHurtsNobody(t *testing.T) {
	for _, err := range []error{errGone, errWouldBlock} {
		r := newFakeRouter(t)
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("C1", "", "MDPC01", "echo")
		token := r.expect(toWorker("W", "*"))[0]
		r.failed["C1"] = err
		r.from("W", "", "MDPW01", "\x03", token, "")
		r.from("C2", "", "MDPC01", "echo")
		r.expect(toWorker("W", "*"))
	}
}

func TestServiceIsGoneWithItsLastWorkerAndRequest(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("W", "", "MDPW01", "\x05")
	r.from("W", "", "MDPW01", "\x01", "lost")
	r.pass(6)
	for i := range 100 {
		r.from("C", "", "MDPC01", "mmi.service", fmt.Sprint("stranger", i))
	}
	if len(r.services) != 0 || len(r.workers) != 0 {
		t.Errorf("%d services and %d workers are left", len(r.services), len(r.workers))
	}
}

func TestStopAnswersEveryRequestAndDisconnectsEveryWorker(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "busy")
	r.from("W2", "", "MDPW01", "\x01", "idle")
	r.from("C1", "", "MDPC01", "busy")
	r.from("C2", "", "MDPC01", "busy")
	r.sent = nil
	r.Stop()
	slices.SortFunc(r.sent, slices.Compare)
	r.expect(
		[]string{"C1", "", "MDPC01", "busy", "", "*", "exit status 75"},
		[]string{"C2", "", "MDPC01", "busy", "", "*", "exit status 75"},
		disconnectTo("W1"), disconnectTo("W2"),
	)
}

func TestLostWorkersRequestIsRedeliveredAsOftenAsAllowed(t *testing.T) {
	r := newFakeRouter(t)
	r.Redeliver = 1
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W1", "*", "x"))[0]
	r.failed["W1"] = errGone
	r.pass(1)
	r.expect()
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W2", token, "x"))
	delete(r.failed, "W1")
	r.from("W1", "", "MDPW01", "\x03", token, "", "late")
	r.expect(disconnectTo("W1"))
	r.failed["W2"] = errGone
	r.pass(1)
	r.expect([]string{"C", "", "MDPC01", "echo", "", "*", "exit status 69"})
}

func TestRequestExpiresWhenNoWorkerComes(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C1", "", "MDPC01", "echo", "1")
	r.pass(30)
	r.from("C2", "", "MDPC01", "echo", "2")
	r.pass(29)
	r.expect()
	r.pass(1)
	r.expect([]string{"C1", "", "MDPC01", "echo", "", "*", "exit status 69"})
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W", "*", "2"))
}

func TestRequestDoesNotExpireWhileItsServiceIsServed(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.from("C1", "", "MDPC01", "echo", "1")
	r.from("C2", "", "MDPC01", "echo", "2")
	r.expect(toWorker("W1", "*", "1"))
	r.pass(1000)
	r.failed["W1"] = errGone
	r.sent = nil
	r.pass(1)
	r.expect([]string{"C1", "", "MDPC01", "echo", "", "*", "exit status 69"})
	r.pass(59) // since the last worker was lost
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W2", "*", "2"))
}

func TestRequestsWaitForEverWithoutAQueueTTL(t *testing.T) {
	r := newFakeRouter(t)
	r.QueueTTL = 0
	r.from("C", "", "MDPC01", "echo", "x")
	r.pass(100_000)
	r.expect()
}

func TestFullQueueRefuses(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	for range 11 { // one in flight, ten in the queue
		r.from("C", "", "MDPC01", "echo")
	}
	r.expect(toWorker("W", "*"))
	r.from("D", "", "MDPC01", "echo")
	r.from("D", "", "MDPC01", "echo")
	refusal := []string{"D", "", "MDPC01", "echo", "", "bbroker: echo: the queue is full\n", "exit status 75"}
	r.expect(refusal, refusal)
	r.from("D", "", "MDPC01", "other")
	r.expect()
	r.expectLog(1, "requests refused", "service=echo", "the queue is full")
}

func TestBrokerHoldsNoMoreBytesThanItMay(t *testing.T) {
	r := newFakeRouter(t)
	half := strings.Repeat("x", 1<<19-len("Ca"))
	r.from("W", "", "MDPW01", "\x01", "a")
	r.from("C", "", "MDPC01", "a", half)
	r.from("C", half, "", "MDPC01", "b") // the address counts, too
	token := r.expect(toWorker("W", "*", half))[0]
	r.from("D", "", "MDPC01", "c", "x")
	r.expect([]string{"D", "", "MDPC01", "c", "", "*", "exit status 75"})
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.from("D", "", "MDPC01", "c", "x")
	r.expect([]string{"C", "", "MDPC01", "a", "done"})
}

func TestCancelDropsTheWaitingRequestsOfItsClientOnly(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "a")
	r.from("C", "", "MDPC01", "a", "in flight")
	token := r.expect(toWorker("W", "*", "in flight"))[0]
	r.from("C", "", "MDPC01", "a", "waits")
	r.from("C", "7", "", "MDPC01", "b", "waits with a frame of the client's own")
	r.from("D", "", "MDPC01", "a", "another client's")
	r.from("C", "", "MDPC01", "mmi.cancel")
	r.expect([]string{"C", "", "MDPC01", "mmi.cancel", "200"})
	r.from("C", "", "MDPC01", "mmi.cancel")
	r.expect([]string{"C", "", "MDPC01", "mmi.cancel", "404"})
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C", "", "MDPC01", "a", "done"}, toWorker("W", "*", "another client's"))
	r.from("V", "", "MDPW01", "\x01", "b")
	r.expect()
}

func TestCancelBehindAProxyIsForOneOfItsClients(t *testing.T) {
	r := newFakeRouter(t)
	r.from("proxy", "C", "", "MDPC01", "a", "1")
	r.from("proxy", "D", "", "MDPC01", "a", "2")
	r.from("proxy", "C", "", "MDPC01", "mmi.cancel")
	r.expect([]string{"proxy", "C", "", "MDPC01", "mmi.cancel", "200"})
	r.from("W", "", "MDPW01", "\x01", "a")
	r.expect(toWorker("W", "*", "2"))
}

func TestDrainingBrokerRefusesNewRequestsAndAwaitsReplies(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C1", "", "MDPC01", "echo", "in flight")
	r.from("C2", "", "MDPC01", "echo", "waiting")
	token := r.expect(toWorker("W", "*", "in flight"))[0]
	r.Drain()
	r.expect([]string{"C2", "", "MDPC01", "echo", "", "*", "exit status 75"})
	r.from("C3", "", "MDPC01", "echo", "new")
	r.expect([]string{"C3", "", "MDPC01", "echo", "", "*", "exit status 75"})
	if r.Drained() {
		t.Error("the broker is drained with a request in flight")
	}
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C1", "", "MDPC01", "echo", "done"})
	if !r.Drained() {
		t.Error("the broker is not drained without requests")
	}
}

func TestBadMessagesAreLoggedOnceForEachPeerAndChangeNothing(t *testing.T) {
	r := newFakeRouter(t)
	for range 3 {
		r.from("stranger")
		r.from("stranger", "")
		r.from("stranger", "", "MDPC01")
		r.from("stranger", "", "MDPW01", "\x09")
		r.from("other", "", "MDPX01", "echo")
		r.from("proxy", "deep", "", "MDPW01", "\x01", "echo")
	}
	r.Receive(nil, r.clock)
	r.expect()
	r.expectLog(1, "bad message", "peer=stranger")
	r.expectLog(1, "bad message", "peer=other", "no MDPC01 or MDPW01")
	r.expectLog(1, "bad message", "peer=proxy", "no address other than its identity")
	r.expectLog(3, "")
	if len(r.services) != 0 || len(r.workers) != 0 {
		t.Error("bad messages created services or workers")
	}
}

func TestStrangersCannotFillTheListOfThoseThatWereLogged(t *testing.T) {
	r := newFakeRouter(t)
	for i := range 5000 {
		r.from(fmt.Sprint("stranger", i))
	}
	if len(r.warned) > 101 || strings.Count(r.log.String(), "\n") > 101 {
		t.Errorf("the broker remembers %d strangers", len(r.warned))
	}
	r.expectLog(1, "too many different warnings")
	r.pass(61)
	r.from("stranger")
	r.expectLog(1, "bad message", "peer=stranger ")
}

// FuzzBroker lets several peers send any message, become unreachable and fall silent. After each
// step it checks the invariants of the broker. Two bytes of the input are a step.
func FuzzBroker(f *testing.F) {
	f.Add([]byte("\x00\x00\x01\x00\x02\x00"))                                 // a worker, a request, its reply
	f.Add([]byte("\x01\x00\x01\x10\x00\x00\x05\x00\x00\x01\x02\x01\x02\x01")) // the worker leaves, another gets the request
	f.Add([]byte("\x00\x00\x01\x00\x06\x00\x07\x00\x00\x01\x08\x00\x07\x01")) // the worker is lost, requests are cancelled and expire
	f.Fuzz(func(t *testing.T, steps []byte) {
		b := &brokerWorld{fakeRouter: newFakeRouter(t), held: map[string]string{}, ended: map[string]int{}}
		b.Redeliver = 1
		b.MaxQueue = 3
		b.MaxMemory = 200
		b.send = b.record
		for ; len(steps) >= 2; steps = steps[2:] {
			b.step(steps[0], steps[1])
			b.check()
		}
		b.Stop()
		b.check()
		if b.unfinished != 0 {
			t.Errorf("%d requests were not answered", b.unfinished)
		}
		if ended := uint64(len(b.ended)) + b.total.counts[cancelledTotal]; ended != b.total.counts[requestsTotal] {
			t.Errorf("%d requests were received, but %d ended", b.total.counts[requestsTotal], ended)
		}
	})
}

// A brokerWorld is the world around a broker.
type brokerWorld struct {
	*fakeRouter
	held  map[string]string // the token of the last request, by worker
	ended map[string]int    // how many replies were sent, delivered or not, by request
	count int               // steps so far
}

// record stands for the socket of the broker. A number in the address identifies each request.
func (b *brokerWorld) record(frames [][]byte) error {
	message := spell(frames)
	switch {
	case message[2] == "MDPW01" && message[3] == "\x02":
		if b.failed[message[0]] == nil {
			b.held[message[0]] = message[4]
		}
	case message[1] != "":
		b.ended[message[1]]++
		if b.ended[message[1]] > 1 {
			b.t.Fatalf("request %s ended twice", message[1])
		}
	}
	return b.failed[message[0]]
}

func (b *brokerWorld) step(what, who byte) {
	worker := fmt.Sprintf("W%d", who%4)
	client := fmt.Sprintf("C%d", who%3)
	service := fmt.Sprintf("s%d", who>>4%3)
	b.count++
	switch what % 12 {
	case 0:
		b.from(worker, "", "MDPW01", "\x01", service)
	case 1, 10:
		b.from(client, fmt.Sprint("#", b.count), "", "MDPC01", service, strings.Repeat("x", int(who)))
	case 2, 11:
		b.from(worker, "", "MDPW01", "\x03", b.held[worker], "", "done")
	case 3:
		b.from(worker, "", "MDPW01", "\x03", b.held["W0"], "", "forged")
	case 4:
		b.from(worker, "", "MDPW01", "\x04")
	case 5:
		b.from(worker, "", "MDPW01", "\x05")
	case 6:
		for _, peer := range []string{worker, client} {
			b.failed[peer] = []error{nil, errGone, errWouldBlock}[who>>4%3]
		}
	case 7:
		b.clock = b.clock.Add(time.Duration(who) * time.Second)
		b.Tick(b.clock)
	case 8:
		b.from(client, "", "MDPC01", "mmi.cancel")
	case 9:
		bad := [][]string{{""}, {"", "MDPC01"}, {"", "MDPC01", ""}, {"", "MDPW01", "\x09"}, {"MDPW01", "\x05"},
			{"", "MDPC01", "mmi.metrics"}, {"", "MDPC01", "mmi.services"}, {"", "MDPW01", "\x02", "", "x"}}
		b.from(append([]string{worker}, bad[int(who>>2)%len(bad)]...)...)
	}
}

// check checks the invariants of the broker.
func (b *brokerWorld) check() {
	b.t.Helper()
	waiting := map[*brokerRequest]bool{}
	workers := map[*brokerService]int{}
	bytes := size(0)
	for _, w := range b.workers {
		workers[w.service]++
		if (w.request == nil) != (w.idleElement != nil) {
			b.t.Fatalf("worker %s is both idle and busy, or neither", w.identity)
		}
		if b.services[w.service.name] != w.service {
			b.t.Fatalf("the service of worker %s is not known", w.identity)
		}
	}
	for name, s := range b.services {
		if s.workers == 0 && s.waiting.Len() == 0 {
			b.t.Fatalf("service %s has neither workers nor requests", name)
		}
		if s.workers != workers[s] {
			b.t.Fatalf("service %s has %d workers, but counts %d", name, workers[s], s.workers)
		}
		if s.idle.Len() > 0 && s.waiting.Len() > 0 {
			b.t.Fatalf("service %s has idle workers and waiting requests", name)
		}
		for e := s.waiting.Front(); e != nil; e = e.Next() {
			r := e.Value.(*brokerRequest)
			if r.queued != e || waiting[r] {
				b.t.Fatalf("request %q is queued twice or has the wrong element", r.client)
			}
			waiting[r] = true
			bytes += r.size()
		}
	}
	open := len(waiting)
	for _, w := range b.workers {
		if r := w.request; r != nil {
			if waiting[r] || r.queued != nil {
				b.t.Fatalf("request %q is both waiting and in flight", r.client)
			}
			open++
			bytes += r.size()
		}
	}
	if b.unfinished != open || b.Broker.held != bytes {
		b.t.Fatalf("the broker counts %d requests of %d bytes, but has %d of %d", b.unfinished, b.Broker.held, open, bytes)
	}
	owned := 0
	for client, own := range b.Broker.waiting {
		if own.Len() == 0 {
			b.t.Fatalf("client %s has no waiting requests", client)
		}
		owned += own.Len()
	}
	if owned != len(waiting) {
		b.t.Fatalf("%d requests wait, but clients own %d", len(waiting), owned)
	}
	for number := range b.ended {
		for r := range waiting {
			if string(r.client[1]) == number {
				b.t.Fatalf("request %s ended, but still waits", number)
			}
		}
	}
}

// BenchmarkDispatch measures a request and its reply in the state machine, without a socket. The
// cost must not grow with the number of services, workers and waiting requests.
func BenchmarkDispatch(b *testing.B) {
	for _, load := range []struct{ services, workers, waiting int }{
		{1, 1, 0}, {10_000, 1, 0}, {1, 10_000, 0}, {1, 1, 100_000}, {10_000, 10_000, 100_000},
	} {
		b.Run(fmt.Sprintf("services=%d/workers=%d/waiting=%d", load.services, load.workers, load.waiting), func(b *testing.B) {
			now := time.Now()
			var worker, token []byte
			flags := testFlags
			flags.MaxQueue, flags.MaxMemory = 1<<30, 1<<40
			broker := NewBroker(flags, now, func(frames [][]byte) error {
				if len(frames) > 5 && string(frames[2]) == workerProtocol {
					worker, token = frames[0], frames[4]
				}
				return nil
			}, slog.New(slog.DiscardHandler))
			for i := range load.services - 1 {
				broker.Receive(frames(fmt.Sprint("V", i), "", "MDPW01", "\x01", fmt.Sprint("other", i)), now)
			}
			for i := range load.workers {
				broker.Receive(frames(fmt.Sprint("W", i), "", "MDPW01", "\x01", "echo"), now)
			}
			for i := range load.waiting {
				broker.Receive(frames(fmt.Sprint("C", i), "", "MDPC01", "later", "hello"), now)
			}
			request := frames("C", "", "MDPC01", "echo", "hello")
			reply := frames("", "", "MDPW01", "\x03", "", "", "hello")
			b.ReportAllocs()
			for b.Loop() {
				broker.Receive(request, now)
				reply[0], reply[4] = worker, token
				broker.Receive(reply, now)
			}
			if replies := broker.total.counts[repliesTotal]; replies != uint64(b.N) {
				b.Fatalf("%d replies to %d requests", replies, b.N)
			}
		})
	}
}
