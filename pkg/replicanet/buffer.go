package replicanet

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Data that arrives is put into memory that is used again: powers of two from block size to the longest data, aligned to a
// block so that a disk can take it as it is.
const (
	minClass = 12 // 4 KiB
	maxClass = 20 // 1 MiB
)

var pools [maxClass - minClass + 1]sync.Pool

// getBuffer returns n bytes of any content, aligned to 4 KiB; n is at most replication.MaxData.
func getBuffer(n int) []byte {
	c := class(n)
	if p, _ := pools[c].Get().(unsafe.Pointer); p != nil {
		return unsafe.Slice((*byte)(p), 1<<(c+minClass))[:n]
	}
	return newBuffer(1 << (c + minClass))[:n]
}

// putBuffer takes back what getBuffer returned. Anything else is left to the garbage collector.
func putBuffer(b []byte) {
	n := cap(b)
	if n < 1<<minClass || n > 1<<maxClass || n&(n-1) != 0 {
		return
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)&(1<<minClass-1) != 0 {
		return
	}
	pools[class(n)].Put(p)
}

func class(n int) int {
	return max(bits.Len(uint(n-1)), minClass) - minClass
}

func newBuffer(n int) []byte {
	b := make([]byte, n)
	if off := uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (1<<minClass - 1); off != 0 {
		b = make([]byte, n+1<<minClass)
		off = -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (1<<minClass - 1)
		b = b[off : off+uintptr(n) : off+uintptr(n)]
	}
	return b
}
