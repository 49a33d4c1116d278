package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

func TestClientWorksWithAThirdPartyBroker(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	if client.Endpoint() != endpoint {
		t.Errorf("Endpoint() = %q, want %q", client.Endpoint(), endpoint)
	}
	for range 2 { // over the same connection
		received := answerOnce(broker, func(request []string) []string {
			return []string{request[0], "", "MDPC01", "echo", "good", "", "\x00\xff"}
		})
		reply, err := client.Send("echo", frames("hello", ""), 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		request := <-received
		broker.want(request[1:], "", "MDPC01", "echo", "hello", "")
		if !strings.HasPrefix(request[0], "brequest.") {
			t.Errorf("the identity %q does not begin with brequest.", request[0])
		}
		broker.want(spell(reply.Body()), "good", "", "\x00\xff")
	}
}

func TestClientTellsNoBrokerFromNoReply(t *testing.T) {
	client := NewClient(context.Background(), "ipc://"+t.TempDir()+"/nobody")
	if _, err := client.Send("echo", nil, 50*time.Millisecond); !errors.Is(err, errNoBroker) {
		t.Errorf("without a broker: %v", err)
	}

	broker, endpoint := bindPeer(t)
	client = NewClient(context.Background(), endpoint)
	received := answerOnce(broker, func([]string) []string { return nil })
	if _, err := client.Send("echo", nil, time.Second); !errors.Is(err, errTimeout) {
		t.Errorf("without a reply: %v", err)
	}
	if <-received == nil {
		t.Error("the request did not reach the broker")
	}
}

func TestClientWaitsForABrokerThatIsNotThereYet(t *testing.T) {
	endpoint := "ipc://" + t.TempDir() + "/late"
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	reply := make(chan []string)
	go func() {
		result, err := client.Send("echo", nil, 10*time.Second)
		if err != nil {
			t.Error(err)
		}
		reply <- spell(result.Body())
	}()
	late := newPeer(t, zmq.ROUTER)
	if err := late.Bind(endpoint); err != nil {
		t.Fatal(err)
	}
	answerOnce(late, func(request []string) []string {
		return []string{request[0], "", "MDPC01", "echo", "here"}
	})
	late.want(<-reply, "here")
}

func TestReplyIsNotLostWithAConnectionThatBreaksRightAfterIt(t *testing.T) {
	for range 50 {
		broker, endpoint := bindPeer(t)
		if err := broker.SetLinger(time.Second); err != nil {
			t.Fatal(err)
		}
		client := NewClient(context.Background(), endpoint)
		broker.inBackground(func() {
			request, err := broker.RecvMessageBytes(0)
			if err != nil {
				t.Error(err)
				return
			}
			broker.SendMessage(request[0], "", "MDPC01", "echo", "last words")
			broker.Close()
		})
		reply, err := client.Send("echo", nil, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		broker.want(spell(reply.Body()), "last words")
		client.Disconnect()
	}
}

func TestClientTakesBackWhatItGivesUp(t *testing.T) {
	for _, giveUp := range []string{"timeout", "stop"} {
		t.Run(giveUp, func(t *testing.T) {
			broker, endpoint := bindPeer(t)
			stop, cancel := context.WithCancel(context.Background())
			client := NewClient(stop, endpoint)
			ended := make(chan error)
			go func() {
				timeout := 10 * time.Second
				if giveUp == "timeout" {
					timeout = 100 * time.Millisecond
				}
				_, err := client.Send("echo", frames("hello"), timeout)
				ended <- err
			}()
			request := broker.recv()
			if giveUp == "stop" {
				cancel()
			}
			broker.want(broker.recv(), request[0], "", "MDPC01", "mmi.cancel", "")
			select {
			case err := <-ended:
				t.Fatalf("the client did not wait for the reply to mmi.cancel: %v", err)
			default:
			}
			broker.send(request[0], "", "MDPC01", "mmi.cancel", "404")
			if err := <-ended; !errors.Is(err, errTimeout) && !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			cancel()
		})
	}
}

func TestClientLearnsAtOnceThatItLostTheBroker(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := NewClient(context.Background(), endpoint)
	answerOnce(broker, func([]string) []string {
		broker.Close()
		return nil
	})
	if _, err := client.Send("echo", nil, 0); !errors.Is(err, errLost) {
		t.Errorf("got %v, want errLost", err)
	}
}

func TestLateReplyIsNotTakenForTheNext(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	received := answerOnce(broker, func([]string) []string { return nil })
	if _, err := client.Send("echo", frames("first"), time.Second); !errors.Is(err, errTimeout) {
		t.Fatalf("the first request: %v", err)
	}
	late := <-received
	answerOnce(broker, func(request []string) []string {
		broker.SendMessage(frames(late[0], "", "MDPC01", "echo", "late"))
		return []string{request[0], "", "MDPC01", "echo", "second"}
	})
	reply, err := client.Send("echo", frames("second"), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	broker.want(spell(reply.Body()), "second")
}

func TestClientRefusesWhatIsNoReply(t *testing.T) {
	for _, test := range []struct {
		name  string
		reply []string
	}{
		{"not MDP", []string{"hello"}},
		{"one empty frame", []string{""}},
		{"no service", []string{"", "MDPC01"}},
		{"another service", []string{"", "MDPC01", "other", "x"}},
		{"a worker's message", []string{"", "MDPW01", "\x02", "A", "", "x"}},
		{"another version", []string{"", "MDPC02", "\x02", "echo", "x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			broker, endpoint := bindPeer(t)
			client := NewClient(context.Background(), endpoint)
			defer client.Disconnect()
			answerOnce(broker, func(request []string) []string {
				return append(request[:1:1], test.reply...)
			})
			if reply, err := client.Send("echo", nil, 10*time.Second); !errors.Is(err, errProtocol) {
				t.Errorf("got %q, %v", spell(reply.Body()), err)
			}
		})
	}
}

func TestRequestsInFlightAreToldApartByAFrameOfTheirOwn(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	ended := make(chan struct{})
	calls := beginCalls(client, 0, "a", "b", "c")
	go func() {
		defer close(ended)
		awaitAll(t, client, calls)
	}()
	var requests [][]string
	for i, body := range []string{"a", "b", "c"} {
		requests = append(requests, broker.recv())
		broker.want(requests[i], requests[0][0], requests[i][1], "", "MDPC01", "echo", body)
	}
	if a, b := requests[0][1], requests[1][1]; a == "" || a == b {
		t.Errorf("the correlation frames are %q and %q", a, b)
	}
	for _, i := range []int{2, 0, 1} {
		broker.send(requests[i][0], requests[i][1], "", "MDPC01", "echo", "reply to "+requests[i][5])
	}
	<-ended
	for i, body := range []string{"a", "b", "c"} {
		if calls[i].err != nil {
			t.Errorf("%s: %v", body, calls[i].err)
		}
		broker.want(spell(calls[i].reply.Body()), "reply to "+body)
	}
}

func TestOneOfManyThatTimesOutIsTakenBackAloneAndItsLateReplyIsDropped(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	slow := beginCalls(client, 100*time.Millisecond, "slow")
	quick := beginCalls(client, 0, "quick")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		awaitAll(t, client, slow)
		awaitAll(t, client, quick)
	}()
	first, second := broker.recv(), broker.recv()
	broker.want(broker.recv(), first[0], first[1], "", "MDPC01", "mmi.cancel", "")
	broker.send(first[0], first[1], "", "MDPC01", "echo", "late")
	broker.send(first[0], first[1], "", "MDPC01", "mmi.cancel", "404")
	broker.send(second[0], second[1], "", "MDPC01", "echo", "reply")
	<-ended
	if !errors.Is(slow[0].err, errTimeout) {
		t.Errorf("the slow call: %v", slow[0].err)
	}
	broker.want(spell(quick[0].reply.Body()), "reply")
}

func TestCancelEndsWhatHasNotBegunAndNothingElse(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	calls := beginCalls(client, 0, "waits", "runs")
	received := make(chan []string)
	go func() {
		for range 4 {
			received <- broker.recv()
		}
	}()
	requests := map[string][]string{}
	for len(requests) < 2 { // Await sends them
		client.Await(time.Now().Add(10 * time.Millisecond))
		select {
		case request := <-received:
			requests[request[5]] = request
		default:
		}
	}
	for _, c := range calls {
		client.Cancel(c)
	}
	late := beginCalls(client, 0, "not sent yet")
	client.Cancel(late[0])
	for _, body := range []string{"waits", "runs"} {
		broker.want(<-received, requests[body][0], requests[body][1], "", "MDPC01", "mmi.cancel", "")
	}
	broker.send(requests["waits"][0], requests["waits"][1], "", "MDPC01", "mmi.cancel", "200")
	broker.send(requests["runs"][0], requests["runs"][1], "", "MDPC01", "mmi.cancel", "404")
	broker.send(requests["runs"][0], requests["runs"][1], "", "MDPC01", "echo", "done")
	awaitAll(t, client, slices.Concat(calls, late))
	if calls[0].err != errCancelled || calls[1].err != nil || late[0].err != errCancelled {
		t.Errorf("the calls ended with %v, %v and %v", calls[0].err, calls[1].err, late[0].err)
	}
}

func TestWhatWasCancelledBeforeItWasSentEndsAtOnce(t *testing.T) {
	client := newBatchClient(t, "ipc://"+t.TempDir()+"/nobody")
	calls := beginCalls(client, 0, "a")
	client.Cancel(calls[0])
	limit := time.Now().Add(20 * time.Second)
	ended, err := client.Await(limit)
	if err != nil || !slices.Equal(ended, calls) || time.Now().After(limit) {
		t.Errorf("%d calls ended, %v, want one", len(ended), err)
	}
}

func TestConnectionThatBreaksEndsWhatIsInFlightAndTheNextIsSentOverAnother(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	calls := beginCalls(client, 0, "a", "b")
	broker.inBackground(func() {
		broker.RecvMessageBytes(0)
		broker.RecvMessageBytes(0)
		broker.Close()
	})
	awaitAll(t, client, calls)
	for _, c := range calls {
		if !errors.Is(c.err, errLost) {
			t.Errorf("got %v, want errLost", c.err)
		}
	}
	again := newPeer(t, zmq.ROUTER)
	if err := again.Bind(endpoint); err != nil {
		t.Fatal(err)
	}
	next := beginCalls(client, 0, "c")
	answerOnce(again, func(request []string) []string {
		return []string{request[0], request[1], "", "MDPC01", "echo", "here"}
	})
	awaitAll(t, client, next)
	again.want(spell(next[0].reply.Body()), "here")
}

func TestConnectionThatBreaksWhileNothingIsInFlightFailsNoCall(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	roundTrip := func(broker peer) {
		calls := beginCalls(client, 0, "a")
		received := answerOnce(broker, func(request []string) []string {
			return []string{request[0], request[1], "", "MDPC01", "echo", "here"}
		})
		awaitAll(t, client, calls)
		<-received
		broker.want(spell(calls[0].reply.Body()), "here")
	}
	roundTrip(broker)
	broker.Close()
	for client.connected() {
		if _, err := client.Await(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	again := newPeer(t, zmq.ROUTER)
	if err := again.Bind(endpoint); err != nil {
		t.Fatal(err)
	}
	roundTrip(again)
}

func TestClientThatHasNothingToAskDoesNotConnect(t *testing.T) {
	client := newBatchClient(t, "ipc://"+t.TempDir()+"/nobody")
	if ended, err := client.Await(time.Now()); len(ended) > 0 || err != nil || len(client.lanes) > 0 {
		t.Errorf("got %v, %v, connected: %v", ended, err, len(client.lanes) > 0)
	}
}

func TestWhatTimedOutWithoutABrokerIsNotSentToOneThatComes(t *testing.T) {
	endpoint := "ipc://" + t.TempDir() + "/late"
	client := newBatchClient(t, endpoint)
	hasty := beginCalls(client, 50*time.Millisecond, "given up")
	patient := beginCalls(client, 0, "patient")
	awaitAll(t, client, hasty)
	if !errors.Is(hasty[0].err, errNoBroker) {
		t.Errorf("got %v, want errNoBroker", hasty[0].err)
	}
	late := newPeer(t, zmq.ROUTER)
	if err := late.Bind(endpoint); err != nil {
		t.Fatal(err)
	}
	answerOnce(late, func(request []string) []string {
		return []string{request[0], request[1], "", "MDPC01", "echo", "reply to " + request[5]}
	})
	awaitAll(t, client, patient)
	late.want(spell(patient[0].reply.Body()), "reply to patient")
}

func TestBatchEndsIfNoBrokerCanBeReached(t *testing.T) {
	client := NewClient(context.Background(), "ipc://"+t.TempDir()+"/nobody")
	defer client.Disconnect()
	client.reachLimit = 200 * time.Millisecond
	begin := time.Now()
	err := client.do(&call{service: "echo"}, func() time.Time { return time.Time{} })
	if !errors.Is(err, errNoBroker) || time.Since(begin) < client.reachLimit {
		t.Errorf("got %v after %v, want errNoBroker", err, time.Since(begin))
	}
}

func TestBrokerThatKnowsNoAddressStacksIsDetected(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := newBatchClient(t, endpoint)
	calls := beginCalls(client, 0, "a", "b")
	answerOnce(broker, func(request []string) []string {
		return []string{request[0], "", "MDPC01", "echo", "whose?"}
	})
	awaitAll(t, client, calls)
	for _, c := range calls {
		if !errors.Is(c.err, errProtocol) || !errors.Is(c.err, errNoCorrelation) {
			t.Errorf("got %v, want errNoCorrelation", c.err)
		}
	}
}

func TestArgumentsComeFromTheCommandLineOrElseFromStandardInput(t *testing.T) {
	for _, test := range []struct {
		name  string
		tool  requestTool
		stdin string
		want  []string
	}{
		{"arguments", requestTool{Args: operands{"a", ""}}, "unread", []string{"a", ""}},
		{"lines", requestTool{}, "a b\n\nc\r\n\xff\x00", []string{"a b", "", "c\r", "\xff\x00"}},
		{"last line without a newline", requestTool{}, "a\nb", []string{"a", "b"}},
		{"an empty line", requestTool{}, "\n", []string{""}},
		{"empty input", requestTool{}, "", []string{}},
		{"NUL", requestTool{Null: true}, "a\nb\x00\x00c\x00", []string{"a\nb", "", "c"}},
		{"all input", requestTool{AllInput: true}, "a\n\x00b\n", []string{"a\n\x00b\n"}},
		{"all input, empty", requestTool{AllInput: true}, "", []string{""}},
		{"all input after arguments", requestTool{AllInput: true, Args: operands{"x"}}, "a\n", []string{"x", "a\n"}},
		{"none", requestTool{NoInput: true}, "unread", []string{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdin := fileWith(t, test.stdin)
			body, err := test.tool.readBody(context.Background(), stdin, console{})
			if err != nil || !reflect.DeepEqual(spell(body), test.want) {
				t.Errorf("got %q, %v, want %q", body, err, test.want)
			}
			at, _ := stdin.Seek(0, 1)
			if unread := at == 0; unread != (test.stdin == "" || test.stdin == "unread") {
				t.Errorf("standard input is at byte %d", at)
			}
		})
	}
}

func TestInputThatNoCommandTakesAsArgumentsIsRefusedBeforeAllOfItIsRead(t *testing.T) {
	endless, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer endless.Close()
	body, err := new(requestTool).readBody(context.Background(), endless, console{})
	if f := failureOf(err); body != nil || f.status != exitUsage || !strings.Contains(f.hint, "--each") || !strings.Contains(f.hint, "--stdin") {
		t.Errorf("got %d frames, status %d, hint %q", len(body), f.status, f.hint)
	}
	most := fileWith(t, strings.Repeat("x\n", maxLines/2))
	if body, err := new(requestTool).readBody(context.Background(), most, console{}); err != nil || len(body) != maxLines/2 {
		t.Errorf("got %d frames, %v", len(body), err)
	}
}

func TestOneFrameIsPrintedAsItIsAndSeveralOneALine(t *testing.T) {
	for _, test := range []struct {
		name string
		null bool
		body [][]byte
		want string
	}{
		{"none", false, nil, ""},
		{"one", false, frames("a\x00\xff"), "a\x00\xff"},
		{"one with NUL ends", true, frames("a\n"), "a\n"},
		{"several", false, frames("a", "", "b\n"), "a\n\nb\n\n"},
		{"several with NUL ends", true, frames("a", "", "b\n"), "a\x00\x00b\n\x00"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout := fileWith(t, "")
			tool := requestTool{Null: test.null}
			if err := tool.print(stdout, test.body); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(stdout.Name()); err != nil || !bytes.Equal(got, []byte(test.want)) {
				t.Errorf("printed %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

// BenchmarkRoundTrip measures a request and its reply. The client, the broker and the service run in
// this process.
func BenchmarkRoundTrip(b *testing.B) {
	endpoint := startBroker(b, 50*time.Millisecond)
	startService(b, endpoint, func(_ string, body [][]byte) Reply { return Reply{Output: body} })
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	for b.Loop() {
		if _, err := client.Send("echo", frames("hello"), 10*time.Second); err != nil {
			b.Fatal(err)
		}
	}
}
