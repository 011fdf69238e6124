package fuseloop

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// keepResident is how much of an idle reader's buffer may stay in memory, in bytes.
	keepResident = 64 << 10
	// spareBuffers bounds the free list.
	spareBuffers = 8
)

// buffer holds one request and its answer, outside Go's heap: page-aligned, given back to the kernel page by page.
type buffer struct {
	mem []byte
	// dirty bounds how many bytes of the data pages were touched since they were last given back.
	dirty int
}

// trim gives the memory back that a large request touched. The buffer holds nothing of use.
func (b *buffer) trim() {
	if b.dirty > keepResident {
		// An error leaves the memory resident, no more.
		_ = unix.Madvise(b.mem[pageSize:], unix.MADV_DONTNEED)
		b.dirty = 0
	}
}

// buffers are shared by all devices of a frontend.
type buffers struct {
	mu    sync.Mutex
	spare []*buffer
}

func (p *buffers) get() (*buffer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.spare); n > 0 {
		b := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return b, nil
	}
	mem, err := unix.Mmap(-1, 0, bufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map a request buffer: %w", err)
	}
	// With huge pages every small request would cost 2 MiB. Kernels without them refuse, which is as good.
	_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
	return &buffer{mem: mem}, nil
}

func (p *buffers) put(b *buffer) {
	b.trim()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spare) < spareBuffers {
		p.spare = append(p.spare, b)
		return
	}
	// Of a mapping of our own, munmap cannot fail.
	_ = unix.Munmap(b.mem)
}

func (p *buffers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.spare {
		_ = unix.Munmap(b.mem)
	}
	p.spare = nil
}
