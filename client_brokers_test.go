package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A fakeSearch is a search whose attempts do what the test says, under a clock that goes only when told to.
type fakeSearch struct {
	search
	t     *testing.T
	clock time.Time
	begun []string // since the last call of expect
}

// newFakeSearch returns a search among brokers that have letters as endpoints.
func newFakeSearch(t *testing.T, letters string) *fakeSearch {
	f := &fakeSearch{t: t, clock: time.Unix(0, 0)}
	var addresses []brokerAddress
	for _, letter := range letters {
		addresses = append(addresses, brokerAddress{endpoint: string(letter)})
	}
	f.search = newSearch(addresses)
	f.pass(0)
	return f
}

func (f *fakeSearch) pass(d time.Duration) {
	f.clock = f.clock.Add(d)
	for k := f.next(f.clock); k != nil; k = f.next(f.clock) {
		f.begun = append(f.begun, k.address.endpoint)
	}
	if due := f.deadline(f.clock); !due.IsZero() && !due.After(f.clock) {
		f.t.Fatalf("the deadline %v is over at %v", due, f.clock)
	}
}

// at lets something happen to the attempt of a broker.
func (f *fakeSearch) at(letter string, event func(k *candidate)) {
	f.t.Helper()
	i := slices.IndexFunc(f.search, func(k *candidate) bool { return k.address.endpoint == letter })
	if f.search[i].begun.IsZero() {
		f.t.Fatalf("the attempt of %s has not begun", letter)
	}
	event(f.search[i])
	f.pass(0)
}

func (f *fakeSearch) refuses(letter string) { f.at(letter, (*candidate).lose) }
func (f *fakeSearch) serves(letter string)  { f.at(letter, func(k *candidate) { k.decide(true) }) }
func (f *fakeSearch) lacks(letter string)   { f.at(letter, func(k *candidate) { k.decide(false) }) }
func (f *fakeSearch) fails(letter string) {
	f.at(letter, func(k *candidate) { k.fail(errors.New(letter + " failed")) })
}

// expect checks which attempts began since the last time, and which broker is found, "" for none.
func (f *fakeSearch) expect(begun, found string) {
	f.t.Helper()
	got := ""
	if k := f.found(f.clock); k != nil {
		got = k.address.endpoint
	}
	if strings.Join(f.begun, "") != begun || got != found {
		f.t.Fatalf("the attempts of %q began and %q was found, want %q and %q", f.begun, got, begun, found)
	}
	f.begun = nil
}

func TestFirstBrokerThatServesIsFoundAlone(t *testing.T) {
	f := newFakeSearch(t, "abc")
	f.expect("a", "")
	f.pass(overlap - 1)
	f.expect("", "")
	f.serves("a")
	if f.expect("b", "a"); f.failure() != nil {
		t.Error("the search failed")
	}
}

func TestNextBrokerIsTriedAfterAWhileOrAtOnceWhenOneRefuses(t *testing.T) {
	f := newFakeSearch(t, "abcd")
	f.expect("a", "")
	f.pass(overlap)
	f.expect("b", "")
	f.refuses("b")
	f.expect("c", "")
	f.fails("c")
	f.expect("d", "")
	f.pass(time.Hour)
	f.expect("", "")
	// Any of them may still come up, but for the one that failed.
	f.serves("b")
	f.expect("", "b")
}

func TestBrokersMayComeUpInAnyOrder(t *testing.T) {
	for _, letter := range []string{"a", "b", "c"} {
		f := newFakeSearch(t, "abc")
		f.pass(overlap)
		f.pass(overlap)
		f.expect("abc", "")
		f.serves(letter)
		f.expect("", letter)
	}
}

func TestBrokerWhereNobodyServesIsPassedOver(t *testing.T) {
	f := newFakeSearch(t, "abc")
	f.lacks("a")
	f.expect("ab", "")
	f.lacks("b")
	f.expect("c", "")
	f.serves("c")
	f.expect("", "c")
}

func TestRequestWaitsAtTheFirstBrokerIfNobodyServesAnywhere(t *testing.T) {
	f := newFakeSearch(t, "abc")
	f.refuses("a")
	f.lacks("b")
	f.lacks("c")
	f.expect("abc", "b")

	// One that is lost meanwhile is none of them.
	f = newFakeSearch(t, "abc")
	f.lacks("a")
	f.lacks("b")
	f.refuses("a")
	f.refuses("c")
	f.expect("abc", "b")

	// One that says nothing is waited for, but not for long.
	f = newFakeSearch(t, "abc")
	f.lacks("a")
	f.lacks("b")
	f.expect("abc", "")
	f.pass(farthest - 1)
	f.expect("", "")
	f.pass(1)
	f.expect("", "a")
}

