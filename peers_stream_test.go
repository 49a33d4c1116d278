package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// The tests in this file run the streams of scripts/backbone.py and scripts/backbone.js, with each other and
// with raw sockets.

// A streamClient is a program that reads a stream of a library as the test says.
type streamClient struct {
	t      testing.TB
	input  io.Writer
	output *bufio.Scanner
}

func (s *system) startStreamClient(language string) *streamClient {
	s.t.Helper()
	args := []string{}
	if language == "asyncio" {
		language, args = "python", []string{"asyncio"}
	}
	input, output := startDialogue(s.t, s.peerCommand(language, "stream_client", args...))
	output.Buffer(nil, 1<<20)
	return &streamClient{s.t, input, output}
}

// stream begins to read a stream. timeout is in seconds.
func (c *streamClient) stream(timeout float64, message ...string) {
	arguments, _ := json.Marshal([]any{"peer", message, timeout})
	fmt.Fprintf(c.input, "stream %s\n", arguments)
}

// begin lets the client take a part, all that follow, or leave. The test reads the result later.
func (c *streamClient) begin(verb string) { fmt.Fprintln(c.input, verb) }

// wants checks what the client tells: the output and the standard error, or the class, the status and the
// standard error of the error.
func (c *streamClient) wants(want ...any) {
	c.t.Helper()
	if !c.output.Scan() {
		c.t.Fatal("the client ended")
	}
	var told []any
	if err := json.Unmarshal(c.output.Bytes(), &told); err != nil {
		c.t.Fatal(err)
	}
	if len(want) == 1 {
		want = append(want, "")
	}
	if got, want := fmt.Sprintf("%q", told), fmt.Sprintf("%q", want); got != want {
		c.t.Fatalf("it got %.200s, want %.200s", got, want)
	}
}

// expect lets the client do something, and checks what it tells.
func (c *streamClient) expect(verb string, want ...any) {
	c.t.Helper()
	c.begin(verb)
	c.wants(want...)
}

// startStreamService starts testdata/peers/stream_service.*.
func (s *system) startStreamService(language string) {
	s.t.Helper()
	cmd := s.peerCommand(language, "stream_service", "peer")
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if s.t.Failed() {
			cmd.Process.Kill() // It may have a stream that does not end.
		}
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil && !s.t.Failed() {
			s.t.Errorf("the service ended with %v", err)
		}
	})
}

// waitForWord waits until a file has a word.
func (s *system) waitForWord(file, word string) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !slices.Contains(s.words(file), word); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s never had %s", file, word)
		}
	}
}

// countTo returns the output of a stream of numbers.
func countTo(n int) string {
	var text strings.Builder
	for i := range n {
		fmt.Fprintln(&text, i)
	}
	return text.String()
}

// inEachPairing runs a test for each client and service, with a broker.
func inEachPairing(t *testing.T, test func(t *testing.T, s *system, client *streamClient, notes string)) {
	for _, service := range []string{"python", "javascript"} {
		for _, client := range []string{"python", "asyncio", "javascript"} {
			t.Run(client+" reads "+service, func(t *testing.T) {
				t.Parallel()
				s := newSystem(t, "--heartbeat", "1s")
				s.startStreamService(service)
				test(t, s, s.startStreamClient(client), filepath.Join(s.dir, "notes"))
			})
		}
	}
}

func TestStreamsArriveInPartsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachPairing(t, func(t *testing.T, s *system, client *streamClient, notes string) {
		for _, kind := range []string{"numbers", "async"} {
			client.stream(20, kind, notes, "3")
			client.expect("next", "0\n")
			client.expect("next", "1\n")
			client.expect("all", "2\n")
			client.stream(20, kind, notes, "1000")
			client.expect("all", countTo(1000))
		}
		client.stream(20, "bytes", notes, "200000")
		client.expect("next", strings.Repeat("x", 64<<10))
		client.expect("all", strings.Repeat("x", 200000-64<<10))
		client.stream(20, "fail", notes)
		client.expect("next", "out")
		client.expect("next", "rest", "err\n")
		client.expect("next", "StatusError", 3.0, "err\n")
		client.stream(20, "plain", notes, "a", "b")
		client.expect("next", "a")
		client.expect("all", "b")
	})
}

func TestSlowReaderHoldsTheProducerInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachPairing(t, func(t *testing.T, s *system, client *streamClient, notes string) {
		late, release := s.lateRequest()
		client.stream(20, "numbers", notes, "1000000", late[1])
		client.expect("next", "0\n")
		s.metric("backbone_workers") // The broker has read the first mmi.credit, so that it gives no credit by itself.
		release()
		// The service is one part ahead of its credit at most.
		for taken := 2; taken <= 300; taken++ {
			client.expect("next", fmt.Sprintln(taken-1))
			if produced := len(s.words("notes")); produced > taken+maxWindow+1 {
				t.Fatalf("the client has taken %d parts, and the service has made %d", taken, produced)
			}
		}
		client.expect("leave", "left")
		s.waitForWord("notes", "closed")
		s.waitForMetric("backbone_cancelled_total", 1)
		client.stream(20, "plain", notes, "the next one")
		client.expect("all", "the next one")
	})
}

func TestClientThatLeavesEndsAGeneratorThatWaitsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachPairing(t, func(t *testing.T, s *system, client *streamClient, notes string) {
		client.stream(20, "hang", notes)
		client.expect("next", "one")
		client.expect("leave", "left")
		s.waitForWord("notes", "closed")
		client.stream(20, "plain", notes, "it is back")
		client.expect("all", "it is back")
		client.stream(3, "hang", notes+"2")
		client.expect("next", "one")
		client.expect("next", "RequestTimeout", 124.0, "")
		s.waitForWord("notes2", "closed")
	})
}

func TestBrokerThatDiesBreaksAStreamInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachPairing(t, func(t *testing.T, s *system, client *streamClient, notes string) {
		client.stream(20, "numbers", notes, "1000000")
		client.expect("next", "0\n")
		s.broker.signal(syscall.SIGKILL)
		s.broker.waitForExit()
		client.expect("all", "ConnectionLost", 69.0, "")
		s.waitForWord("notes", "closed")
		s.broker = s.start("bbroker", "--heartbeat", "1s")
		client.stream(20, "numbers", notes, "3")
		client.expect("all", "0\n1\n2\n")
	})
}

// newStreamWorker returns a raw broker and the identity of a service that streams.
func newStreamWorker(t *testing.T, language string) (s *system, broker peer, worker string) {
	t.Helper()
	s, broker = newSystemWithRawBroker(t)
	s.startStreamService(language)
	worker, ready := broker.nextFromWorker()
	broker.want(ready, "", "MDPW01", "\x01", "peer")
	return s, broker, worker
}

func TestServiceSendsPartsOnCreditInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		for _, kind := range []string{"numbers", "async"} {
			s, broker, worker := newStreamWorker(t, language)
			notes := filepath.Join(s.dir, "notes")
			const token = "0123abcd.1~2@Ann Lee"
			part := func(number int) {
				t.Helper()
				identity, message := broker.nextFromWorker()
				broker.want(append([]string{identity}, message...), worker, "MDPW02", "\x03", token, "", fmt.Sprintln(number))
			}
			held := func(made int) {
				t.Helper()
				broker.want(broker.recv()[1:], heartbeatFrames...)
				if produced := len(s.words("notes")); produced != made {
					t.Fatalf("the service has made %d parts, want %d", produced, made)
				}
			}
			broker.send(toWorker(worker, token, kind, notes, "6")...)
			part(0)
			part(1)
			broker.send(worker, "", "MDPW02", "\x07", "0123abcd.2~2", "", "5") // for an earlier one
			held(3)
			broker.send(worker, "", "MDPW02", "\x07", token, "", "1")
			part(2)
			held(4)
			broker.send(worker, "", "MDPW02", "\x07", token, "", "3")
			part(3)
			part(4)
			part(5)
			_, final := broker.nextFromWorker()
			broker.want(final, "MDPW02", "\x04", token, "", "")

			broker.send(toWorker(worker, token, "fail", notes)...)
			_, out := broker.nextFromWorker()
			broker.want(out, "MDPW02", "\x03", token, "", "out")
			_, final = broker.nextFromWorker()
			broker.want(final, "MDPW02", "\x04", token, "", "rest", "err\n", "exit status 3")
			broker.send(toWorker(worker, token, "plain", notes, "a", "b")...)
			_, final = broker.nextFromWorker()
			broker.want(final, "MDPW02", "\x04", token, "", "a", "b")
		}
	})
}

