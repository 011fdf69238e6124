package fuseloop

import (
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Request numbers of the FUSE protocol (include/uapi/linux/fuse.h); the structs are go-fuse's.
const (
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opInit        = 26
	opDestroy     = 38
	opBatchForget = 42
	opFallocate   = 43
)

const (
	pageSize = 4096
	// maxIO bounds one FUSE read or write, in bytes; the kernel splits longer ones.
	maxIO = 1 << 20
	// headerAt is where a request is read to: a WRITE's payload then starts at a page, as O_DIRECT below may want.
	headerAt = pageSize - int(unsafe.Sizeof(fuse.WriteIn{}))
	// readReplyAt is where the answer to a READ starts, so that it is one piece with the data.
	readReplyAt = pageSize - int(unsafe.Sizeof(fuse.OutHeader{}))
	bufferSize  = pageSize + maxIO
)

// input is a request's header and arguments.
type input interface {
	fuse.InHeader | fuse.InitIn | fuse.OpenIn | fuse.ReadIn | fuse.WriteIn | fuse.FsyncIn | fuse.FallocateIn
}

// output is the body of an answer.
type output interface {
	fuse.InitOut | fuse.OpenOut | fuse.WriteOut | fuse.AttrOut | fuse.StatfsOut
}

// request views the request of n bytes in buf, or nil if it is too short. It is copied by the caller where the answer
// overwrites it.
func request[T input](buf []byte, n int) *T {
	if n < int(unsafe.Sizeof(*new(T))) {
		return nil
	}
	return (*T)(unsafe.Pointer(&buf[headerAt]))
}

// reply composes an answer with a body at the start of buf.
func reply[T output](buf []byte, unique uint64, body T) []byte {
	const head = int(unsafe.Sizeof(fuse.OutHeader{}))
	*(*T)(unsafe.Pointer(&buf[head])) = body
	return header(buf[:head+int(unsafe.Sizeof(body))], unique, 0)
}

// header writes an answer's header at the start of all of it.
func header(all []byte, unique uint64, status int32) []byte {
	*(*fuse.OutHeader)(unsafe.Pointer(&all[0])) = fuse.OutHeader{Length: uint32(len(all)), Status: status, Unique: unique}
	return all
}