func TestBrokerThatStopsIsNotTriedForAWhile(t *testing.T) {
	f := &fakeSearch{t: t, clock: time.Unix(0, 0), search: newSearch([]brokerAddress{{endpoint: "a"}, {endpoint: "b"}})}
	f.search[1].rests = f.clock.Add(restTime)
	f.pass(0)
	f.refuses("a")
	f.pass(restTime - 1)
	f.expect("a", "")
	if due := f.deadline(f.clock); !due.Equal(f.search[1].rests) {
		t.Errorf("the deadline is %v, want %v", due, f.search[1].rests)
	}
	f.pass(1)
	f.expect("b", "")
	f.serves("b")
	f.expect("", "b")
}

func TestSearchFailsWhenAllBrokersHaveFailedForGood(t *testing.T) {
	f := newFakeSearch(t, "abc")
	f.fails("a")
	f.refuses("b")
	f.fails("c")
	if f.failure() != nil {
		t.Error("the search failed, but one broker may come up")
	}
	f.fails("b")
	if err := f.failure(); err == nil || err.Error() != "a failed" {
		t.Errorf("the search failed with %v", err)
	}
	f.expect("abc", "")
}

// When there are other brokers, what has not begun does not stay with one that is lost or stops.
func TestCallsGoElsewhereWhenTheirBrokerIsLost(t *testing.T) {
	f := newFakeConnection(t, true)
	f.several = true
	f.call("begun", 0, 0)
	f.call("again", 0, 1)
	f.up()
	f.expect(numbered("1.1", "begun"), numbered("2.1", "again"))
	f.breaks()
	f.expectEnded(`begun: lost the broker at tcp://broker before its reply`)
	if !f.left {
		t.Error("the broker was not left")
	}
	f.pass(time.Second)
	f.expect(numbered("2.2", "again"))
	f.left = false

	// An idle connection is not kept either.
	f.from("2.2", "", "MDPC01", "again", "x")
	f.breaks()
	if !f.left || f.conn != nil {
		t.Error("the connection to a broker that is gone was kept")
	}
	f.expectEnded(`again: ["x"] 0`)
}

func TestCallThatABrokerRefusesBecauseItStopsGoesToAnother(t *testing.T) {
	stopping := func(n string) []string {
		return []string{n, "", "MDPC01", "a", "", "bbroker: a: " + shuttingDown + "\n", "exit status 075"}
	}
	f := newFakeConnection(t, true)
	f.several = true
	f.call("a", time.Minute, 0)
	f.call("b", time.Minute, 0)
	f.up()
	f.expect(numbered("1.1", "a"), numbered("2.1", "b"))
	f.from(stopping("1.1")...)
	f.expect() // It stays until the other one has its reply.
	f.from("2.1", "", "MDPC01", "b", "x")
	f.expectEnded(`b: ["x"] 0`)
	f.expect(numbered("1.1", "a"))
	if !f.left || f.opened != 2 {
		t.Errorf("the call was sent over %d connections", f.opened)
	}

	// Its timeout goes on, and a single broker is not left.
	f.from(stopping("1.1")...)
	f.pass(time.Minute)
	if len(f.ended) != 1 {
		t.Errorf("the call did not end: %q", f.ended)
	}
	f = newFakeConnection(t, true)
	f.call("a", time.Minute, 0)
	f.up()
	f.from(stopping("1.1")...)
	if f.left || len(f.ended) != 1 {
		t.Errorf("the calls that ended are %q", f.ended)
	}
}

