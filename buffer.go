package main

import (
	"bytes"
	"io"
	"os"
	"runtime/debug"
)

// A buffer gathers bytes of which there may be a large part of the memory. Unlike a
// bytes.Buffer it does not copy them as it grows: they are held once while they come in, and
// twice for a moment when they are joined.
type buffer struct {
	chunks [][]byte // all but the last are full
}

// maxChunk is the longest chunk, in bytes, that a buffer allocates by itself. Payloads from
// this length on are worth an effort to give their memory back.
const maxChunk = 16 << 20

// room returns space for the next bytes, at least one. A new chunk has space for n bytes, or
// else for twice as many as the one before.
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

// freeMemory returns memory to the system after so many bytes became garbage, unless they
// are too few to be worth the collection.
func freeMemory(garbage size) {
	if garbage >= maxChunk {
		debug.FreeOSMemory()
	}
}
