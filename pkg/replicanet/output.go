package replicanet

import (
	"bufio"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// output writes frames to a socket. Its methods are not called at once, but for close.
type output interface {
	// write writes from the beginning of fs and returns how many frames need not be kept any more. It makes one attempt;
	// without block it returns at once where the socket takes nothing.
	write(fs []frame, block bool) (int, error)
	// pending tells whether something is left to write of frames that write has let go of.
	pending() bool
	close()
}

// maxVectors is UIO_MAXIOV, writev(2).
const maxVectors = 1024

// socket writes to a TCP connection with writev(2), without waiting where that is wanted: what package net offers waits.
type socket struct {
	tcp *net.TCPConn
	raw syscall.RawConn
	iov []unix.Iovec
	// off is how much of the first frame is written.
	off int

	// Arguments and results of attempt, which is made once so as not to allocate.
	attempt func(fd uintptr) bool
	block   bool
	n       int
	err     error
}

func newSocket(tcp *net.TCPConn) (*socket, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{tcp: tcp, raw: raw}
	s.attempt = s.writev
	return s, nil
}

func (s *socket) pending() bool { return false }

func (s *socket) close() { s.tcp.Close() }

func (s *socket) write(fs []frame, block bool) (int, error) {
	s.iov = s.iov[:0]
	skip := s.off
	for i := range fs {
		if len(s.iov) > maxVectors-3 {
			break
		}
		f := &fs[i]
		skip = s.add(f.head[:], skip)
		skip = s.add(f.rest, skip)
		skip = s.add(f.data, skip)
	}
	n, err := s.send(block)
	s.off += n
	done := 0
	for done < len(fs) && s.off >= fs[done].len() {
		s.off -= fs[done].len()
		done++
	}
	return done, err
}

// add appends what is left of p after skip bytes, and returns what is left of skip.
func (s *socket) add(p []byte, skip int) int {
	if skip >= len(p) {
		return skip - len(p)
	}
	p = p[skip:]
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	s.iov = append(s.iov, v)
	return 0
}

// send makes one writev of iov, and returns the bytes written.
func (s *socket) send(block bool) (int, error) {
	s.block, s.n, s.err = block, 0, nil
	if err := s.raw.Write(s.attempt); err != nil {
		return 0, err
	}
	clear(s.iov) // they keep data from the garbage collector
	return s.n, s.err
}

// writev is called by the runtime's poller, again when the socket can take something, until it returns true.
func (s *socket) writev(fd uintptr) bool {
	for {
		n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.iov))), uintptr(len(s.iov)))
		switch errno {
		case 0:
			s.n = int(n)
			return true
		case unix.EINTR:
		case unix.EAGAIN:
			return !s.block
		default:
			s.err = errno
			return true
		}
	}
}

const (
	// maxRecord is the longest plaintext of a TLS record, RFC 8446 (5.1).
	maxRecord = 16 << 10
	// sealAhead is how much is encrypted before it is written, in bytes.
	sealAhead = 128 << 10
)

// maxSealed bounds what one connection encrypts, in bytes, since its keys are never changed: 2^28 records. (RFC 8446, 5.5,
// asks for new keys in time, for AES-GCM after some 2^24.5 records where the margin is to be 2^-57; it is 2^-50 here.)
// Links are made anew on another connection: after an hour of writing at 1 GB/s.
const maxSealed = maxRecord << 28

var errWornOut = errors.New("the connection has carried as much as its keys are good for")

// sealed writes frames through TLS: short frames share records, and many records one system call.
type sealed struct {
	tls     *tls.Conn
	out     *sink
	plain   []byte
	carried int64 // encrypted so far
}

func (s *sealed) pending() bool { return s.out.buffered() > 0 }

func (s *sealed) close() { s.out.sock.close() }

