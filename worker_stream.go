package main

import (
	"errors"
	"sync"
	"time"
)

// A stream collects what a command prints for a client that takes partial replies. Writers wait while a full
// part was not taken: so a slow client slows the command down, and a stream takes the memory of two parts.
//
// The session takes parts when it has credit. Any goroutine may write.
type stream struct {
	wake func() // makes the session call take

	mu      sync.Mutex
	changed sync.Cond  // a part was taken, or the stream was closed
	part    streamPart // that is being filled
	spare   streamPart // the last one that was taken
	last    time.Time  // when it was taken; zero before the first one
	total   size       // of all parts that were taken
	closed  bool
}

// A streamPart is what goes out in one message.
type streamPart struct{ output, stderr []byte }

const (
	maxPart = 64 << 10 // bytes of output and standard error together

	// gatherTime is how long after a part what a command writes is collected, to go out together. After a
	// pause, and at first, output goes out at once.
	gatherTime = 3 * time.Millisecond
)

// errUnread fails the writers of a stream that nobody reads.
var errUnread = errors.New("nobody reads the output")

func newStream(wake func()) *stream {
	s := &stream{wake: wake}
	s.changed.L = &s.mu
	return s
}

func (p *streamPart) size() int { return len(p.output) + len(p.stderr) }

// take returns a part that is due, as the body of a message, or nil and when one will be, zero for not before
// more was written. The body is valid until the next call.
func (s *stream) take(now time.Time) (body [][]byte, due time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.part.size()
	if n == 0 {
		return nil, time.Time{}
	}
	if due = s.last.Add(gatherTime); n < maxPart && now.Before(due) {
		return nil, due
	}
	body = Reply{Output: [][]byte{s.part.output}, Stderr: s.part.stderr}.Body()
	s.part, s.spare = streamPart{s.spare.output[:0], s.spare.stderr[:0]}, s.part
	s.last = now
	s.total += size(n)
	s.changed.Broadcast()
	return body, time.Time{}
}

// close lets writers fail. What was written and not taken is left for the end of the reply.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.changed.Broadcast()
}

// passed returns how many bytes were taken in parts.
func (s *stream) passed() size {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// stdout returns the standard output of the stream, and stderr its standard error.
func (s *stream) stdout() output { return &streamOutput{s, &s.part.output} }
func (s *stream) stderr() output { return &streamOutput{s, &s.part.stderr} }

// A streamOutput is one of the two outputs of a stream.
type streamOutput struct {
	*stream
	collected *[]byte
}

func (o *streamOutput) Write(p []byte) (n int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for o.part.size() == maxPart && !o.closed {
			o.changed.Wait()
		}
		if o.closed {
			return n, errUnread
		}
		before := o.part.size()
		more := p[n:min(len(p), n+maxPart-before)]
		*o.collected = append(*o.collected, more...)
		n += len(more)
		if after := o.part.size(); after > before && (before == 0 || after == maxPart) {
			o.wake()
		}
		if n == len(p) {
			return n, nil
		}
	}
}

// Bytes returns what was written and not taken, once.
func (o *streamOutput) Bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	rest := *o.collected
	*o.collected = nil
	return rest
}
