package main

import (
	"runtime/debug"
	"sync/atomic"
)

// A memoryKeeper keeps the memory of a broker close to what the broker holds.
type memoryKeeper struct {
	max     size // of requests and replies that the broker holds
	limit   size // of Go's memory, as the runtime knows it
	peak    size // of what the broker held since memory was returned to the system
	large   bool // a large message has passed since then
	freeing atomic.Bool
}

// memoryMargin is what a broker takes besides the requests and replies that it holds, in bytes.
const memoryMargin = 28 << 20

func newMemoryKeeper(max size) *memoryKeeper {
	returnLongFrames()
	return &memoryKeeper{max: max}
}

// passed is called for each message. A long one leaves as much garbage.
func (k *memoryKeeper) passed(length size) {
	k.large = k.large || length >= minFreed
}

// keep is called again and again, with the bytes that the broker holds itself and those that ZeroMQ
// holds for it. They are limited together, but Go's runtime knows only of the first.
func (k *memoryKeeper) keep(held, queued size) {
	if limit := k.max - queued + memoryMargin; limit <= k.limit-minFreed || limit >= k.limit+minFreed {
		debug.SetMemoryLimit(int64(limit))
		k.limit = limit
	}
	k.peak = max(k.peak, held+queued)
	if (k.large || k.peak-held-queued >= minFreed) && !k.freeing.Swap(true) {
		k.large, k.peak = false, held+queued
		go func() { // A collection takes longer than the loop may.
			debug.FreeOSMemory()
			trimMemory()
			k.freeing.Store(false)
		}()
	}
}
