package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestLinesReachTheLogWholeWithTheirLabel(t *testing.T) {
	for _, test := range []struct {
		writes []string
		want   []string // writes to the log
	}{
		{[]string{"one\ntwo\n"}, []string{"7: one\n7: two\n"}},
		{[]string{"o", "ne", "\ntw", "o"}, []string{"7: one\n", "7: two\n"}},
		{[]string{"\n\n"}, []string{"7: \n7: \n"}},
		{[]string{""}, nil},
		{[]string{strings.Repeat("x", maxLogLine) + "y\n"}, []string{"7: " + strings.Repeat("x", maxLogLine) + "\n7: y\n"}},
		{[]string{strings.Repeat("x", maxLogLine), "\n\n"}, []string{"7: " + strings.Repeat("x", maxLogLine) + "\n", "7: \n"}},
	} {
		var log writes
		w := lineWriter{log: &log, prefix: "7: "}
		for _, text := range test.writes {
			if n, err := w.Write([]byte(text)); n != len(text) || err != nil {
				t.Errorf("Write(%.20q) = %d, %v", text, n, err)
			}
		}
		w.Flush()
		if got := strings.Join(log, "|"); got != strings.Join(test.want, "|") {
			t.Errorf("%.20q: the log has %.60q, want %.60q", test.writes, log, test.want)
		}
	}
}

// writes has an element for each write that is not empty.
type writes []string

func (w *writes) Write(p []byte) (int, error) {
	if len(p) > 0 {
		*w = append(*w, string(bytes.Clone(p)))
	}
	return len(p), nil
}
