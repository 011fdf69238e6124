package meta

import (
	"encoding/binary"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Kind says what the body of an entry is.
type Kind uint8

// Kinds. A number is never given to another kind.
const (
	KindCommand    Kind = 1 // what command.Encode made
	KindController Kind = 2 // what EncodeControllerChange made
	KindMarks      Kind = 3 // nothing: the entry is there for its marks
)

// ProposalID names one proposal, however often it is put into the log; all zeros is no name.
type ProposalID [16]byte

// Mark says that a controller holds every entry up to an index, all of them committed.
type Mark struct {
	Controller volume.NodeID
	Index      uint64
}

// MaxMarks bounds the marks of an entry.
const MaxMarks = 16

// Entry is what a log has at an index.
type Entry struct {
	Index uint64 // not part of the encoding: it is the log's
	Kind  Kind
	// ID, where there is one, has the entry applied once: when the same proposal comes again, it is answered what it was
	// answered at first and changes nothing. Since is an index that was committed before the proposal was first made. The
	// machine remembers so many proposals that one which comes within Remembered indexes of Since is recognised, and it
	// refuses all others.
	ID    ProposalID
	Since uint64
	Marks []Mark
	Body  []byte
}

const entryVersion = 1

// MaxEntry bounds an encoded entry, in bytes.
const MaxEntry = 32 + MaxMarks*(10+volume.MaxNodeIDLen) + command.MaxEncoded

// EncodeEntry makes the form of an entry that logs keep. Its bounds are checked by DecodeEntry.
func EncodeEntry(e Entry) []byte {
	b := make([]byte, 0, 32+len(e.Marks)*32+len(e.Body))
	b = append(b, entryVersion, byte(e.Kind))
	b = append(b, e.ID[:]...)
	b = binary.BigEndian.AppendUint64(b, e.Since)
	b = append(b, byte(len(e.Marks)))
	for _, m := range e.Marks {
		b = binary.BigEndian.AppendUint16(b, uint16(len(m.Controller)))
		b = append(b, m.Controller...)
		b = binary.BigEndian.AppendUint64(b, m.Index)
	}
	return append(b, e.Body...)
}

// DecodeEntry reads what EncodeEntry made; the body refers to b. It returns volume.ErrInvalid.
func DecodeEntry(b []byte) (Entry, error) {
	var e Entry
	bad := func(what string) (Entry, error) {
		return Entry{}, fmt.Errorf("log entry: %s: %w", what, volume.ErrInvalid)
	}
	const head = 2 + len(e.ID) + 8 + 1
	if len(b) > MaxEntry {
		return bad("it is too long")
	}
	if len(b) < head {
		return bad("it is cut off")
	}
	if b[0] != entryVersion {
		return bad(fmt.Sprintf("version %d is unknown", b[0]))
	}
	e.Kind = Kind(b[1])
	copy(e.ID[:], b[2:])
	e.Since = binary.BigEndian.Uint64(b[2+len(e.ID):])
	n := int(b[head-1])
	if n > MaxMarks {
		return bad("it has too many marks")
	}
	b = b[head:]
	for range n {
		if len(b) < 2 {
			return bad("a mark is cut off")
		}
		l := int(binary.BigEndian.Uint16(b))
		if l > volume.MaxNodeIDLen || len(b) < 2+l+8 {
			return bad("a mark is cut off or its name too long")
		}
		e.Marks = append(e.Marks, Mark{Controller: volume.NodeID(b[2 : 2+l]), Index: binary.BigEndian.Uint64(b[2+l:])})
		b = b[2+l+8:]
	}
	e.Body = b
	return e, nil
}

// applyEntry decides on an entry and leaves what it changes in v; after a refusal v is to be dropped.
func applyEntry(v *view, e Entry) command.Result {
	if e.ID == (ProposalID{}) {
		return applyBody(v, e)
	}
	if r := recall(v, e); r != nil {
		return r
	}
	r := applyBody(v, e)
	if _, refused := r.(command.Refused); !refused {
		remember(v, e, r)
	}
	return r
}

func applyBody(v *view, e Entry) command.Result {
	switch e.Kind {
	case KindCommand:
		return apply(v, e.Body)
	case KindController:
		r, err := applyController(v, e.Body)
		if err != nil {
			return command.Refuse(err)
		}
		return r
	case KindMarks:
		return command.Done{}
	}
	return command.Refuse(fmt.Errorf("log entry of kind %d is not known to the state machine: %w", e.Kind, volume.ErrInvalid))
}

const (
	// Remembered is how many proposals are remembered, and how many indexes after Since a proposal may still come.
	Remembered = 2048
	// maxAnswer bounds a remembered answer, in bytes; of a longer one only that it was given is known.
	maxAnswer = 16 << 10
)

// recall returns the answer to a proposal that was applied before, a refusal of one that may have been, and nil for one
// that was not.
func recall(v *view, e Entry) command.Result {
	if e.Since > e.Index {
		return command.Refuse(fmt.Errorf("proposal names index %d, its own is %d: %w", e.Since, e.Index, volume.ErrInvalid))
	}
	// Each remembered proposal took an index. Between Since and here there are less than Remembered of them, so what was
	// applied after Since is remembered.
	if e.Index-e.Since >= Remembered {
		return command.Refuse(fmt.Errorf("proposal is %d entries late, whether it was applied before is not known: %w", e.Index-e.Since, volume.ErrUnavailable))
	}
	b := v.read(proposals + string(e.ID[:]))
	if b == nil {
		return nil
	}
	if len(b) == 0 || b[0] != recordVersion {
		v.err = fmt.Errorf("answer to proposal %x: %w", e.ID, volume.ErrDataLoss)
		return command.Done{}
	}
	if len(b) == 1 {
		return command.Refuse(fmt.Errorf("proposal was applied; its answer is too long to be remembered: %w", volume.ErrUnavailable))
	}
	r, err := command.DecodeResult(b[1:])
	if err != nil {
		v.err = fmt.Errorf("answer to proposal %x: %w", e.ID, err)
		return command.Done{}
	}
	return r
}

func remember(v *view, e Entry, r command.Result) {
	n, _ := load[uint64](v, proposalCount)
	slot := proposalRing + string(binary.BigEndian.AppendUint16(nil, uint16(n%Remembered)))
	if old := v.read(slot); old != nil {
		v.del(proposals + string(old))
	}
	answer, err := command.EncodeResult(r)
	if err != nil || len(answer) > maxAnswer {
		answer = nil
	}
	v.put(slot, e.ID[:])
	v.put(proposals+string(e.ID[:]), append([]byte{recordVersion}, answer...))
	save(v, proposalCount, n+1)
}
