package engine

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// buffer holds the bytes of one operation until the last user lets go. What a transport may still be reading when it is
// given up is never used again: the garbage collector has it.
type buffer struct {
	b    []byte
	refs atomic.Int32
}

const minBuffer = 4 << 10

// buffers by size: 4 KiB, 8 KiB … MaxData.
var buffers [9]sync.Pool

func init() {
	if minBuffer<<(len(buffers)-1) != replication.MaxData {
		panic("the sizes of buffers do not end at that of the largest operation")
	}
}

func sizeClass(n int) int { return bits.Len(uint(max(n, minBuffer)-1) >> 12) }

// getBuffer returns a buffer of n bytes, at most MaxData, with one user.
func getBuffer(n int) *buffer {
	c := sizeClass(n)
	b, _ := buffers[c].Get().(*buffer)
	if b == nil {
		b = &buffer{b: make([]byte, minBuffer<<c)}
	}
	b.b = b.b[:n]
	b.refs.Store(1)
	return b
}

func (b *buffer) retain() { b.refs.Add(1) }

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		buffers[sizeClass(cap(b.b))].Put(b)
	}
}
