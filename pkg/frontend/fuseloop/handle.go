package fuseloop

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
)

// handle carries out the request of n bytes in buf, and returns the answer, which lies in buf too, or nil if it has none.
func (s *server) handle(buf *buffer, n int) []byte {
	mem := buf.mem
	in := request[fuse.InHeader](mem, n)
	if in == nil {
		return nil // not a request
	}
	unique := in.Unique
	fail := func(errno unix.Errno) []byte { return header(mem[:16], unique, -int32(errno)) }
	done := func() []byte { return header(mem[:16], unique, 0) }

	switch in.Opcode {
	case opRead:
		r := request[fuse.ReadIn](mem, n)
		if r == nil || r.Size > maxIO {
			return fail(unix.EINVAL)
		}
		off, size := int64(r.Offset), int64(r.Size)
		size = max(0, min(size, s.dev.Size()-off)) // a read past the end is short
		buf.dirty = max(buf.dirty, int(size))
		if err := s.dev.ReadAt(s.ctx, mem[pageSize:pageSize+size], off); err != nil {
			s.failed("read", off, size, err)
			return fail(unix.EIO)
		}
		return header(mem[readReplyAt:pageSize+size], unique, 0)

	case opWrite:
		w := request[fuse.WriteIn](mem, n)
		if w == nil || int(w.Size) != n-(pageSize-headerAt) {
			return fail(unix.EINVAL)
		}
		if s.readOnly {
			return fail(unix.EROFS)
		}
		off, size := int64(w.Offset), w.Size
		if err := s.dev.WriteAt(s.ctx, mem[pageSize:pageSize+int(size)], off); err != nil {
			s.failed("write", off, int64(size), err)
			return fail(unix.EIO)
		}
		return reply(mem, unique, fuse.WriteOut{Size: size})

	case opFsync:
		if err := s.dev.Flush(s.ctx); err != nil {
			s.failed("flush", 0, 0, err)
			return fail(unix.EIO)
		}
		return done()

	case opFallocate:
		f := request[fuse.FallocateIn](mem, n)
		if f == nil {
			return fail(unix.EINVAL)
		}
		return header(mem[:16], unique, -int32(s.fallocate(f)))

	case opGetattr:
		size := uint64(s.dev.Size())
		return reply(mem, unique, fuse.AttrOut{Attr: fuse.Attr{ // valid for no time: the size may change
			Ino: in.NodeId, Size: size, Blocks: size / 512, Mode: unix.S_IFREG | 0o600, Nlink: 1, Blksize: block.Size,
		}})

	case opOpen:
		o := request[fuse.OpenIn](mem, n)
		if o == nil {
			return fail(unix.EINVAL)
		}
		if s.readOnly && o.Flags&unix.O_ACCMODE != unix.O_RDONLY {
			return fail(unix.EROFS)
		}
		return reply(mem, unique, fuse.OpenOut{OpenFlags: fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES | fuse.FOPEN_NOFLUSH})

	case opStatfs:
		size := uint64(s.dev.Size())
		// The loop driver takes the discard granularity from here.
		return reply(mem, unique, fuse.StatfsOut{Blocks: size / block.Size, Bsize: block.Size, Frsize: block.Size, NameLen: 255})

	case opInit:
		return s.init(mem, n, unique)

	case opRelease, opDestroy:
		return done()
	case opForget, opBatchForget:
		return nil
	default:
		// The kernel does not ask again. INTERRUPT is among them: a request ends when the device is done with it.
		return fail(unix.ENOSYS)
	}
}

func (s *server) init(mem []byte, n int, unique uint64) []byte {
	in := request[fuse.InitIn](mem, n)
	if in == nil || in.Major != 7 || in.Minor < minMinor {
		s.log.Error("the kernel's FUSE is too old; Linux 5.9 or newer is needed")
		return header(mem[:16], unique, -int32(unix.EPROTO))
	}
	const want = fuse.CAP_ASYNC_READ | fuse.CAP_BIG_WRITES | fuse.CAP_ASYNC_DIO | fuse.CAP_PARALLEL_DIROPS | fuse.CAP_MAX_PAGES
	return reply(mem, unique, fuse.InitOut{
		Major: 7, Minor: min(in.Minor, 36), MaxReadAhead: in.MaxReadAhead, Flags: in.Flags & want,
		MaxBackground: maxBackground, CongestionThreshold: maxBackground, MaxWrite: maxIO, TimeGran: 1, MaxPages: maxIO / pageSize,
	})
}

// fallocate is what the loop driver makes of discard and write-zeroes.
func (s *server) fallocate(f *fuse.FallocateIn) unix.Errno {
	if s.readOnly {
		return unix.EROFS
	}
	switch f.Mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
	default:
		return unix.EOPNOTSUPP
	}
	off, size := int64(f.Offset), int64(f.Length)
	if err := s.dev.Zero(s.ctx, off, size); err != nil {
		if errors.Is(err, block.ErrRange) {
			return unix.EINVAL
		}
		s.failed("zero", off, size, err)
		return unix.EIO
	}
	return 0
}

// failed logs a request that the kernel will see as an I/O error; not each of a flood, and none of an abort's.
func (s *server) failed(what string, off, size int64, err error) {
	if s.ctx.Err() != nil {
		return
	}
	s.failures.Do(func() {
		s.log.Error("device failed a request", "request", what, "offset", off, "length", size, "error", err)
	})
}
