package main

import (
	"context"
	"log/slog"
	"strings"
	"time"
)

// A brokerLog limits what peers can cause to be logged.
type brokerLog struct {
	*slog.Logger
	warned     map[string]bool // warnings of this minute
	events     int             // of this minute
	suppressed int             // warnings and events of this minute that were not logged
	minuteEnds time.Time
}

const (
	maxWarnings  = 100  // different ones a minute
	maxEvents    = 1000 // a minute
	maxLogString = 100  // bytes of a name that a peer chose
)

func newBrokerLog(log *slog.Logger) *brokerLog {
	return &brokerLog{Logger: log, warned: map[string]bool{}}
}

// warn logs what a peer can cause again and again, the same thing once a minute.
func (l *brokerLog) warn(what, message string, attrs ...any) {
	if l.warned[what] {
		return
	}
	if len(l.warned) >= maxWarnings {
		l.suppressed++
		return
	}
	l.warned[strings.Clone(what)] = true
	l.Warn(message, attrs...)
}

// event logs what happened to a worker.
func (l *brokerLog) event(level slog.Level, message string, attrs ...any) {
	if l.events >= maxEvents {
		l.suppressed++
		return
	}
	l.events++
	l.Log(context.Background(), level, message, attrs...)
}

// tick begins a new minute if the last one is over.
func (l *brokerLog) tick(now time.Time) {
	if now.Before(l.minuteEnds) {
		return
	}
	if l.suppressed > 0 {
		l.Warn("too many messages to log", "dropped", l.suppressed)
	}
	clear(l.warned)
	l.events, l.suppressed, l.minuteEnds = 0, 0, now.Add(time.Minute)
}

// logged returns a name that a peer chose as the log shows it.
func logged(name string) string {
	if len(name) > maxLogString {
		return name[:maxLogString] + "..."
	}
	return name
}
