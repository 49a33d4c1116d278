package main

import (
	"bytes"
	"fmt"
	"maps"
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
	r.from("W", "", "MDPW01", "\x01", "mmi.x")
	r.expect(disconnectTo("W"))
	r.from("C", "", "MDPC01", "mmi.service", "mmi.x")
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
			r.expect(disconnectTo("W"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
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
	for _, identity := range []string{"W", "bservice.host.1"} {
		r := newFakeRouter(t)
		r.from(identity, "", "MDPW01", "\x01", "echo")
		r.from("C", "", "MDPC01", "echo")
		if identity == "W" { // It has to show that it can.
			r.from(identity, "", "MDPW01", "\x04")
			r.pass(3)
			r.from(identity, "", "MDPW01", "\x04")
		}
		r.pass(5)
		r.sent = nil
		r.pass(1)
		r.expect(disconnectTo(identity), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
	}
}

func TestBytesThatArriveAreASignOfLife(t *testing.T) {
	r := newFakeRouter(t)
	r.Receive(frames("bservice.1", "", "MDPW01", "\x01", "echo"), sender{source: 7}, r.clock)
	r.from("C", "", "MDPC01", "echo")
	for range 20 { // A long reply is on its way.
		r.pass(1)
		r.bytes[7] += 1 << 20
	}
	r.from("C", "", "MDPC01", "mmi.service", "echo")
	r.sent = r.sent[len(r.sent)-1:]
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "200"})
	r.pass(5)
	r.sent = nil
	r.pass(1)
	r.expect(disconnectTo("bservice.1"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
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
	r.pass(2)
	r.expect([]string{"C", "", "MDPC01", "busy", "", "*", "exit status 069"})
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
		[]string{"C1", "", "MDPC01", "busy", "", "*", "exit status 069"},
		[]string{"C2", "", "MDPC01", "busy", "", "*", "exit status 075"},
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
	r.pass(2)
	r.expect()
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W2", token, "x"))
	delete(r.failed, "W1")
	r.from("W1", "", "MDPW01", "\x03", token, "", "late")
	r.expect(disconnectTo("W1"))
	r.failed["W2"] = errGone
	r.pass(2)
	r.expect([]string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
}

func TestRequestExpiresWhenNoWorkerComes(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C1", "", "MDPC01", "echo", "1")
	r.pass(30)
	r.from("C2", "", "MDPC01", "echo", "2")
	r.pass(29)
	r.expect()
	r.pass(1)
	r.expect([]string{"C1", "", "MDPC01", "echo", "", "*", "exit status 069"})
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W", "*", "2"))
}

func TestHeartbeatsDoNotWaitForRequestsThatExpire(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxQueue, r.MaxMemory, r.Liveness = 10*maxEnded, 1<<30, 100
	r.from("W", "", "MDPW01", "\x01", "echo")
	for range 3 * maxEnded {
		r.from("C", "", "MDPC01", "absent")
	}
	r.pass(60) // The first of them expire.
	r.sent = nil
	r.pass(1)
	if !slices.ContainsFunc(r.sent, func(m []string) bool { return slices.Equal(m, heartbeatTo("W")) }) {
		t.Error("no heartbeat was sent")
	}
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
	r.pass(2)
	r.expect([]string{"C1", "", "MDPC01", "echo", "", "*", "exit status 069"})
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
	for range 11 { // one with the worker, ten in the queue
		r.from("C", "", "MDPC01", "echo")
	}
	r.expect(toWorker("W", "*"))
	r.from("C", "", "MDPC01", "echo")
	r.from("C", "", "MDPC01", "echo")
	refusal := []string{"C", "", "MDPC01", "echo", "", "bbroker: echo: the queue is full\n", "exit status 075"}
	r.expect(refusal, refusal)
	r.from("C", "", "MDPC01", "other")
	r.expect()
	r.expectLog(1, "requests refused", "service=echo", "the queue is full")
}

func TestClientThatFillsTheQueueLeavesRoomForOthers(t *testing.T) {
	r := newFakeRouter(t)
	for range 11 {
		r.from("C", "", "MDPC01", "echo")
	}
	r.sent = nil
	for range 5 { // of ten, a half
		r.from("D", "", "MDPC01", "echo", "d")
	}
	r.expect()
	r.from("D", "", "MDPC01", "echo")
	r.expect([]string{"D", "", "MDPC01", "echo", "", "*", "exit status 075"})
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W", "*"))
}

func TestClientsOfAServiceAreServedInTurnEachInItsOrder(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxQueue = 1000
	for i := range 100 {
		r.from("greedy", "", "MDPC01", "echo", fmt.Sprint("greedy ", i))
	}
	r.from("A", "", "MDPC01", "echo", "A 0")
	r.from("A", "", "MDPC01", "echo", "A 1")
	r.from("B", "", "MDPC01", "echo", "B 0")
	r.from("W", "", "MDPW01", "\x01", "echo")
	var order []string
	for range 7 {
		request := r.sent[len(r.sent)-1]
		order = append(order, request[6])
		r.from("W", "", "MDPW01", "\x03", request[4], "")
	}
	if want := []string{"greedy 0", "A 0", "B 0", "greedy 1", "A 1", "greedy 2", "greedy 3"}; !slices.Equal(order, want) {
		t.Errorf("the requests were served in the order %q, want %q", order, want)
	}
}

func TestWaitingRequestsOfAClientThatIsGoneAreDropped(t *testing.T) {
	r := newFakeRouter(t)
	r.Receive(frames("gone", "", "MDPC01", "echo", "gone"), sender{source: 7}, r.clock)
	r.Receive(frames("back", "", "MDPC01", "echo", "back"), sender{source: 8}, r.clock)
	r.Receive(frames("there", "", "MDPC01", "echo", "there"), sender{source: 9}, r.clock)
	r.Disconnected(7, r.clock)
	r.Disconnected(8, r.clock)
	r.pass(4)
	r.Receive(frames("back", "", "MDPC01", "mmi.service", "echo"), sender{source: 10}, r.clock) // over a new connection
	r.sent = nil
	r.pass(1)
	r.from("W", "", "MDPW01", "\x01", "echo")
	token := r.expect(toWorker("W", "*", "back"))[0]
	r.from("W", "", "MDPW01", "\x03", token, "")
	r.expect([]string{"back", "", "MDPC01", "echo"}, toWorker("W", "*", "there"))
	if r.total.counts[abandonedTotal] != 1 {
		t.Errorf("%d requests were abandoned, want 1", r.total.counts[abandonedTotal])
	}
}

func TestWorkerWhoseConnectionBrokeIsLostAtTheNextHeartbeat(t *testing.T) {
	r := newFakeRouter(t)
	r.Receive(frames("W", "", "MDPW01", "\x01", "echo"), sender{source: 7}, r.clock)
	r.from("C", "", "MDPC01", "echo")
	r.sent = nil
	r.failed["W"] = errGone
	r.Disconnected(7, r.clock)
	r.pass(1)
	r.expect([]string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
}

func TestLastMessagesOfAWorkerThatIsGoneCount(t *testing.T) {
	for _, last := range []string{"reply", "DISCONNECT"} {
		r := newFakeRouter(t)
		r.Receive(frames("W", "", "MDPW01", "\x01", "echo"), sender{source: 7}, r.clock)
		r.from("C", "", "MDPC01", "echo", "x")
		token := r.expect(toWorker("W", "*", "x"))[0]
		r.failed["W"] = errGone
		r.pass(1)
		r.Disconnected(7, r.clock)
		if last == "reply" {
			r.from("W", "", "MDPW01", "\x03", token, "", "done")
			r.expect([]string{"C", "", "MDPC01", "echo", "done"})
		} else {
			r.from("W", "", "MDPW01", "\x05")
			r.from("V", "", "MDPW01", "\x01", "echo")
			r.expect(toWorker("V", token, "x"))
		}
	}
}

func TestDescriptorThatIsUsedAgainIsNotTakenForTheOldConnection(t *testing.T) {
	r := newFakeRouter(t)
	r.Receive(frames("A", "", "MDPC01", "echo"), sender{source: 7}, r.clock)
	if !r.knows(7, []byte("A")) || r.knows(7, []byte("B")) {
		t.Error("the broker does not know whose connection 7 is")
	}
	r.Disconnected(7, r.clock)
	r.Receive(frames("B", "", "MDPC01", "echo", "b"), sender{source: 7}, r.clock)
	r.pass(6)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W", "*", "b"))
}

func TestBrokerHoldsNoMoreBytesThanItMay(t *testing.T) {
	r := newFakeRouter(t)
	almostHalf := strings.Repeat("x", 1<<19-1000) // The rest is what a request costs.
	r.from("W", "", "MDPW01", "\x01", "a")
	r.from("C", "", "MDPC01", "a", almostHalf)
	token := r.expect(toWorker("W", "*", almostHalf))[0]
	r.from("D", almostHalf[:1<<18-1000], "", "MDPC01", "b") // The address is held twice, too.
	r.from("E", "", "MDPC01", "c", strings.Repeat("x", 1000))
	r.expect([]string{"E", "", "MDPC01", "c", "", "bbroker: c: the broker holds --max-memory bytes already\n", "exit status 075"})
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.from("E", "", "MDPC01", "c", strings.Repeat("x", 1000))
	r.expect([]string{"C", "", "MDPC01", "a", "done"})
}

func TestClientHoldsNoMoreThanItsShare(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C", "", "MDPC01", "a", strings.Repeat("x", 1<<18))
	r.expect()
	r.from("C", "", "MDPC01", "b", strings.Repeat("x", 1<<18))
	r.expect([]string{"C", "", "MDPC01", "b", "", "bbroker: b: the client holds its share of --max-memory already\n", "exit status 075"})
	r.from("D", "", "MDPC01", "b", strings.Repeat("x", 1<<18))
	r.expect()
}

func TestFramesAndSmallRequestsCostWhatHoldingThemTakes(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxQueue = 1 << 20
	taken := func(client string, body ...string) (n int) {
		for r.sent = nil; len(r.sent) == 0; n++ {
			r.from(append([]string{client, "", "MDPC01", "a"}, body...)...)
		}
		return n - 1
	}
	if n := taken("C"); n > 1<<19/requestCost || n < 1<<19/requestCost/2 {
		t.Errorf("%d requests without a body are half of %d bytes", n, r.MaxMemory)
	}
	r.sent = nil
	r.from("C", "", "MDPC01", "mmi.cancel")
	if n := taken("C", make([]string, 1000)...); n > 1<<19/1000/frameCost {
		t.Errorf("%d requests with 1000 empty frames each are half of %d bytes", n, r.MaxMemory)
	}
	r.sent = nil
	r.from("C", "", "MDPC01", "mmi.cancel")
	r.sent = nil
	n := 0
	for ; len(r.sent) == 0; n++ {
		r.from("C", "1", "2", "3", "4", "5", "6", "7", "8", "9", "", "MDPC01", "a")
	}
	if n > 1<<19/9/nodeCost {
		t.Errorf("%d requests with 9 frames of address each are half of %d bytes", n, r.MaxMemory)
	}
}

func TestClientThatDoesNotReadLosesItsRepliesAndOthersDoNot(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	serve := func(client string) {
		r.from(client, "", "MDPC01", "echo")
		token := r.expect(toWorker("W", "*"))[0]
		r.from("W", "", "MDPW01", "\x03", token, "", strings.Repeat("x", 10_000))
	}
	serve("C")
	r.sent = nil
	r.queues["C"].bytes = 1<<19 - 100
	r.from("C", "", "MDPC01", "mmi.metrics")
	r.expect()
	r.from("C", "", "MDPC01", "echo")
	r.expect() // It would not read the refusal either.
	serve("D")
	r.expect([]string{"D", "", "MDPC01", "echo", strings.Repeat("x", 10_000)})
	if dropped := r.total.counts[droppedRepliesTotal]; dropped != 1 {
		t.Errorf("%d replies were dropped, want 1", dropped)
	}
	r.queues["C"].bytes = 0
	serve("C")
	r.expect([]string{"C", "", "MDPC01", "echo", strings.Repeat("x", 10_000)})
}

func TestSmallRepliesReachThoseWhoReadEvenIfMemoryIsFull(t *testing.T) {
	r := newFakeRouter(t)
	for _, identity := range []string{"deaf 1", "deaf 2"} {
		r.from(identity, "", "MDPC01", "mmi.service", "x")
		r.queues[identity].bytes = 1 << 19
	}
	r.sent = nil
	r.from("C", "", "MDPC01", "mmi.service", "x")
	r.from("C", "", "MDPC01", "echo")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"}, []string{"C", "", "MDPC01", "echo", "", "*", "exit status 075"})
}

func TestOnlySoManyNamesWaitForAService(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxMemory = 1 << 30
	for i := range maxUnserved {
		r.from("C", "", "MDPC01", fmt.Sprint("name ", i))
	}
	r.expect()
	r.from("C", "", "MDPC01", "one more")
	r.expect([]string{"C", "", "MDPC01", "one more", "", "bbroker: one more: too many names wait for a service\n", "exit status 075"})
	r.from("C", "", "MDPC01", "name 0")
	r.expect()
	r.from("W", "", "MDPW01", "\x01", "served")
	r.from("C", "", "MDPC01", "served")
	r.expect(toWorker("W", "*"))
}

func TestRequestOfTooManyFramesIsRefused(t *testing.T) {
	r := newFakeRouter(t)
	message := append(frames("C", "", "MDPC01", "echo"), make([][]byte, maxFrames)...)
	r.Receive(message[:maxFrames+1], sender{source: -1}, r.clock)
	r.expect([]string{"C", "", "MDPC01", "echo", "", "bbroker: echo: the request has more than 262144 arguments\n", "exit status 064"})
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo")
	token := r.expect(toWorker("W", "*"))[0]
	message = append(frames("W", "", "MDPW01", "\x03", token, ""), make([][]byte, maxFrames)...)
	r.Receive(message[:maxFrames+1], sender{source: -1}, r.clock)
	r.expect(disconnectTo("W"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
}

func TestRequestThatWorkersReturnAgainAndAgainFails(t *testing.T) {
	r := newFakeRouter(t)
	r.from("C", "", "MDPC01", "echo", "poison")
	r.from("D", "", "MDPC01", "echo", "fine")
	served := []string{}
	for range maxReturns + 1 {
		r.from("W", "", "MDPW01", "\x01", "echo")
		body := r.sent[len(r.sent)-1][6]
		served = append(served, body)
		if body == "fine" {
			r.from("W", "", "MDPW01", "\x03", r.sent[len(r.sent)-1][4], "")
		}
		r.from("W", "", "MDPW01", "\x05")
	}
	// Ahead of the others at first, and then behind them.
	if want := []string{"poison", "poison", "poison", "poison", "fine"}; !slices.Equal(served[:5], want) {
		t.Errorf("the requests were served in the order %q, want %q first", served, want)
	}
	if last := r.sent[len(r.sent)-1]; last[0] != "C" || last[5] != "bbroker: echo: 10 workers returned the request\n" || last[6] != "exit status 069" {
		t.Errorf("the last message is %q", last)
	}
	if r.total.counts[poisonedTotal] != 1 {
		t.Errorf("%d requests were poisoned, want 1", r.total.counts[poisonedTotal])
	}
}

// handBackFrom is DISCONNECT of a worker that works for other brokers.
func handBackFrom(identity string) []string {
	return []string{identity, "", "MDPW01", "\x05", "75", "all jobs are busy"}
}

func TestRequestThatIsHandedBackAnyNumberOfTimesIsServed(t *testing.T) {
	r := newFakeRouter(t)
	r.from("bservice.1", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo", "hello")
	token := r.expect(toWorker("bservice.1", "*", "hello"))[0]
	for range 100 {
		r.from(handBackFrom("bservice.1")...)
		r.expect()
		r.from("bservice.1", "", "MDPW01", "\x01", "echo")
		r.expect(toWorker("bservice.1", token, "hello"))
	}
	r.from("bservice.1", "", "MDPW01", "\x03", token, "", "bye")
	r.expect([]string{"C", "", "MDPC01", "echo", "bye"})
	for _, c := range []counter{poisonedTotal, lostWorkersTotal, redeliveredTotal, refusedTotal} {
		if n := r.total.counts[c]; n != 0 {
			t.Errorf("%s is %d", counters[c].name, n)
		}
	}
	r.expectLog(1, "worker came")
	r.expectLog(0, "worker left")
	r.expectLog(0, "WARN")
}

func TestRequestThatIsHandedBackGoesToAnotherIdleWorkerAtOnce(t *testing.T) {
	r := newFakeRouter(t)
	for _, w := range []string{"W1", "W2"} {
		r.from(w, "", "MDPW01", "\x01", "echo")
	}
	r.from("C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W1", "*", "x"))[0]
	r.from(handBackFrom("W1")...)
	r.expect(toWorker("W2", token, "x"))
	r.from("W2", "", "MDPW01", "\x03", token, "", "y")
	r.expect([]string{"C", "", "MDPC01", "echo", "y"})
}

func TestRequestsThatAreHandedBackKeepTheirOrder(t *testing.T) {
	r := newFakeRouter(t)
	workers := []string{"W0", "W1", "W2"}
	for _, w := range workers {
		r.from(w, "", "MDPW01", "\x01", "echo")
	}
	for i := range 5 {
		r.from("C", "", "MDPC01", "echo", fmt.Sprint(i))
	}
	for _, order := range [][]string{{"W0", "W1", "W2"}, {"W2", "W1", "W0"}, {"W1", "W2", "W0"}} {
		r.sent = nil
		for _, w := range order {
			r.from(handBackFrom(w)...)
		}
		for _, w := range workers {
			r.from(w, "", "MDPW01", "\x01", "echo")
		}
		r.expect(toWorker("W0", "*", "0"), toWorker("W1", "*", "1"), toWorker("W2", "*", "2"))
	}
}

func TestWorkerThatHandedARequestBackKeepsItsServiceButGetsNothing(t *testing.T) {
	r := newFakeRouter(t)
	r.from("bservice.1", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo", "x")
	r.from(handBackFrom("bservice.1")...)
	r.from("C", "", "MDPC01", "echo", "y")
	r.sent = nil
	r.from("C", "", "MDPC01", "mmi.service", "echo")
	r.from("C", "", "MDPC01", "mmi.services", "")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "200"},
		[]string{"C", "", "MDPC01", "mmi.services", servicesHeader + "echo\t1\t0\t2\t0\t0\t0\n"})

	// Its requests wait for it longer than for a service that is not there.
	for range 2 * int(r.QueueTTL/r.Heartbeat) {
		r.from("bservice.1", "", "MDPW01", "\x04")
		r.pass(1)
	}
	r.sent = slices.DeleteFunc(r.sent, func(m []string) bool { return slices.Equal(m, heartbeatTo("bservice.1")) })
	r.expect()
	r.from("bservice.1", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("bservice.1", "*", "x"))
}

func TestWorkerThatHandedARequestBackMayLeaveOrFallSilent(t *testing.T) {
	for _, test := range []struct {
		lost  uint64
		leave func(*fakeRouter)
	}{
		{0, func(r *fakeRouter) { r.from("W", "", "MDPW01", "\x05") }},
		{0, func(r *fakeRouter) { r.from(handBackFrom("W")...) }},
		{1, func(r *fakeRouter) { r.pass(6) }},
		{1, func(r *fakeRouter) { r.failed["W"] = errGone; r.pass(1) }},
		{1, func(r *fakeRouter) { r.from("W", "", "MDPW01", "\x01", "other") }},
		{1, func(r *fakeRouter) { r.from("W", "", "MDPW01", "\x03", "token", "", "x") }},
	} {
		r := newFakeRouter(t)
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("C", "", "MDPC01", "echo", "x")
		r.from(handBackFrom("W")...)
		test.leave(r)
		if lost := r.total.counts[lostWorkersTotal]; lost != test.lost || len(r.workers) != 0 {
			t.Errorf("%d workers were lost, want %d; %d are left", lost, test.lost, len(r.workers))
		}
		r.sent = nil
		r.from("V", "", "MDPW01", "\x01", "echo")
		r.expect(toWorker("V", "*", "x"))
	}
}

func TestOtherFramesOfDisconnectMeanNothing(t *testing.T) {
	for _, frames := range [][]string{{}, {"echo"}, {"75"}, {"75", "a", "b"}, {"77", "reason"}, {"", "75", "reason"}} {
		r := newFakeRouter(t)
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("C", "", "MDPC01", "echo", "x")
		r.sent = nil
		r.from(append([]string{"W", "", "MDPW01", "\x05"}, frames...)...)
		r.expectLog(1, "worker left")
		r.from("C", "", "MDPC01", "mmi.service", "echo")
		r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
	}
}

func TestRequestThatIsHandedBackToABrokerThatDrainsIsRefused(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo", "x")
	r.Drain()
	r.sent = nil
	r.from(handBackFrom("W")...)
	r.expect([]string{"C", "", "MDPC01", "echo", "", "*", "exit status 075"})
	r.Stop()
	r.expect(disconnectTo("W"))
}

func TestReplyWithoutAnEmptyFrameIsTaken(t *testing.T) {
	for _, test := range []struct{ body, want []string }{
		{[]string{"a"}, []string{"a"}},
		{[]string{"a", "b"}, []string{"a", "b"}},
		{[]string{"a", "", "b"}, []string{"a", "", "b"}},
		{nil, nil},
	} {
		r := newFakeRouter(t)
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("C", "", "MDPC01", "echo")
		token := r.expect(toWorker("W", "*"))[0]
		r.from(append([]string{"W", "", "MDPW01", "\x03", token}, test.body...)...)
		r.expect(append([]string{"C", "", "MDPC01", "echo"}, test.want...))
	}
}

func TestRegisteredWorkerThatSendsABadMessageIsDisconnected(t *testing.T) {
	for _, message := range [][]string{
		{""}, {"hello"}, {"", "MDPW01"}, {"", "MDPW01", "\x09"}, {"", "MDPW01", "\x01\x01", "echo"}, {"", "MDPW01", "\x03"},
		{"", "MDPW01", "\x03", "body only"}, {"deep", "", "MDPW01", "\x04"}, {"", "MDPC01"},
	} {
		r := newFakeRouter(t)
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("C", "", "MDPC01", "echo")
		r.expect(toWorker("W", "*"))
		r.from(append([]string{"W"}, message...)...)
		r.expect(disconnectTo("W"), []string{"C", "", "MDPC01", "echo", "", "*", "exit status 069"})
	}
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
	r.Tick(r.clock)
	r.expect([]string{"C2", "", "MDPC01", "echo", "", "*", "exit status 075"})
	r.from("C3", "", "MDPC01", "echo", "new")
	r.expect([]string{"C3", "", "MDPC01", "echo", "", "*", "exit status 075"})
	if r.Drained() {
		t.Error("the broker is drained with a request in flight")
	}
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C1", "", "MDPC01", "echo", "done"})
	if !r.Drained() {
		t.Error("the broker is not drained without requests")
	}
}

func TestDrainingBrokerRefusesALimitedNumberAtATimeAndBeginsNone(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxQueue, r.MaxMemory = 2*maxEnded, 1<<30
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "echo", "in flight")
	token := r.expect(toWorker("W", "*", "in flight"))[0]
	for range maxEnded + 10 {
		r.from("C", "", "MDPC01", "echo", "waiting")
	}
	r.Drain()
	if next := r.Tick(r.clock); len(r.sent) != maxEnded || !next.Equal(r.clock) {
		t.Fatalf("%d requests were refused at once, want %d and the rest now", len(r.sent), maxEnded)
	}
	r.sent = nil
	r.from("W", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"C", "", "MDPC01", "echo", "done"})
	if r.Tick(r.clock); len(r.sent) != 10 || !r.Drained() {
		t.Errorf("%d more requests were refused, want 10", len(r.sent))
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
	r.Receive(nil, sender{source: -1}, r.clock)
	r.expect()
	r.expectLog(1, "bad message", "peer=stranger")
	r.expectLog(1, "bad message", "peer=other", "no frame MDPC01")
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
	if len(r.Broker.log.warned) > 101 || strings.Count(r.log.String(), "\n") > 101 {
		t.Errorf("the broker remembers %d strangers", len(r.Broker.log.warned))
	}
	r.pass(61)
	r.expectLog(1, "too many messages to log", "dropped=4900")
	r.from("stranger")
	r.expectLog(1, "bad message", "peer=stranger ")
}

func TestPeersCannotFillTheLog(t *testing.T) {
	r := newFakeRouter(t)
	for range 10_000 {
		r.from("W", "", "MDPW01", "\x01", "echo")
		r.from("W", "", "MDPW01", "\x05")
	}
	if lines := strings.Count(r.log.String(), "\n"); lines > maxEvents {
		t.Errorf("the log has %d lines", lines)
	}
	r.pass(61)
	r.expectLog(1, "too many messages to log", "dropped=19000")
}

func TestNamesInTheLogAreCutOff(t *testing.T) {
	r := newFakeRouter(t)
	name := strings.Repeat("n", maxName)
	r.from("W", "", "MDPW01", "\x01", name)
	r.from(name, "", "MDPC01", name)
	r.pass(6)
	for line := range strings.Lines(r.log.String()) {
		if strings.Contains(line, name) {
			t.Errorf("the log has a long name: %s", line)
		}
	}
	r.expectLog(1, "worker came", "service="+name[:100]+"...")
}

func TestManyRequestsExpireALimitedNumberAtATime(t *testing.T) {
	r := newFakeRouter(t)
	r.MaxQueue, r.MaxMemory = 10_000, 1<<30
	for range maxEnded + 10 {
		r.from("C", "", "MDPC01", "echo")
	}
	r.clock = r.clock.Add(time.Minute)
	if next := r.Tick(r.clock); len(r.sent) != maxEnded || !next.Equal(r.clock) {
		t.Errorf("%d requests expired, and the next tick is due at %v", len(r.sent), next)
	}
	r.sent = nil
	if next := r.Tick(r.clock); len(r.sent) != 10 || !next.After(r.clock) {
		t.Errorf("%d more requests expired, and the next tick is due at %v", len(r.sent), next)
	}
}

// FuzzBroker lets several peers of both versions send any message, become unreachable and fall silent. After
// each step it checks the invariants of the broker. Two bytes of the input are a step.
func FuzzBroker(f *testing.F) {
	f.Add([]byte("\x00\x00\x01\x00\x02\x00"))                                         // a worker, a request, its reply
	f.Add([]byte("\x01\x00\x01\x10\x00\x00\x05\x00\x00\x01\x02\x01\x02\x01"))         // the worker leaves, another gets the request
	f.Add([]byte("\x00\x00\x01\x00\x06\x00\x07\x00\x00\x01\x08\x00\x07\x01"))         // the worker is lost, requests are cancelled and expire
	f.Add([]byte("\x00\x00\x01\x00\x0e\x00\x00\x01\x0e\x01\x00\x00\x02\x00"))         // workers hand a request back, one of them takes it again
	f.Add([]byte("\x00\x00\x0f\x00\x11\x00\x11\x00\x12\x01\x11\x40\x0c\x00\x02\x00")) // a stream with credit, and its end
	f.Add([]byte("\x00\x01\x0f\x01\x11\xc1\x07\x01\x0c\x01\x07\x01\x13\x01"))         // a stream that breaks
	f.Add([]byte("\x10\x02\x01\x02\x11\x42\x11\x42\x13\x02\x0f\x02\x08\x02"))         // parts for a client of MDP/0.1, and a stream that is cancelled
	f.Fuzz(func(t *testing.T, steps []byte) {
		b := &brokerWorld{fakeRouter: newFakeRouter(t), held: map[string]string{}, number: map[string]string{}, parts: map[string]int{}, passed: map[string]int{}, ended: map[string]int{}}
		b.Redeliver = 1
		b.MaxQueue = 3
		b.MaxMemory = 12000
		b.fakeRouter.record = b.recordMessage
		for ; len(steps) >= 2; steps = steps[2:] {
			b.step(steps[0], steps[1])
			b.check()
		}
		b.Stop()
		b.check()
		if b.unfinished != 0 {
			t.Errorf("%d requests were not answered", b.unfinished)
		}
		counts := b.total.counts
		unsent := counts[droppedRepliesTotal] - b.undelivered // to clients that do not read
		if ended := uint64(len(b.ended)) - b.late + unsent + counts[cancelledTotal] + counts[abandonedTotal]; ended != counts[requestsTotal] {
			t.Errorf("%d requests were received, but %d ended", b.total.counts[requestsTotal], ended)
		}
	})
}

// A brokerWorld is the world around a broker.
type brokerWorld struct {
	*fakeRouter
	held   map[string]string // the token of the last request, by worker
	number map[string]string // of the request, by token
	parts  map[string]int    // that workers sent, by token
	passed map[string]int    // parts that clients got, by number
	ended  map[string]int    // how many replies were sent, delivered or not, by number
	count  int               // steps so far

	undelivered uint64 // replies to requests
	late        uint64 // ends of streams that broke
}

// recordMessage stands for the socket of the broker. A number in the address identifies each request.
func (b *brokerWorld) recordMessage(frames [][]byte) error {
	peer, failed := string(frames[0]), b.failed[string(frames[0])]
	m, err := Parse(frames[1:])
	if err != nil {
		b.t.Fatalf("the broker sent %q: %v", frames, err)
	}
	if q := b.queues[peer]; q != nil && failed == nil {
		q.bytes += costOf(frames)
	}
	switch {
	case m.Kind == KindRequest && !m.Dialect.ofClient():
		if failed == nil {
			token := string(m.Client[0])
			b.held[peer], b.number[token] = token, string(m.Body[0])
		}
	case m.Dialect.ofClient() && len(m.Address) > 0 && !isManagement(string(m.Service)):
		number := string(m.Address[0])
		for _, frame := range m.Body {
			if body, isPart := strings.CutPrefix(string(frame), "part "); isPart && failed == nil {
				if b.passed[number]++; body != fmt.Sprint(number, " ", b.passed[number]) {
					b.t.Fatalf("request %s got part %s as its part %d", number, body, b.passed[number])
				}
			}
		}
		if b.ended[number] > 0 {
			b.t.Fatalf("request %s got a %v after its end", number, m.Kind)
		}
		if m.Kind == KindPartial {
			break
		}
		b.ended[number]++
		switch isLate := bytes.Contains(bytes.Join(m.Body, nil), []byte("the stream broke")); {
		case isLate:
			b.late++
			if failed == errWouldBlock {
				b.ended[number]-- // It is sent again.
				b.late--
				delete(b.ended, number)
			}
		case failed != nil:
			b.undelivered++
			if m.Dialect.hasPartials() && failed == errWouldBlock {
				delete(b.ended, number) // Its end may follow.
				b.undelivered--
			}
		}
	}
	return failed
}

func (b *brokerWorld) step(what, who byte) {
	worker := fmt.Sprintf("W%d", who%4)
	if who%2 == 0 {
		worker = workerPrefix + worker
	}
	client := fmt.Sprintf("C%d", who%3)
	service := fmt.Sprintf("s%d", who>>4%3)
	b.count++
	request := func(protocol ...string) {
		source := int(who % 3)
		if !b.knows(source, []byte(client)) {
			b.Disconnected(source, b.clock)
		}
		number := fmt.Sprint("#", b.count)
		message := append(append([]string{client, number}, protocol...), service, number, strings.Repeat("x", int(who)))
		b.Receive(frames(message...), sender{source: source}, b.clock)
	}
	switch what % 20 {
	case 0:
		b.from(worker, "", "MDPW01", "\x01", service)
	case 1, 10:
		request("", "MDPC01")
	case 2, 11:
		b.from(worker, "", "MDPW01", "\x03", b.held[worker], "", "done")
	case 3:
		b.from(worker, "", "MDPW01", "\x03", b.held["W1"], "", "forged")
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
	case 12: // It reads what it was sent.
		for _, peer := range []string{worker, client} {
			if q := b.queues[peer]; q != nil {
				q.bytes = 0
			}
		}
		b.ClientsHaveRead()
	case 13:
		b.Disconnected(int(who%3), b.clock)
	case 14:
		b.from(worker, "", "MDPW01", "\x05", "75", "busy")
	case 15:
		request("MDPC02", "\x01")
	case 16:
		b.from(worker, "MDPW02", "\x01", service, []string{"", cancels}[who>>6%2])
	case 17: // parts of a reply
		token := b.held[worker]
		for range 1 + who>>4 {
			if b.workers[worker] == nil || b.workers[worker].request == nil || string(b.workers[worker].request.token) != token {
				b.from(worker, "MDPW02", "\x03", token, "", "out of turn")
				break
			}
			b.parts[token]++
			b.from(worker, "MDPW02", "\x03", token, "", fmt.Sprint("part ", b.number[token], " ", b.parts[token]))
		}
	case 18:
		b.from(client, b.number[b.held[worker]], "MDPC02", "\x01", "mmi.credit", fmt.Sprint(who>>4))
	case 19:
		b.from(worker, "MDPW02", "\x04", b.held[worker], "", "done")
	case 9:
		bad := [][]string{{""}, {"", "MDPC01"}, {"", "MDPC01", ""}, {"", "MDPW01", "\x09"}, {"MDPW01", "\x05"},
			{"", "MDPC01", "mmi.metrics"}, {"", "MDPC01", "mmi.services"}, {"", "MDPW01", "\x02", "", "x"},
			{"", "MDPW01", "\x03"}, {"", "MDPW01", "\x03", b.held[worker], "no delimiter"}, {"", "MDPW01", "\x01\x01"},
			{"", "MDPC01", strings.Repeat("n", maxName+1)}, append(slices.Repeat([]string{"a"}, maxAddress), "", "MDPC01", "s0"),
			{"MDPC02", "\x02", "s0", "x"}, {"MDPW02", "\x07", b.held[worker], "", "1"}, {"", "MDPC02", "\x01", "mmi.credit", "-1"}}
		b.from(append([]string{worker}, bad[int(who>>2)%len(bad)]...)...)
	}
}

// check checks the invariants of the broker.
func (b *brokerWorld) check() {
	b.t.Helper()
	waiting := map[*brokerRequest]bool{}
	workers, elsewhere := map[*brokerService]int{}, map[*brokerService]int{}
	unserved := 0
	for _, w := range b.workers {
		workers[w.service]++
		states := 0
		for _, is := range []bool{w.request != nil, w.idleElement != nil, w.elsewhere} {
			if is {
				states++
			}
		}
		if states != 1 {
			b.t.Fatalf("worker %s is in %d of the states busy, idle and elsewhere", w.identity, states)
		}
		if w.elsewhere {
			elsewhere[w.service]++
		}
		if b.services[w.service.name] != w.service {
			b.t.Fatalf("the service of worker %s is not known", w.identity)
		}
	}
	for name, s := range b.services {
		if s.workers == 0 && s.waiting == 0 && !b.Broker.now.Before(s.returning) {
			b.t.Fatalf("service %s has neither workers nor requests", name)
		}
		if s.workers != workers[s] || s.elsewhere != elsewhere[s] {
			b.t.Fatalf("service %s has %d workers, %d elsewhere, but counts %d and %d", name, workers[s], elsewhere[s], s.workers, s.elsewhere)
		}
		if s.idle.Len() > 0 && s.waiting > 0 {
			b.t.Fatalf("service %s has idle workers and waiting requests", name)
		}
		if s.workers == 0 {
			unserved++
		}
		if s.turns.Len() != len(s.queues) {
			b.t.Fatalf("service %s has %d queues and %d turns", name, len(s.queues), s.turns.Len())
		}
		queued := 0
		for c, q := range s.queues {
			if q.requests.Len() == 0 || q.client != c {
				b.t.Fatalf("service %s has an empty queue, or that of another client", name)
			}
			queued += q.requests.Len()
			for e := q.requests.Front(); e != nil; e = e.Next() {
				r := e.Value.(*brokerRequest)
				if r.inQueue != e || r.client != c || r.service != s || waiting[r] {
					b.t.Fatalf("request %q is queued twice or in the wrong place", r.address)
				}
				waiting[r] = true
			}
		}
		if queued != s.waiting {
			b.t.Fatalf("service %s counts %d waiting requests, but has %d", name, s.waiting, queued)
		}
	}
	if b.unserved != unserved {
		b.t.Fatalf("the broker counts %d services without workers, but has %d", b.unserved, unserved)
	}
	all, recallable := maps.Clone(waiting), maps.Clone(waiting)
	for _, w := range b.workers {
		r := w.request
		if r == nil || r.ended {
			continue
		}
		if waiting[r] || r.inQueue != nil || r.worker != w {
			b.t.Fatalf("request %q is both waiting and in flight, or with two workers", r.address)
		}
		if r.onTheWay < 0 || r.onTheWay > r.window && w.isOurs && r.partials {
			b.t.Fatalf("request %q has %d parts on their way", r.address, r.onTheWay)
		}
		all[r] = true
		if r.partials || w.cancels {
			recallable[r] = true
		}
	}
	for _, c := range b.clients {
		for _, r := range c.owed {
			if all[r] || !r.ended {
				b.t.Fatalf("the end of request %q is owed, but it goes on", r.address)
			}
			all[r] = true
		}
	}
	held := map[*brokerClient]size{}
	total, addressed := size(0), 0
	for r := range all {
		held[r.client] += r.cost
		total += r.cost
		if number := string(r.address[1]); b.ended[number] > 0 {
			b.t.Fatalf("request %s ended, but is still there", number)
		}
	}
	for _, c := range b.clients {
		if c.held != held[c] {
			b.t.Fatalf("client %s counts %d bytes, but holds %d", c.identity, c.held, held[c])
		}
		if c.held > b.MaxMemory/clientShare {
			b.t.Fatalf("client %s holds %d bytes, more than its share", c.identity, c.held)
		}
		for _, r := range c.recallable.all(nil) {
			addressed++
			if !recallable[r] || r.client != c {
				b.t.Fatalf("request %q has an address, but cannot be recalled", r.address)
			}
		}
	}
	if b.unfinished != len(all) || b.Broker.held != total || addressed != len(recallable) {
		b.t.Fatalf("the broker counts %d requests of %d bytes, but has %d of %d; %d have an address, and %d can be recalled",
			b.unfinished, b.Broker.held, len(all), total, addressed, len(recallable))
	}
	// Heartbeats and small replies go out however much is held.
	if total > b.MaxMemory {
		b.t.Fatalf("the broker holds %d bytes", total)
	}
}

// discard is an outlet that passes messages to a function, and knows nothing of its peers.
type discard func(frames [][]byte) error

func (d discard) send(frames [][]byte, _ peerQueue) error { return d(frames) }
func (discard) newQueue() peerQueue                       { return &fakeQueue{} }
func (discard) queued() size                              { return 0 }
func (discard) received(int) uint64                       { return 0 }
func (discard) updateConnections()                        {}

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
			broker := NewBroker(flags, now, discard(func(frames [][]byte) error {
				if len(frames) > 5 && string(frames[2]) == "MDPW01" {
					worker, token = frames[0], frames[4]
				}
				return nil
			}), noLog)
			for i := range load.services - 1 {
				broker.Receive(frames(fmt.Sprint("V", i), "", "MDPW01", "\x01", fmt.Sprint("other", i)), sender{source: -1}, now)
			}
			for i := range load.workers {
				broker.Receive(frames(fmt.Sprint("W", i), "", "MDPW01", "\x01", "echo"), sender{source: -1}, now)
			}
			for i := range load.waiting {
				broker.Receive(frames(fmt.Sprint("C", i), "", "MDPC01", "later", "hello"), sender{source: -1}, now)
			}
			request := frames("C", "", "MDPC01", "echo", "hello")
			reply := frames("", "", "MDPW01", "\x03", "", "", "hello")
			b.ReportAllocs()
			for b.Loop() {
				broker.Receive(request, sender{source: -1}, now)
				reply[0], reply[4] = worker, token
				broker.Receive(reply, sender{source: -1}, now)
			}
			if replies := broker.total.counts[repliesTotal]; replies != uint64(b.N) {
				b.Fatalf("%d replies to %d requests", replies, b.N)
			}
		})
	}
}

// ZeroMQ takes an identity of any length. The broker would hold it in memory for a while.
func TestPeerWithALongIdentityIsIgnored(t *testing.T) {
	r := newFakeRouter(t)
	long := strings.Repeat("i", maxIdentity+1)
	r.from(long, "", "MDPC01", "mmi.service", "echo")
	r.from(long, "", "MDPW01", "\x01", "echo")
	r.from(long, "", "junk")
	r.expect()
	if len(r.clients)+len(r.workers)+len(r.sources) > 0 {
		t.Error("the broker remembers the identity")
	}
	r.expectLog(1, "messages ignored", "more than 255 bytes")
	r.from(long[1:], "", "MDPC01", "mmi.service", "echo")
	r.expect([]string{long[1:], "", "MDPC01", "mmi.service", "404"})
}

// It has reserved a job for the request that its READY may bring.
func TestWorkerThatComesBackLearnsThatThereIsNoRequest(t *testing.T) {
	r := newFakeRouter(t)
	ready := []string{"W", "", "MDPW01", "\x01", "echo"}
	r.from(ready...)
	r.from("C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.from(handBackFrom("W")...)
	r.from(ready...)
	if again := r.expect(toWorker("W", "*", "x"))[0]; again != token {
		t.Errorf("the token is %q, want %q", again, token)
	}
	r.from(handBackFrom("W")...)
	r.from("C", "", "MDPC01", "mmi.cancel", "")
	r.expect([]string{"C", "", "MDPC01", "mmi.cancel", "200"})
	r.from(ready...)
	r.expect([]string{"W", "", "MDPW01", "\x04"})
}
