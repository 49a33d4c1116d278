package main

import (
	"bytes"
	"io"
	"os"
	"runtime/debug"
)

// chunks are bytes of which there may be so many that it matters how often they are held:
// not more than twice, and once in the end.
type chunks struct {
	list [][]byte // all but the last are full
}

// large is such a number of bytes.
const large = 16 << 20

// room is where the next bytes go, one at least, which take then takes. A new chunk has
// room for so many, or else is longer than the last.
func (c *chunks) room(many int) []byte {
	n := len(c.list)
	if n == 0 || len(c.list[n-1]) == cap(c.list[n-1]) {
		if n > 0 {
			many = max(many, min(2*cap(c.list[n-1]), large))
		}
		c.list = append(c.list, make([]byte, 0, many))
	}
	last := c.list[len(c.list)-1]
	return last[len(last):cap(last)]
}

func (c *chunks) take(n int) {
	last := &c.list[len(c.list)-1]
	*last = (*last)[:len(*last)+n]
}

func (c *chunks) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := copy(c.room(len(rest)), rest)
		c.take(n)
		rest = rest[n:]
	}
	return len(p), nil
}

// Bytes are all of them, in one piece.
func (c *chunks) Bytes() []byte {
	if len(c.list) == 1 {
		return c.list[0]
	}
	all := bytes.Join(c.list, nil)
	c.list = [][]byte{all}
	freeIfLarge(size(len(all)))
	return all
}

// freeIfLarge gives back memory that is not used any more, if it may be that much.
func freeIfLarge(length size) {
	if length >= large {
		debug.FreeOSMemory()
	}
}

// readAll is io.ReadAll for input that may take most of the memory.
func readAll(file *os.File) ([]byte, error) {
	var all chunks
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() {
		all.list = [][]byte{make([]byte, 0, info.Size()+1)} // it ends in there
	}
	for {
		n, err := file.Read(all.room(4 << 10))
		all.take(n)
		if err == io.EOF {
			return all.Bytes(), nil
		}
		if err != nil {
			return nil, err
		}
	}
}
