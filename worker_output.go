package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// An output takes what a process prints and keeps what a reply needs of it.
type output interface {
	io.Writer
	Bytes() []byte
}

// An outputPipe brings what a process prints to an output.
type outputPipe struct {
	*os.File          // the end to read
	end      *os.File // the other one, which is for the process
	to       io.Writer
}

// pipeTo opens a pipe to an output and returns the end for the process. exec would open one too, but would
// close it --kill-after after the end of the process, even if its data was not read for want of credit.
func (p *process) pipeTo(to io.Writer) (io.Writer, error) {
	from, end, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.pipes = append(p.pipes, outputPipe{from, end, to})
	return end, nil
}

// A copyBuffer holds as much as a pipe.
type copyBuffer [64 << 10]byte

// maxHeld is more bytes than any pipe holds.
const maxHeld = 1 << 20

// copyOutput copies what the process prints, and all that it has printed when it ends. A child of it
// that keeps the output open is read for --kill-after more. What is in the pipe by then is still read,
// however long that takes for want of credit: it may be from the process itself.
func (c *CmdService) copyOutput(p *process, pipe outputPipe) {
	defer pipe.Close()
	data, ok := c.copyBuffers.Get().(*copyBuffer)
	if !ok {
		data = new(copyBuffer)
	}
	defer c.copyBuffers.Put(data)
	for left, exited := maxHeld, false; left > 0; {
		n, err := pipe.Read(data[:])
		switch late := errors.Is(err, os.ErrDeadlineExceeded); {
		case late && !exited: // The process has ended.
			<-p.exited
			exited = true
			pipe.SetReadDeadline(time.Now().Add(c.KillAfter))
			continue
		case late:
			n = pipe.readNow(data[:])
			left -= max(n, 0)
		}
		if n > 0 {
			if _, failed := pipe.to.Write(data[:n]); failed != nil {
				if failed == errUnread {
					p.cut.Store(true)
				}
				return
			}
		}
		if n <= 0 {
			return
		}
	}
}

// readNow reads what is in the pipe, without waiting for more.
func (p outputPipe) readNow(data []byte) (n int) {
	p.SetReadDeadline(time.Time{})
	defer p.SetReadDeadline(time.Now())
	if connection, err := p.SyscallConn(); err == nil {
		connection.Read(func(fd uintptr) (done bool) {
			n, _ = syscall.Read(int(fd), data) // -1 if there is nothing
			return true
		})
	}
	return n
}

// A limitedOutput passes up to a number of bytes on, and ends the process that prints more.
type limitedOutput struct {
	output
	left, limit size // no limit if it is 0
	end         context.CancelCauseFunc
}

func newLimitedOutput(to output, limit size, end context.CancelCauseFunc) *limitedOutput {
	return &limitedOutput{to, limit, limit, end}
}

func (o *limitedOutput) Write(p []byte) (int, error) {
	if o.limit == 0 {
		return o.output.Write(p)
	}
	n, err := o.output.Write(p[:min(size(len(p)), o.left)])
	o.left -= size(n)
	if err == nil && n < len(p) {
		err = &failure{status: exitIO, err: fmt.Errorf("ended because it printed more than --max-output %d bytes", o.limit)}
		o.end(err)
	}
	return n, err
}

// A tailBuffer passes everything on to a log and keeps the end of what was written for a request.
type tailBuffer struct {
	mu   sync.Mutex // a coprocess writes while requests begin
	log  lineWriter
	tail []byte // up to twice tailLength bytes
}

const tailLength = 64 << 10

func (b *tailBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log.Write(p)
	b.tail = append(b.tail, p...)
	if surplus := len(b.tail) - tailLength; surplus > tailLength {
		b.tail = append(b.tail[:0], b.tail[surplus:]...)
	}
	return len(p), nil
}

// Bytes returns the last tailLength bytes.
func (b *tailBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tail[max(0, len(b.tail)-tailLength):]
}

// Begin begins with the next request, whose lines get a label in the log.
func (b *tailBuffer) Begin(label string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log.Flush()
	b.log.prefix, b.tail = label, nil
}

// End completes the last line in the log.
func (b *tailBuffer) End() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.log.Flush()
}
