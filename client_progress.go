package main

// #include <unistd.h>
import "C"

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"
)

// A statusLine shows a person at a terminal what is going on, until it is hidden.
type statusLine struct {
	watched bool
	shown   bool
	due     time.Time // when to show what is new
}

func newStatusLine(c console, after time.Duration) *statusLine {
	return &statusLine{watched: isWatched(c), due: time.Now().Add(after)}
}

// isWatched tells whether a person at a terminal wants to know what is going on.
func isWatched(c console) bool {
	return !c.quiet && !c.verbose && isatty.IsTerminal(os.Stderr.Fd()) && os.Getenv("TERM") != "dumb"
}

// show shows text if it is due, and returns when it is due again: zero, for never, if nobody
// watches.
func (s *statusLine) show(every time.Duration, text func() string) (due time.Time) {
	if !s.watched {
		return due
	}
	if now := time.Now(); !now.Before(s.due) {
		if inForeground() {
			// The terminal cuts off what does not fit into a line. A narrower one may break the line when
			// it is resized; the cursor stays at its beginning, from where all of it can be erased.
			fmt.Fprintf(os.Stderr, "\r\x1b[?7l%s\x1b[J\x1b[?7h\r", text())
			s.shown = true
		}
		s.due = now.Add(every)
	}
	return s.due
}

// refresh shows a line that is shown anew the next time.
func (s *statusLine) refresh() {
	if s.shown {
		s.due = time.Time{}
	}
}

// inForeground tells whether this process may write to the terminal as it likes: in the background, a
// shell or another command does.
func inForeground() bool {
	group := C.tcgetpgrp(C.int(os.Stderr.Fd()))
	return group < 0 || group == C.getpgrp() // negative: not the terminal that controls this process
}

// hide erases the line, so that something else can be printed.
func (s *statusLine) hide() {
	if !s.shown {
		return
	}
	if inForeground() {
		fmt.Fprint(os.Stderr, "\r\x1b[J")
	}
	s.shown, s.due = false, time.Time{}
}

// above returns a writer to a file that hides the line first, if both are on a terminal.
func (s *statusLine) above(file *os.File) io.Writer {
	if s.watched && isatty.IsTerminal(file.Fd()) {
		return &hidingWriter{file, s}
	}
	return file
}

type hidingWriter struct {
	io.Writer
	line *statusLine
}

func (w *hidingWriter) Write(data []byte) (int, error) {
	w.line.hide()
	return w.Writer.Write(data)
}

// A waitReport tells what a request waits for. It asks the broker each time whether anybody serves the
// name, as far as the broker can tell.
type waitReport struct {
	client   *Client
	service  string
	begin    time.Time
	lookUp   *call // of the service; nil before the first
	unserved bool  // as the broker told last
}

// changed takes the answer of the broker, if it is there, and tells whether that is news.
func (w *waitReport) changed() bool {
	before := w.unserved
	if w.lookUp != nil && w.lookUp.ended {
		w.unserved = serviceCode(w.lookUp.reply) == mmiNotFound
	}
	return w.unserved != before
}

func (w *waitReport) text() string {
	what := "waiting for a reply"
	switch {
	case !w.client.connected():
		what = "waiting for a broker at " + w.client.Endpoint()
	case w.unserved:
		what += "; nobody serves it"
	}
	if w.client.connected() && (w.lookUp == nil || w.lookUp.ended && w.lookUp.err == nil) {
		w.lookUp = &call{service: mmiService, body: framesOf([]string{w.service}), timeout: lookUpPatience}
		w.client.Begin(w.lookUp)
	}
	return fmt.Sprintf("brequest: %s: %s, %v", w.service, what, time.Since(w.begin).Round(time.Second))
}