func TestBrokerThatConfirmsNoCancelIsLeft(t *testing.T) {
	f := newFakeConnection(t, true)
	f.several = true
	f.call("slow", time.Second, 0)
	f.call("other", 0, 0)
	f.up()
	f.expect(numbered("1.1", "slow"), numbered("2.1", "other"))
	f.pass(time.Second)
	f.expect(numberedCancel("1.1"))
	f.expectEnded("slow: no reply from tcp://broker within 1s")
	if due := f.deadline(); !due.Equal(f.clock.Add(brokerPatience)) {
		t.Errorf("the next deadline is %v", due)
	}
	f.pass(brokerPatience)
	f.expectEnded("other: lost the broker at tcp://broker before its reply")
	if !f.left {
		t.Error("the broker was not left")
	}

	// One that confirms it is alive.
	f = newFakeConnection(t, true)
	f.several = true
	f.call("slow", time.Second, 0)
	f.call("other", 0, 0)
	f.up()
	f.pass(time.Second)
	f.from("1.1", "", "MDPC01", "mmi.cancel", "404")
	f.pass(time.Hour)
	f.expectEnded("slow: no reply from tcp://broker within 1s")
}

// A fakeBroker is a ROUTER that spells the frames out.
type fakeBroker struct {
	peer
	endpoint string
}

func newFakeBroker(t *testing.T) fakeBroker {
	p, endpoint := bindPeer(t)
	return fakeBroker{p, endpoint}
}

// tells answers the question whether somebody serves the name.
func (b fakeBroker) tells(service, code string) {
	b.t.Helper()
	message := b.recv()
	b.want(message, message[0], "", "MDPC01", "mmi.service", service)
	b.send(message[0], "", "MDPC01", "mmi.service", code)
}

// replies answers a request, and checks that nobody was asked more.
func (b fakeBroker) replies(service, body, reply string) {
	b.t.Helper()
	message := b.recv()
	b.want(message, message[0], "", "MDPC01", service, body)
	b.send(message[0], "", "MDPC01", service, reply)
}

// nothing checks that no message has come.
func (b fakeBroker) nothing() {
	b.t.Helper()
	if message, err := b.RecvMessage(zmq.DONTWAIT); err == nil {
		b.t.Errorf("%s received %q", b.endpoint, message)
	}
}

// silentEndpoint returns an endpoint where connections are accepted by the kernel, and nobody answers.
func silentEndpoint(t *testing.T) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return "tcp://" + listener.Addr().String()
}

// deadEndpoint returns an endpoint where connections are refused.
func deadEndpoint(t *testing.T) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return "tcp://" + listener.Addr().String()
}

// ask sends a request for a service "s" with a client that knows brokers, and returns what comes of it, as text.
func ask(client *Client) <-chan string {
	outcome := make(chan string, 1)
	go func() {
		reply, err := client.Send("s", frames("x"), 20*time.Second)
		outcome <- fmt.Sprint(spell(reply.Output), err)
	}()
	return outcome
}

func newClientOf(t *testing.T, endpoints ...string) *Client {
	var brokers []brokerAddress
	for _, endpoint := range endpoints {
		brokers = append(brokers, brokerAddress{endpoint: endpoint})
	}
	client := newClient(context.Background(), brokers)
	client.service = "s"
	t.Cleanup(client.Disconnect)
	return client
}

func expectOutcome(t *testing.T, outcome <-chan string, want string) {
	t.Helper()
	if got := <-outcome; got != want {
		t.Fatalf("the outcome is %q, want %q", got, want)
	}
}

func TestRequestGoesToTheFirstBrokerOnly(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	client := newClientOf(t, first.endpoint, second.endpoint)
	outcome := ask(client)
	first.tells("s", "200")
	first.replies("s", "x", "done")
	expectOutcome(t, outcome, "[done] <nil>")
	second.nothing()

	// The next one goes there, too.
	outcome = ask(client)
	first.replies("s", "x", "again")
	expectOutcome(t, outcome, "[again] <nil>")
	second.nothing()
}

func TestRequestPassesOverBrokersThatCannotTakeIt(t *testing.T) {
	for name, endpoint := range map[string]func(*testing.T) string{
		"refused":         deadEndpoint,
		"silent":          silentEndpoint,
		"no file":         func(t *testing.T) string { return "ipc://" + t.TempDir() + "/nobody" },
		"no name":         func(t *testing.T) string { return "tcp://name.invalid:5555" },
		"answers nothing": func(t *testing.T) string { return newFakeBroker(t).endpoint },
	} {
		t.Run(name, func(t *testing.T) {
			second, third := newFakeBroker(t), newFakeBroker(t)
			outcome := ask(newClientOf(t, endpoint(t), second.endpoint, third.endpoint))
			second.tells("s", "404")
			third.tells("s", "501") // It does not know.
			third.replies("s", "x", "done")
			expectOutcome(t, outcome, "[done] <nil>")
			second.nothing()
		})
	}
}

