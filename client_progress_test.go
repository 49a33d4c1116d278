package main

import (
	"context"
	"strings"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// awaitAnswer waits until the broker has answered the report.
func awaitAnswer(t *testing.T, client *Client, report *waitReport) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !report.lookUp.ended; {
		if _, err := client.Await(deadline); err != nil || time.Now().After(deadline) {
			t.Fatalf("no answer: %v", err)
		}
	}
}

func TestReportTellsWhetherAnybodyServesTheName(t *testing.T) {
	endpoint := startBroker(t, 50*time.Millisecond)
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	request := &call{service: "echo"}
	client.Begin(request)
	report := waitReport{client: client, service: "echo", begin: time.Now()}
	if text := report.text(); text != "brequest: echo: waiting for a broker at "+endpoint+", 0s" {
		t.Errorf("it says %q", text)
	}
	awaitAnswer(t, client, &report)
	if !report.changed() || report.changed() {
		t.Error("that nobody serves it is not news once")
	}
	if text := report.text(); text != "brequest: echo: waiting for a reply; nobody serves it, 0s" {
		t.Errorf("without a service it says %q", text)
	}

	started := make(chan struct{})
	startService(t, endpoint, func(string, [][]byte) Reply {
		close(started)
		<-t.Context().Done() // Later than the end of the test.
		return Reply{}
	})
	for {
		awaitAnswer(t, client, &report)
		report.changed()
		text := report.text()
		if text == "brequest: echo: waiting for a reply, 0s" {
			break
		}
		if !strings.Contains(text, "nobody serves it") {
			t.Fatalf("with a service it says %q", text)
		}
	}
	<-started
}

func TestBrokerThatDoesNotTellWhetherAnybodyServesANameIsAskedOnce(t *testing.T) {
	broker, endpoint := bindPeer(t)
	client := NewClient(context.Background(), endpoint)
	defer client.Disconnect()
	client.Begin(&call{service: "echo", body: frames("x")})
	report := waitReport{client: client, service: "echo", begin: time.Now()}
	report.text()
	awaitAnswer(t, client, &report)
	for range 3 {
		report.changed()
		if text := report.text(); text != "brequest: echo: waiting for a reply, 1s" {
			t.Errorf("it says %q", text)
		}
		client.Await(time.Now())
	}
	for _, service := range []string{"echo", "mmi.service"} {
		broker.want(broker.recv()[3:], service, map[string]string{"echo": "x", "mmi.service": "echo"}[service])
	}
	if _, err := broker.RecvMessageBytes(zmq.DONTWAIT); err == nil {
		t.Error("the broker was asked again")
	}
}