func TestServiceSendsOneReplyWhereNobodyTakesPartsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		s, broker, worker := newStreamWorker(t, language)
		notes := filepath.Join(s.dir, "notes")
		for _, token := range []string{"0123abcd.1", "0123abcd.1@Ann", "client~64", "0123ABCD.1~64", "0123abcd.1~0", "0123abcd.1~64\n", "x0123abcd.1~64"} {
			broker.send(toWorker(worker, token, "numbers", notes, "3")...)
			broker.wantFrom(worker, "\x03", token, "", "0\n1\n2\n")
		}
		broker.send(worker, "", "MDPW01", "\x02", "0123abcd.1~64", "second", "", "numbers", notes, "3")
		broker.wantFrom(worker, "\x03", "0123abcd.1~64", "second", "", "0\n1\n2\n")
		broker.send(toWorker(worker, "client", "bytes", notes, fmt.Sprint(64<<20+1))...)
		_, reply := broker.nextFromWorker()
		if len(reply) != 8 || !strings.Contains(reply[6], "a reply of more than 67108864 bytes") || reply[7] != "exit status 1" {
			t.Errorf("the reply is %.300q", reply)
		}
	})
}

func TestServiceClosesAStreamThatNobodyAwaitsInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachLanguage(t, func(t *testing.T, language string) {
		for _, kind := range []string{"numbers", "async", "hang"} {
			for _, end := range []string{"disconnect", "break"} {
				t.Run(kind+" "+end, func(t *testing.T) {
					s, broker, worker := newStreamWorker(t, language)
					request := []string{kind, filepath.Join(s.dir, "notes")}
					if kind != "hang" {
						request = append(request, "1000000")
					}
					broker.send(toWorker(worker, "0123abcd.1~1", request...)...)
					_, part := broker.nextFromWorker()
					broker.want(part[:5], "MDPW02", "\x03", "0123abcd.1~1", "", part[4])
					if end == "disconnect" {
						broker.send(disconnectTo(worker)...)
					} else {
						broker.Close()
						broker = newPeer(t, zmq.ROUTER)
						if err := broker.Bind(s.endpoint); err != nil {
							t.Fatal(err)
						}
					}
					s.waitForWord("notes", "closed")
					for { // The old socket may have connected again, and sent a heartbeat.
						other, message := broker.nextFromWorker()
						if other != worker {
							broker.want(message, "", "MDPW01", "\x01", "peer")
							broker.send(toWorker(other, "client", "plain", "", "x")...)
							broker.wantFrom(other, "\x03", "client", "", "x")
							break
						}
						t.Errorf("the service sent %q", message)
					}
				})
			}
		}
	})
}

// newStreamReader returns a client and a raw broker that has given the answer to the question for mmi.credit.
func newStreamReader(t *testing.T, language string, answer ...string) (client *streamClient, broker peer, identity string) {
	t.Helper()
	s, broker := newSystemWithRawBroker(t)
	client = s.startStreamClient(language)
	client.stream(5, "body")
	client.begin("next")
	question := broker.recv()
	broker.want(question[1:], "", "MDPC01", "mmi.service", "mmi.credit")
	if answer != nil {
		broker.send(append([]string{question[0]}, answer...)...)
	}
	return client, broker, question[0]
}

func TestClientGrantsWhatItHasTakenInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		client, broker, identity := newStreamReader(t, language, "", "MDPC01", "mmi.service", "200")
		from := func(want ...string) {
			t.Helper()
			broker.want(broker.recv(), append([]string{identity}, want...)...)
		}
		partial := func(body ...string) {
			broker.send(append([]string{identity, "MDPC02", "\x02", "peer"}, body...)...)
		}
		answer := func(code string) { broker.send(identity, "MDPC02", "\x03", "mmi.credit", code) }
		from("MDPC02", "\x01", "peer", "body")
		from("MDPC02", "\x01", "mmi.credit", "0")
		answer("200")
		partial("1")
		partial("2", "err", "exit status 0")
		partial("3")
		client.wants("1")
		client.expect("next", "2", "err")
		from("MDPC02", "\x01", "mmi.credit", "1")
		client.expect("next", "3") // The grant for the second one has to wait for the answer.
		client.begin("next")
		answer("200")
		from("MDPC02", "\x01", "mmi.credit", "2")
		answer("404") // It grants nothing any more.
		partial("4")
		client.wants("4")
		client.begin("next")
		broker.send(identity, "MDPC02", "\x03", "peer", "5", "failed", "exit status 3")
		client.wants("5", "failed")
		client.expect("next", "StatusError", 3.0, "errfailed")
		client.stream(5, "again") // over the same connection, without a question
		client.begin("next")
		from("MDPC02", "\x01", "peer", "again")
		from("MDPC02", "\x01", "mmi.credit", "0")
		answer("200")
		partial("again") // It is taken when the next one is asked for.
		client.wants("again")
		client.begin("leave")
		from("MDPC02", "\x01", "mmi.cancel", "")
		broker.send(identity, "MDPC02", "\x03", "mmi.cancel", "200")
		client.wants("left")
	})
}

func TestClientReadsStreamsOfAnyBrokerInAnyLanguage(t *testing.T) {
	t.Parallel()
	inEachClient(t, func(t *testing.T, language string) {
		t.Run("that knows no partial replies", func(t *testing.T) {
			client, broker, identity := newStreamReader(t, language, "", "MDPC01", "mmi.service", "404")
			broker.want(broker.recv(), identity, "", "MDPC01", "peer", "body")
			broker.send(identity, "", "MDPC01", "peer", "out", "err", "exit status 3")
			client.wants("out", "err")
			client.expect("next", "StatusError", 3.0, "err")
		})
		t.Run("that is silent", func(t *testing.T) {
			client, broker, identity := newStreamReader(t, language)
			broker.want(broker.recv(), identity, "MDPC02", "\x01", "mmi.service", "mmi.credit")
			broker.want(broker.recv(), identity, "", "MDPC01", "peer", "body")
			broker.send(identity, "", "MDPC01", "mmi.service", "200") // too late
			broker.send(identity, "", "MDPC01", "peer", "a", "b")
			client.wants("a")
			client.expect("next", "b")
			client.expect("next", "(end)")
		})
		t.Run("that knows only MDP/0.2", func(t *testing.T) {
			client, broker, identity := newStreamReader(t, language)
			broker.want(broker.recv(), identity, "MDPC02", "\x01", "mmi.service", "mmi.credit")
			broker.send(identity, "", "MDPC02", "\x03", "501")
			broker.want(broker.recv(), identity, "MDPC02", "\x01", "peer", "body")
			broker.send(identity, "", "MDPC02", "\x02", "without the name")
			broker.send(identity, "MDPC02", "\x02", "peer", "with it")
			client.wants("without the name")
			client.expect("next", "with it")
			client.begin("next")
			broker.send(identity, "MDPC02", "\x03", "peer")
			client.wants("(end)")
		})
		t.Run("that breaks the protocol", func(t *testing.T) {
			client, broker, identity := newStreamReader(t, language, "", "MDPC01", "mmi.service", "200")
			broker.want(broker.recv(), identity, "MDPC02", "\x01", "peer", "body")
			broker.send(identity, "MDPC02", "\x07", "peer", "x")
			broker.want(broker.recv(), identity, "MDPC02", "\x01", "mmi.credit", "0")
			client.wants("ProtocolError", 76.0, "")
		})
	})
}