func TestRequestWaitsAtTheFirstBrokerThatIsThere(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	outcome := ask(newClientOf(t, deadEndpoint(t), first.endpoint, second.endpoint))
	first.tells("s", "404")
	second.tells("s", "404")
	first.replies("s", "x", "late")
	expectOutcome(t, outcome, "[late] <nil>")
	second.nothing()
}

func TestRequestThatMayHaveStartedIsNotSentAgainAndTheNextGoesToTheNextBroker(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	client := newClientOf(t, first.endpoint, second.endpoint)
	outcome := ask(client)
	first.tells("s", "200")
	message := first.recv()
	first.want(message, message[0], "", "MDPC01", "s", "x")
	first.Close()
	expectOutcome(t, outcome, "[] lost the broker at "+first.endpoint+" before its reply")
	second.nothing()

	outcome = ask(client)
	second.tells("s", "200")
	second.replies("s", "x", "done")
	expectOutcome(t, outcome, "[done] <nil>")
}

func TestErrorNamesAllBrokersThatCannotBeReached(t *testing.T) {
	a, b := deadEndpoint(t), silentEndpoint(t)
	client := newClientOf(t, a, b)
	_, err := client.Send("s", frames("x"), 300*time.Millisecond)
	if want := fmt.Sprintf("no broker at %s, %s within 300ms", a, b); !errors.Is(err, errNoBroker) || err.Error() != want {
		t.Errorf("the error is %v, want %s", err, want)
	}
	client = newClientOf(t, "tcp://a.invalid:1", "tcp://b.invalid:1") // the reason of the first, at once
	if _, err := client.Send("s", frames("x"), 20*time.Second); !errors.Is(err, errLookUp) || !strings.Contains(err.Error(), "a.invalid") {
		t.Errorf("the error is %v", err)
	}
}

func TestBatchGoesOnWithTheNextBroker(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	client := newClientOf(t, first.endpoint, second.endpoint)
	client.Correlate()
	calls := map[string]*call{}
	for _, name := range []string{"a", "b"} {
		calls[name] = &call{service: "s", body: frames(name), retries: 1}
		client.Begin(calls[name])
	}
	replied, all := make(chan bool), make(chan bool)
	go func() {
		for left := len(calls); left > 0; {
			ended, err := client.Await(time.Time{})
			if err != nil {
				t.Error(err)
			}
			left -= len(ended)
			if slices.Contains(ended, calls["b"]) {
				close(replied)
			}
		}
		close(all)
	}()
	first.tells("s", "200")
	message := first.recv()
	first.want(message, message[0], "1.1", "", "MDPC01", "s", "a")
	first.want(first.recv(), message[0], "2.1", "", "MDPC01", "s", "b")
	first.send(message[0], "2.1", "", "MDPC01", "s", "of the first")
	<-replied
	first.Close()
	second.tells("s", "200")
	message = second.recv()
	second.want(message, message[0], "1.2", "", "MDPC01", "s", "a")
	second.send(message[0], "1.2", "", "MDPC01", "s", "of the second")
	<-all
	for name, want := range map[string]string{"a": "[of the second] <nil>", "b": "[of the first] <nil>"} {
		if got := fmt.Sprint(spell(calls[name].reply.Output), calls[name].err); got != want {
			t.Errorf("%s ended with %s, want %s", name, got, want)
		}
	}
}

// The only broker that is there refuses requests until it ends. It must not be asked all the time.
func TestBrokerThatStopsIsAskedOnceASecond(t *testing.T) {
	broker := newFakeBroker(t)
	outcome := ask(newClientOf(t, deadEndpoint(t), broker.endpoint))
	var refused time.Time
	for range 3 {
		broker.tells("s", "200")
		if took := time.Since(refused); took < restTime {
			t.Errorf("the broker was asked again after %v", took)
		}
		message := broker.recv()
		refused = time.Now()
		broker.send(message[0], "", "MDPC01", "s", "", "bbroker: s: "+shuttingDown+"\n", "exit status 075")
	}
	broker.tells("s", "200")
	broker.replies("s", "x", "done")
	expectOutcome(t, outcome, "[done] <nil>")
}

