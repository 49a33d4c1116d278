package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A socket passes a message to C in batches of frames and joins short frames. The messages here are
// at the limits of both.
func TestMessagesOfAnyShapePassUnchanged(t *testing.T) {
	raw, endpoint := bindPeer(t)
	dealer, err := newSocket(zmq.DEALER)
	if err != nil {
		t.Fatal(err)
	}
	defer dealer.Close()
	if err := dealer.watch(zmq.EVENT_CONNECTED); err != nil {
		t.Fatal(err)
	}
	if err := dealer.Connect(endpoint); err != nil {
		t.Fatal(err)
	}
	waiter := newPollWaiter()
	random := rand.NewChaCha8([32]byte{})
	lengths := []int{0, 1, maxJoined - 1, maxJoined, maxJoined + 1, 0, maxJoined / 2, maxJoined / 2, 1 << 18, 33}
	for _, count := range []int{1, 2, 15, 16, 17, 32, 100} {
		for shift := range lengths {
			t.Run(fmt.Sprintf("%d frames, the first of %d bytes", count, lengths[shift]), func(t *testing.T) {
				message := make([][]byte, count)
				for i := range message {
					message[i] = make([]byte, lengths[(i+shift)%len(lengths)])
					random.Read(message[i])
				}
				if err := dealer.send(message); err != nil {
					t.Fatal(err)
				}
				received, err := raw.RecvMessageBytes(0)
				if err != nil {
					t.Fatal(err)
				}
				expectFrames(t, received[1:], message)

				if _, err := raw.SendMessage(received); err != nil {
					t.Fatal(err)
				}
				var back [][]byte
				for end := time.Now().Add(10 * time.Second); back == nil && time.Now().Before(end); {
					if err := waiter.Wait(end, dealer); err != nil {
						t.Fatal(err)
					}
					if back, err = dealer.receive(); err != nil {
						t.Fatal(err)
					}
				}
				expectFrames(t, back, message)
				// Appending to a frame must not overwrite the next one.
				for i := range back {
					_ = append(back[i], "another frame's bytes?"...)
				}
				expectFrames(t, back, message)
			})
		}
	}
}

// Thousands of connections may break while a broker stops, which does not read the events any more.
func TestConnectionsWhoseEventsNobodyReadsDoNotKeepASocketFromClosing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	router, err := newSocket(zmq.ROUTER)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(router.watch(zmq.EVENT_ACCEPTED|zmq.EVENT_DISCONNECTED), router.Bind("ipc://"+path)); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != nil { // ZeroMQ greets first.
			t.Fatalf("connection %d: %v", i, err)
		}
		conn.Close()
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		router.Close()
	}()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("the socket did not close")
	}
}

func expectFrames(t *testing.T, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d frames, want %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("frame %d of %d bytes was received as %d different bytes", i, len(want[i]), len(got[i]))
		}
	}
}
