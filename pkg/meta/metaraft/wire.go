package metaraft

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// A connection begins with a preface and a byte that says what it is for: raft's own protocol, or calls. Calls and their
// answers are frames, in any order: length of the payload u32, number of the call u64, kind u8 (of the call or of the
// answer), time that the caller waits u32 (milliseconds; 0 in answers), payload. Numbers are big endian.
const (
	preface     = "BLM1"
	forRaft     = 'r'
	forCalls    = 'c'
	frameHeader = 4 + 8 + 1 + 4
	// maxPayload bounds a frame: the largest entry, or the answer to it, fits.
	maxPayload = 1 << 20
)

// callKind says what is asked of another controller.
type callKind uint8

const (
	callPropose callKind = 1 // an entry for the log -> its result; leader only
	callRead    callKind = 2 // -> an index that covers all that was acknowledged before the call; leader only
	callTerm    callKind = 3 // -> the term that the controller has reached
	callKnown   callKind = 4 // id of a controller -> what is known of it
	callJoin    callKind = 5 // a controller that wants to be a member; leader only
	callRemove  callKind = 6 // id of a member; leader only
	callStatus  callKind = 7 // -> how far the controller is
)

const (
	answerOK        = 0
	answerError     = 1 // payload: an encoded command.Refused
	answerNotLeader = 2 // nothing was done
)

type frame struct {
	id      uint64
	kind    uint8
	wait    time.Duration
	payload []byte
}

func appendFrame(b []byte, f frame) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.payload)))
	b = binary.BigEndian.AppendUint64(b, f.id)
	b = append(b, f.kind)
	b = binary.BigEndian.AppendUint32(b, uint32(min(f.wait.Milliseconds(), math.MaxUint32)))
	return append(b, f.payload...)
}

// readFrame reads one frame. io.EOF is a connection that ended between two frames.
func readFrame(r io.Reader) (frame, error) {
	var head [frameHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxPayload {
		return frame{}, fmt.Errorf("frame of %d bytes, the limit is %d: %w", n, maxPayload, volume.ErrInvalid)
	}
	f := frame{
		id:      binary.BigEndian.Uint64(head[4:]),
		kind:    head[12],
		wait:    time.Duration(binary.BigEndian.Uint32(head[13:])) * time.Millisecond,
		payload: make([]byte, n),
	}
	if _, err := io.ReadFull(r, f.payload); err != nil {
		return frame{}, io.ErrUnexpectedEOF
	}
	return f, nil
}