// The broker that has the service may be far away.
func TestRequestGoesToABrokerThatAnswersLate(t *testing.T) {
	near, far := newFakeBroker(t), newFakeBroker(t)
	outcome := ask(newClientOf(t, near.endpoint, far.endpoint))
	near.tells("s", "404")
	time.Sleep(farthest / 2)
	far.tells("s", "200")
	far.replies("s", "x", "done")
	expectOutcome(t, outcome, "[done] <nil>")
	near.nothing()
}

// With a short timeout, a silent broker must not keep the request from the one that is there.
func TestRequestWithAShortTimeoutWaitsAtTheBrokerThatIsThere(t *testing.T) {
	near := newFakeBroker(t)
	client := newClientOf(t, near.endpoint, silentEndpoint(t))
	timedOut := make(chan error)
	go func() {
		_, err := client.Send("s", frames("x"), 600*time.Millisecond)
		timedOut <- err
	}()
	near.tells("s", "404")
	near.want(near.recv()[1:], "", "MDPC01", "s", "x")
	if err := <-timedOut; !errors.Is(err, errTimeout) {
		t.Errorf("the error is %v, want %v", err, errTimeout)
	}
}

// The search asks again when a connection broke. The first answer may come nevertheless.
func TestLateAnswerToTheSearchIsNotTakenForAReply(t *testing.T) {
	for _, correlated := range []bool{false, true} {
		broker := newFakeBroker(t)
		client := newClientOf(t, broker.endpoint, deadEndpoint(t))
		client.correlated = correlated
		outcome := ask(client)
		broker.tells("s", "200")
		message := broker.recv()
		address := message[:slices.Index(message, "")]
		broker.send(message[0], "", "MDPC01", "mmi.service", "200")
		broker.send(append(address, "", "MDPC01", "s", "done")...)
		expectOutcome(t, outcome, "[done] <nil>")
	}
}

// newBatch begins calls with a correlation, and returns a channel that tells how each ended.
func newBatch(t *testing.T, client *Client, timeout time.Duration, names ...string) <-chan string {
	client.Correlate()
	for _, name := range names {
		client.Begin(&call{service: "s", body: frames(name), timeout: timeout, retries: 0})
	}
	ended := make(chan string, len(names))
	go func() {
		for left := len(names); left > 0; {
			calls, err := client.Await(time.Time{})
			if err != nil {
				t.Error(err)
				return
			}
			for _, c := range calls {
				ended <- fmt.Sprint(spell(c.reply.Output), c.err)
			}
			left -= len(calls)
		}
	}()
	return ended
}

func TestCallsThatWaitDoNotStayWithABrokerThatStops(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	ended := newBatch(t, newClientOf(t, first.endpoint, second.endpoint), 0, "a", "b")
	first.tells("s", "200")
	identity := first.recv()[0]
	first.want(first.recv(), identity, "2.1", "", "MDPC01", "s", "b")
	first.send(identity, "2.1", "", "MDPC01", "s", "", "bbroker: s: "+shuttingDown+"\n", "exit status 075")
	second.tells("s", "200")
	message := second.recv()
	second.want(message, message[0], "1.1", "", "MDPC01", "s", "b")
	second.send(message[0], "1.1", "", "MDPC01", "s", "of the second")
	expectOutcome(t, ended, "[of the second] <nil>")
	first.send(identity, "1.1", "", "MDPC01", "s", "of the first")
	expectOutcome(t, ended, "[of the first] <nil>")
}

// A broker that is frozen confirms no cancel. What has not begun then goes to the next one.
func TestCallsThatWaitDoNotStayWithABrokerThatIsFrozen(t *testing.T) {
	first, second := newFakeBroker(t), newFakeBroker(t)
	client := newClientOf(t, first.endpoint, second.endpoint)
	client.Correlate()
	slow := &call{service: "s", body: frames("slow"), timeout: 200 * time.Millisecond}
	client.Begin(slow)
	for !slow.ended {
		if _, err := client.Await(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if message, err := first.RecvMessage(zmq.DONTWAIT); err == nil && message[3] == "mmi.service" {
			first.send(message[0], "", "MDPC01", "mmi.service", "200")
		}
	}
	ended := newBatch(t, client, 20*time.Second, "next")
	second.tells("s", "200")
	message := second.recv()
	second.send(message[0], message[1], "", "MDPC01", "s", "of the second")
	expectOutcome(t, ended, "[of the second] <nil>")
}