func (s *sealed) write(fs []frame, block bool) (int, error) {
	if n := s.out.buffered(); n > 0 && (!block || n >= sealAhead) {
		if err := s.out.push(block); err != nil || !block {
			return 0, err
		}
	}
	if s.carried > maxSealed {
		return 0, errWornOut
	}
	done := 0
	for size := 0; done < len(fs) && size < sealAhead; done++ {
		f := &fs[done]
		size += f.len()
		if !block && size > 2*sealAhead {
			break // who flushes is not kept so long
		}
		for _, p := range [...][]byte{f.head[:], f.rest, f.data} {
			if err := s.add(p, block); err != nil {
				return 0, err
			}
		}
	}
	if err := s.seal(); err != nil {
		return 0, err
	}
	for i := range fs[:done] {
		s.carried += int64(fs[i].len())
	}
	return done, s.out.push(block)
}

// add puts p into the record that is being filled, or makes whole records of it.
func (s *sealed) add(p []byte, block bool) error {
	for len(p) > 0 {
		if len(s.plain) == 0 && len(p) >= maxRecord {
			n := min(len(p)/maxRecord*maxRecord, sealAhead/2)
			if _, err := s.tls.Write(p[:n]); err != nil {
				return err
			}
			p = p[n:]
			if block && s.out.buffered() >= sealAhead {
				if err := s.out.push(true); err != nil {
					return err
				}
			}
			continue
		}
		n := min(len(p), maxRecord-len(s.plain))
		s.plain = append(s.plain, p[:n]...)
		p = p[n:]
		if len(s.plain) == maxRecord {
			if err := s.seal(); err != nil {
				return err
			}
		}
	}
	return nil
}

// seal ends the record that is being filled.
func (s *sealed) seal() error {
	if len(s.plain) == 0 {
		return nil
	}
	_, err := s.tls.Write(s.plain)
	s.plain = s.plain[:0]
	return err
}

// sink is what TLS writes to and reads from. After the handshake it gathers what is written until it is pushed. It gives
// TLS no more than the record that is being read, so that what is in its buffer is all that has come.
type sink struct {
	*net.TCPConn
	sock *socket
	in   *bufio.Reader
	// record is what is left to read of the present record.
	record int

	mu     sync.Mutex // TLS itself writes now and then (a change of keys), from the goroutine that reads
	gather bool
	buf    []byte
	// next is what is being pushed, the end of whole. Only who pushes touches the two.
	next, whole []byte
}

func (s *sink) Read(p []byte) (int, error) {
	if s.record == 0 {
		h, err := s.in.Peek(recordHead)
		if err != nil {
			return 0, err
		}
		s.record = recordLen(h)
	}
	n, err := s.in.Read(p[:min(len(p), s.record)])
	s.record -= n
	return n, err
}

// A TLS record, RFC 8446 (5.2): type, version, length; then what is sealed, which ends with its type and a tag.
const (
	recordHead     = 5
	recordOverhead = recordHead + 1 + 16
)

func recordLen(h []byte) int { return recordHead + int(h[3])<<8 + int(h[4]) }

// ready is how many bytes can be read through TLS without waiting.
func (s *sink) ready() int {
	b, _ := s.in.Peek(s.in.Buffered())
	n := 0
	for len(b) >= recordHead {
		l := recordLen(b)
		if l > len(b) {
			break
		}
		n += max(0, l-recordOverhead)
		b = b[l:]
	}
	return n
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.gather {
		return s.TCPConn.Write(p)
	}
	s.buf = append(s.buf, p...)
	return len(p), nil
}

// buffered is what waits to be pushed; only who pushes asks.
func (s *sink) buffered() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.buf) + len(s.next)
}

// push writes what was gathered: all of it, or what the socket takes at once.
func (s *sink) push(block bool) error {
	for {
		if len(s.next) == 0 {
			s.mu.Lock()
			s.whole, s.buf = s.buf, s.whole[:0]
			s.mu.Unlock()
			s.next = s.whole
		}
		if len(s.next) == 0 {
			return nil
		}
		v := unix.Iovec{Base: unsafe.SliceData(s.next)}
		v.SetLen(len(s.next))
		s.sock.iov = append(s.sock.iov[:0], v)
		n, err := s.sock.send(block)
		if err != nil {
			return err
		}
		s.next = s.next[n:]
		if !block && len(s.next) > 0 {
			return nil
		}
	}
}
