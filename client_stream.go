package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
)

// stream makes a single request, and prints what comes of it as it comes. waits shows what the request
// waits for while nothing has come.
func (t *requestTool) stream(client *Client, request *call, status *statusLine, waits func() time.Time) error {
	// If the reader of standard output exits, do not die of SIGPIPE before the request is taken back.
	signal.Ignore(syscall.SIGPIPE)
	keepMemory()
	// A broker that knows no credit sends as much as the connection takes.
	client.options = append(client.options, func(s *socket) error { return s.SetRcvhwm(maxUnread) })
	p := newStreamPrinter(t.outputTo(os.Stdout), client.waiter.Wake, client.interruptible())
	progress := &streamProgress{status: status, service: t.Name, printer: p, onTerminal: isatty.IsTerminal(os.Stdout.Fd())}
	request.stream = &callStream{take: func(part Reply) {
		progress.makeRoom(part)
		p.add(part)
	}}
	err := client.do(request, func() (due time.Time) {
		client.Written(request, p.takeWritten())
		if request.stream.parts == 0 {
			return waits()
		}
		return progress.show(request.stream.unwritten)
	})
	status.hide()
	if err != nil {
		return err
	}
	p.add(request.reply)
	if err := p.finish(client.stop); err != nil {
		return err
	}
	switch parts := request.stream.parts; {
	case request.err != nil && parts > 0:
		return t.explain(client, fmt.Errorf("%w; the output is incomplete", request.err))
	case request.err != nil:
		return t.explain(client, request.err)
	default:
		t.console("brequest").debugf("%s: parts received: %d, and the end, with status %d", t.Name, parts, request.reply.Status)
	}
	return failureIn(request.reply)
}

// maxUnread is how many messages a connection holds that nobody has received.
const maxUnread = 64

// A streamPrinter prints the parts of a reply in a goroutine of its own: the loop that owns the socket must
// not wait for a slow reader. What is in its queue is limited by those who add to it.
type streamPrinter struct {
	out  *outputWriter
	wake func()                  // called when something was written
	fail context.CancelCauseFunc // called when nothing can be written any more

	mutex   sync.Mutex
	queued  sync.Cond // a part, or the end
	queue   []Reply
	closed  bool
	written []Reply // since the last takeWritten
	bytes   size    // of all that were written

	ended chan struct{}
	err   error // why it ended early
}

func newStreamPrinter(out *outputWriter, wake func(), fail context.CancelCauseFunc) *streamPrinter {
	p := &streamPrinter{out: out, wake: wake, fail: fail, ended: make(chan struct{})}
	p.queued.L = &p.mutex
	go p.run()
	return p
}

// add prints a part after the others. It does not wait.
func (p *streamPrinter) add(part Reply) {
	p.mutex.Lock()
	p.queue = append(p.queue, part)
	p.mutex.Unlock()
	p.queued.Signal()
}

// finish waits until all parts are written, or stop is done.
func (p *streamPrinter) finish(stop context.Context) error {
	p.mutex.Lock()
	p.closed = true
	p.mutex.Unlock()
	p.queued.Signal()
	select {
	case <-p.ended:
		return p.err
	case <-stop.Done():
		return context.Cause(stop)
	}
}

// takeWritten returns the parts that were written since the last time.
func (p *streamPrinter) takeWritten() []Reply {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	written := p.written
	p.written = nil
	return written
}

// size returns the bytes that were written in all.
func (p *streamPrinter) size() size {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.bytes
}

func (p *streamPrinter) run() {
	defer close(p.ended)
	err := p.print()
	if err == nil {
		err = p.out.finish()
	}
	if err != nil {
		p.err = outputFailure(err)
		p.fail(p.err)
	}
}

// print prints parts up to the end. Short ones that wait are written together.
func (p *streamPrinter) print() error {
	var written []Reply // since the last flush
	for {
		part, more, ok := p.next()
		if !ok {
			return nil
		}
		p.out.write(part.Output)
		if len(part.Stderr) > 0 {
			if err := p.out.Flush(); err != nil {
				return err
			}
			os.Stderr.Write(part.Stderr)
		}
		written = append(written, part)
		if more && p.out.Buffered() > 0 {
			continue
		}
		if err := p.out.Flush(); err != nil {
			return err
		}
		p.report(written)
		written = written[:0]
	}
}

// report tells the loop that parts were written.
func (p *streamPrinter) report(written []Reply) {
	p.mutex.Lock()
	for _, part := range written {
		p.bytes += sizeOf(part.Output) + size(len(part.Stderr))
	}
	p.written = append(p.written, written...)
	p.mutex.Unlock()
	p.wake()
}

// next waits for the next part, and tells whether there are more behind it. At the end it is not ok.
func (p *streamPrinter) next() (part Reply, more, ok bool) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for len(p.queue) == 0 {
		if p.closed {
			return Reply{}, false, false
		}
		p.queued.Wait()
	}
	part, p.queue[0] = p.queue[0], Reply{}
	p.queue = p.queue[1:]
	return part, len(p.queue) > 0, true
}

// A streamProgress shows how much of a reply was written where that is not to be seen.
type streamProgress struct {
	status     *statusLine
	service    string
	printer    *streamPrinter
	onTerminal bool      // the output is to be seen
	begin      time.Time // of the first part

	text       bool // there is some on standard error that may be unwritten
	unfinished bool // it does not end in a newline
}

// makeRoom hides the line if a part that is about to be printed is on the same terminal.
func (s *streamProgress) makeRoom(part Reply) {
	if s.begin.IsZero() {
		s.begin = time.Now()
	}
	if text := part.Stderr; len(text) > 0 {
		s.text, s.unfinished = true, !bytes.HasSuffix(text, []byte("\n"))
	}
	if s.onTerminal || s.text {
		s.status.hide()
	}
}

// show shows the line if that is due, with the number of parts that are unwritten. It returns when it is due
// again.
func (s *streamProgress) show(unwritten int) (due time.Time) {
	s.text = s.text && unwritten > 0
	if s.onTerminal || s.text || s.unfinished {
		return due
	}
	return s.status.show(time.Second, func() string {
		elapsed, written := time.Since(s.begin), s.printer.size()
		rate := size(float64(written) / elapsed.Seconds())
		return fmt.Sprintf("brequest: %s: %s, %s/s, %v", s.service, inUnits(written), inUnits(rate), elapsed.Round(time.Second))
	})
}

// inUnits returns a number of bytes for a person, with two digits at least.
func inUnits(n size) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	value, unit := float64(n), 0
	for ; value >= 1000 && unit < len(units)-1; unit++ {
		value /= 1024
	}
	if value < 9.95 && unit > 0 {
		return fmt.Sprintf("%.1f %s", value, units[unit])
	}
	return fmt.Sprintf("%.0f %s", value, units[unit])
}
