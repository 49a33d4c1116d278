package main

import (
	"bytes"
	"io"
	"os"
	"runtime/debug"
)

// A buffer collects data that may fill a large part of memory. Unlike a bytes.Buffer it does not copy
// as it grows; Bytes copies once.
type buffer struct {
	chunks [][]byte // all but the last are full
}

const (
	maxChunk = 1 << 20  // the longest chunk, in bytes, that a buffer allocates by itself
	minFreed = 16 << 20 // bytes of garbage that are worth a collection
)

// room returns space for the next bytes, at least one. A new chunk has space for at least n bytes,
// and doubles the last one up to maxChunk.
func (b *buffer) room(n int) []byte {
	last := len(b.chunks) - 1
	if last < 0 || len(b.chunks[last]) == cap(b.chunks[last]) {
		if last >= 0 {
			n = max(n, min(2*cap(b.chunks[last]), maxChunk))
		}
		b.chunks = append(b.chunks, make([]byte, 0, n))
		last++
	}
	chunk := b.chunks[last]
	return chunk[len(chunk):cap(chunk)]
}

// filled adds n bytes that were put into room.
func (b *buffer) filled(n int) {
	last := &b.chunks[len(b.chunks)-1]
	*last = (*last)[:len(*last)+n]
}

func (b *buffer) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := copy(b.room(len(rest)), rest)
		b.filled(n)
		rest = rest[n:]
	}
	return len(p), nil
}

// Bytes joins the bytes into one piece and returns it.
func (b *buffer) Bytes() []byte {
	if len(b.chunks) == 1 {
		return b.chunks[0]
	}
	joined := bytes.Join(b.chunks, nil)
	b.chunks = [][]byte{joined}
	freeMemory(size(len(joined)))
	return joined
}

// readAll is io.ReadAll for input that may take a large part of the memory.
func readAll(file *os.File) ([]byte, error) {
	var input buffer
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() {
		input.room(int(info.Size()) + 1) // one more, so that the end of the file fits in
	}
	for {
		n, err := file.Read(input.room(4 << 10))
		input.filled(n)
		if err == io.EOF {
			return input.Bytes(), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// freeMemory returns memory to the system after so many bytes have become garbage, unless they are
// too few to be worth a collection.
func freeMemory(garbage size) {
	if garbage >= minFreed {
		debug.FreeOSMemory()
	}
}
