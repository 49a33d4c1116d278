package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// newLog returns the log of bbroker or bservice. Each line is an event, as words key=value. The time
// comes first, unless the journal adds it.
func newLog(w *logWriter, f *commonFlags) *slog.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	switch {
	case f.Quiet:
		options.Level = slog.LevelError
	case f.Verbose:
		options.Level = slog.LevelDebug
	}
	if w.journaled {
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// A logWriter writes to a file from a goroutine of its own, so that a reader of the file that is slow
// or gone does not hold up those who log. It drops what its buffer has no room for, and says so. A
// regular file has no reader to wait for, and is written to at once.
type logWriter struct {
	file      *os.File
	regular   bool
	journaled bool // it is the journal of systemd

	mu      sync.Mutex
	filled  sync.Cond // buffer is not empty, or the writer is closed
	buffer  []byte
	dropped int // writes since the buffer was full
	closed  bool
	done    chan struct{} // closed when everything was written
}

const logBuffer = 1 << 20 // bytes

func newLogWriter(file *os.File) *logWriter {
	w := &logWriter{file: file, done: make(chan struct{})}
	w.filled.L = &w.mu
	if info, err := file.Stat(); err == nil {
		w.regular = info.Mode().IsRegular()
		stat := info.Sys().(*syscall.Stat_t)
		w.journaled = os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
	}
	// A write to a closed pipe fails then, and does not end the process. Commands do not inherit
	// this, as they would inherit a signal that is ignored.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	go func() {
		defer close(w.done)
		for text := w.next(); text != nil; text = w.next() {
			file.Write(text)
		}
	}()
	return w
}

// next waits for text to write. It returns nil when the writer was closed.
func (w *logWriter) next() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.buffer) == 0 && !w.closed {
		w.filled.Wait()
	}
	text := w.buffer
	w.buffer = nil
	if w.dropped > 0 {
		text = fmt.Appendf(text, "%d messages were dropped: standard error is not read\n", w.dropped)
		w.dropped = 0
	}
	return text
}

// Write never waits and never fails.
func (w *logWriter) Write(p []byte) (int, error) {
	if w.regular {
		w.file.Write(p)
		return len(p), nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.buffer)+len(p) > logBuffer {
		w.dropped++
		return len(p), nil
	}
	w.buffer = append(w.buffer, p...)
	w.filled.Signal()
	return len(p), nil
}

// Close waits until everything is written, but not for longer than a second.
func (w *logWriter) Close() {
	w.mu.Lock()
	w.closed = true
	w.filled.Signal()
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-time.After(time.Second):
	}
}

// A lineWriter writes whole lines to a log, with a prefix before each, so that those of commands that run
// at the same time stay apart.
type lineWriter struct {
	log    io.Writer
	prefix string
	line   []byte // that has begun
	broken bool   // the last line was
}

const maxLogLine = 64 << 10 // bytes; a longer line is broken

func (w *lineWriter) Write(p []byte) (int, error) {
	var lines []byte
	for rest := p; len(rest) > 0; {
		part := rest[:min(len(rest), maxLogLine-len(w.line))]
		if end := bytes.IndexByte(part, '\n'); end >= 0 {
			part = part[:end+1]
		}
		rest = rest[len(part):]
		if w.broken && string(part) == "\n" { // the end of that line
			w.broken = false
			continue
		}
		w.line = append(w.line, part...)
		w.broken = len(w.line) == maxLogLine && !bytes.HasSuffix(w.line, []byte("\n"))
		if w.broken || bytes.HasSuffix(w.line, []byte("\n")) {
			lines = append(lines, w.takeLine()...)
		}
	}
	w.log.Write(lines) // If that fails, the command need not know.
	return len(p), nil
}

// Flush writes the line that has begun.
func (w *lineWriter) Flush() {
	if len(w.line) > 0 {
		w.log.Write(w.takeLine())
	}
}

// takeLine returns the line that has begun, with its prefix and a newline.
func (w *lineWriter) takeLine() []byte {
	line := fmt.Appendf(nil, "%s%s\n", w.prefix, bytes.TrimSuffix(w.line, []byte("\n")))
	w.line = nil
	return line
}
