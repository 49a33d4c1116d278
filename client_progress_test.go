package main

import (
	"context"
	"path/filepath"
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

// awaitConnection waits until the broker is there.
func awaitConnection(t *testing.T, client *Client) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !client.connected(); {
		if _, err := client.Await(deadline); err != nil || time.Now().After(deadline) {
			t.Fatalf("not connected: %v", err)
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
	if text := report.text(); !strings.HasPrefix(text, "brequest: echo: waiting for a broker at "+endpoint) || report.lookUp != nil {
		t.Errorf("without a broker it says %q", text)
	}
	awaitConnection(t, client)
	report.text()
	awaitAnswer(t, client, &report)
	if !report.changed() || report.changed() {
		t.Error("that nobody serves it is not news once")
	}
	if text := report.text(); !strings.HasPrefix(text, "brequest: echo: waiting for a reply; nobody serves it, ") {
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
		if strings.HasPrefix(text, "brequest: echo: waiting for a reply, ") {
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
	awaitConnection(t, client)
	report := waitReport{client: client, service: "echo", begin: time.Now()}
	report.text()
	asked := report.lookUp
	awaitAnswer(t, client, &report)
	broker.want(broker.recv()[3:], "echo", "x")
	broker.want(broker.recv()[3:], "mmi.service", "echo")
	report.changed()
	if text := report.text(); !strings.HasPrefix(text, "brequest: echo: waiting for a reply, ") || report.lookUp != asked {
		t.Errorf("it says %q, and asked again: %v", text, report.lookUp != asked)
	}
}

func TestLookUpThatCannotConnectDoesNotEndTheRequest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker")
	broker := newPeer(t, zmq.ROUTER)
	if err := broker.Bind("ipc://" + path); err != nil {
		t.Fatal(err)
	}
	client := NewClient(context.Background(), "ipc://"+path)
	defer client.Disconnect()
	request := &call{service: "echo", body: frames("x")}
	client.Begin(request)
	awaitConnection(t, client)
	message := broker.recv()
	// A connection to this endpoint is an error.
	client.lanes[0].link.address.endpoint = "tcp://not an endpoint"
	report := waitReport{client: client, service: "echo", begin: time.Now()}
	report.text()
	awaitAnswer(t, client, &report)
	if report.lookUp.err == nil || request.ended {
		t.Errorf("the look-up ended with %v, the request %v", report.lookUp.err, request.ended)
	}
	broker.send(append(message[:4], "y")...)
	for !request.ended {
		if _, err := client.Await(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if request.err != nil {
		t.Error(request.err)
	}
}
