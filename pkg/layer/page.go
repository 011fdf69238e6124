package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
)

// PageVersion is the first byte of an encoded page.
const PageVersion = 1

const (
	pageHeader  = 2 + ExtentsPerPage/8
	entryBytes  = 8
	pageTrailer = 4
	// MaxPageBytes is the longest encoding of a page.
	MaxPageBytes = pageHeader + ExtentsPerPage*entryBytes + pageTrailer
)

// ErrCorrupt is wrapped by every error of a decoder.
var ErrCorrupt = errors.New("corrupt")

// Castagnoli is the polynomial of every checksum in a pool.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Page maps PageSpan bytes of one layer.
type Page [ExtentsPerPage]Entry

// Empty tells whether nothing of the page would be stored.
func (p *Page) Empty() bool {
	for i := range p {
		if p[i].Covers() != 0 {
			return false
		}
	}
	return true
}

// Slots is the number of slots that the page owns, reserved ones included.
func (p *Page) Slots() int {
	n := 0
	for i := range p {
		if p[i].Slot != 0 {
			n++
		}
	}
	return n
}

// Append appends the encoding of p to b. Entries that are not stored are left out.
func (p *Page) Append(b []byte) []byte {
	start := len(b)
	b = append(b, PageVersion, 0)
	var present [ExtentsPerPage / 8]byte
	for i := range p {
		if p[i].Covers() != 0 {
			present[i/8] |= 1 << (i % 8)
		}
	}
	b = append(b, present[:]...)
	for i := range p {
		e := p[i].Stored()
		if e.Covers() == 0 {
			continue
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Slot))
		b = binary.LittleEndian.AppendUint16(b, uint16(e.Data))
		b = binary.LittleEndian.AppendUint16(b, uint16(e.Zero))
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], Castagnoli))
}

// PageSum is the checksum that ends an encoded page: it changes whenever the page does.
func PageSum(b []byte) uint32 {
	if len(b) < pageTrailer {
		return 0
	}
	return binary.LittleEndian.Uint32(b[len(b)-pageTrailer:])
}

// Decode reads an encoded page. Errors wrap ErrCorrupt.
func (p *Page) Decode(b []byte) error {
	if len(b) < pageHeader+pageTrailer || len(b) > MaxPageBytes {
		return fmt.Errorf("page of %d bytes: %w", len(b), ErrCorrupt)
	}
	if b[0] != PageVersion || b[1] != 0 {
		return fmt.Errorf("page of version %d.%d: %w", b[0], b[1], ErrCorrupt)
	}
	body := b[:len(b)-pageTrailer]
	if got, want := crc32.Checksum(body, Castagnoli), PageSum(b); got != want {
		return fmt.Errorf("page checksum is %08x, want %08x: %w", got, want, ErrCorrupt)
	}
	present, rest := body[2:pageHeader], body[pageHeader:]
	n := 0
	for _, x := range present {
		n += bits.OnesCount8(x)
	}
	if len(rest) != n*entryBytes {
		return fmt.Errorf("page with %d entries has %d bytes of them: %w", n, len(rest), ErrCorrupt)
	}
	*p = Page{}
	for i := range p {
		if present[i/8]&(1<<(i%8)) == 0 {
			continue
		}
		e := Entry{
			Slot: Slot(binary.LittleEndian.Uint32(rest)),
			Data: Mask(binary.LittleEndian.Uint16(rest[4:])),
			Zero: Mask(binary.LittleEndian.Uint16(rest[6:])),
		}
		rest = rest[entryBytes:]
		if !e.sane() || e.Covers() == 0 {
			return fmt.Errorf("page entry %d has slot %d data %04x zero %04x: %w", i, e.Slot, e.Data, e.Zero, ErrCorrupt)
		}
		p[i] = e
	}
	return nil
}
