package main

import (
	"context"
	"errors"
	"testing"
)

func TestNamesOfHostsBecomeAddresses(t *testing.T) {
	for endpoint, want := range map[string]string{
		"tcp://localhost:5555":          "tcp://127.0.0.1:5555",
		"tcp://127.0.0.1:5555":          "tcp://127.0.0.1:5555",
		"tcp://[::1]:5555":              "tcp://[::1]:5555",
		"tcp://*:5555":                  "tcp://*:5555",
		"tcp://127.0.0.1:0;localhost:1": "tcp://127.0.0.1:0;localhost:1",
		"tcp://localhost":               "tcp://localhost",
		"ipc:///localhost:5555":         "ipc:///localhost:5555",
	} {
		if got, err := lookUp(context.Background(), endpoint); err != nil || got != want {
			t.Errorf("%s is looked up as %s, %v, want %s", endpoint, got, err, want)
		}
	}
	// This name is invalid, so that no DNS server is asked for it.
	var f *failure
	if got, err := lookUp(context.Background(), "tcp://no..such:5555"); !errors.As(err, &f) || f.status != exitUnavailable || f.hint == "" {
		t.Errorf("got %s, %v, want status 69 with a hint", got, err)
	}
}
