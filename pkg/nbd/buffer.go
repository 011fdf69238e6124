package nbd

import (
	"math/bits"
	"sync"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/disk"
)

// Buffers come in powers of two from a block to block.MaxIO, and begin at a multiple of a block: what is stored or
// fetched with direct I/O is then not copied.
var buffers [16]sync.Pool

// buffer is bytes to be given back.
type buffer struct {
	b     []byte
	class int
}

// getBuffer returns a buffer with n bytes, at most block.MaxIO, of whatever content.
func getBuffer(n int) *buffer {
	class := bits.Len(uint(max(n, 1)-1) / block.Size)
	if p, ok := buffers[class].Get().(*buffer); ok {
		p.b = p.b[:n]
		return p
	}
	return &buffer{b: disk.Aligned(block.Size << class)[:n], class: class}
}

// release gives a buffer back; nil is none.
func (p *buffer) release() {
	if p != nil {
		buffers[p.class].Put(p)
	}
}

// window is what a connection's requests in flight may use, in bytes. One goroutine takes, any gives.
type window struct {
	mu   sync.Mutex
	free int
	wake chan struct{} // of capacity 1
}

func newWindow() *window { return &window{free: Window, wake: make(chan struct{}, 1)} }

// take waits for n bytes, at most Window. It is false when done is closed first.
func (w *window) take(done <-chan struct{}, n int) bool {
	for {
		w.mu.Lock()
		if w.free >= n {
			w.free -= n
			w.mu.Unlock()
			return true
		}
		w.mu.Unlock()
		select {
		case <-w.wake:
		case <-done:
			return false
		}
	}
}

func (w *window) give(n int) {
	w.mu.Lock()
	w.free += n
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
