package extentstore

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// formatVersion is that of the whole pool: docs/format.md.
const formatVersion = 2

// Keys of the database begin with one of these.
const (
	keyPool     = 'v'
	keyLayer    = 'l'
	keyPage     = 'p'
	keySums     = 'c'
	keyReplica  = 'r'
	keySnapshot = 's'
	keyScrub    = 'x'
	// Those of the replication protocol: journalKey.
	keyState   = 't'
	keyWIL     = 'w'
	keyPeer    = 'a'
	keyMissed  = 'm'
	keyFlushed = 'f'
)

func layerKey(id uint64) []byte { return binary.BigEndian.AppendUint64([]byte{keyLayer}, id) }

func pageKey(kind byte, id uint64, idx uint32) []byte {
	b := make([]byte, 0, 13)
	b = append(b, kind)
	b = binary.BigEndian.AppendUint64(b, id)
	return binary.BigEndian.AppendUint32(b, idx)
}

func parsePageKey(b []byte) (id uint64, idx uint32, ok bool) {
	if len(b) != 13 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint32(b[9:]), true
}

func replicaKey(id volume.ReplicaID) []byte   { return append([]byte{keyReplica}, id...) }
func snapshotKey(id volume.SnapshotID) []byte { return append([]byte{keySnapshot}, id...) }

// Records are: version 1, fields, CRC-32C. Integers are little endian, strings are a byte of length and the bytes.
const recordVersion = 1

type encoder struct{ b []byte }

func newEncoder() *encoder       { return &encoder{[]byte{recordVersion}} }
func (e *encoder) u8(v uint8)    { e.b = append(e.b, v) }
func (e *encoder) u32(v uint32)  { e.b = binary.LittleEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64)  { e.b = binary.LittleEndian.AppendUint64(e.b, v) }
func (e *encoder) str(s string)  { e.b = append(append(e.b, uint8(len(s))), s...) }
func (e *encoder) bytes() []byte { e.u32(crc32.Checksum(e.b, layer.Castagnoli)); return e.b }

type decoder struct {
	b   []byte
	bad bool
}

func newDecoder(b []byte) *decoder {
	if len(b) < 5 || b[0] != recordVersion {
		return &decoder{bad: true}
	}
	body := b[:len(b)-4]
	if crc32.Checksum(body, layer.Castagnoli) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return &decoder{bad: true}
	}
	return &decoder{b: body[1:]}
}

func (d *decoder) take(n int) []byte {
	if d.bad || len(d.b) < n {
		d.bad = true
		return make([]byte, n)
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) u8() uint8   { return d.take(1)[0] }
func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }
func (d *decoder) str() string { return string(d.take(int(d.u8()))) }

func (d *decoder) end(what string) error {
	if d.bad || len(d.b) != 0 {
		return fmt.Errorf("record of %s: %w", what, layer.ErrCorrupt)
	}
	return nil
}

type poolRecord struct {
	version uint32
	id      volume.PoolID
	kind    volume.PoolKind
}

func (r poolRecord) encode() []byte {
	e := newEncoder()
	e.u32(r.version)
	e.u32(layer.ExtentSize)
	e.str(string(r.id))
	e.str(string(r.kind))
	return e.bytes()
}

func decodePool(b []byte) (r poolRecord, err error) {
	d := newDecoder(b)
	r.version = d.u32()
	extent := d.u32()
	r.id = volume.PoolID(d.str())
	r.kind = volume.PoolKind(d.str())
	if err := d.end("the pool"); err != nil {
		return r, err
	}
	if r.version != formatVersion || extent != layer.ExtentSize {
		return r, fmt.Errorf("pool %s has format %d with extents of %d bytes; this program reads format %d with %d: use the program that wrote it",
			r.id, r.version, extent, formatVersion, layer.ExtentSize)
	}
	return r, nil
}

type layerRecord struct {
	parent  uint64
	summed  bool
	damaged bool
}

func (r layerRecord) encode() []byte {
	e := newEncoder()
	e.u64(r.parent)
	var flags uint8
	if r.summed {
		flags |= 1
	}
	if r.damaged {
		flags |= 2
	}
	e.u8(flags)
	return e.bytes()
}

func decodeLayer(b []byte) (r layerRecord, err error) {
	d := newDecoder(b)
	r.parent = d.u64()
	flags := d.u8()
	r.summed, r.damaged = flags&1 != 0, flags&2 != 0
	d.bad = d.bad || flags > 3
	return r, d.end("a layer")
}

type replicaRecord struct {
	head, journal  uint64
	size           int64
	volume, tenant string
}

func (r replicaRecord) encode() []byte {
	e := newEncoder()
	e.u64(r.head)
	e.u64(r.journal)
	e.u64(uint64(r.size))
	e.str(r.volume)
	e.str(r.tenant)
	return e.bytes()
}

func decodeReplica(b []byte) (r replicaRecord, err error) {
	d := newDecoder(b)
	r.head, r.journal = d.u64(), d.u64()
	r.size = int64(d.u64())
	r.volume, r.tenant = d.str(), d.str()
	d.bad = d.bad || badSize(r.size)
	return r, d.end("a replica")
}

type snapshotRecord struct {
	layer, number           uint64
	size                    int64
	volume, tenant, replica string
}

func (r snapshotRecord) encode() []byte {
	e := newEncoder()
	e.u64(r.layer)
	e.u64(r.number)
	e.u64(uint64(r.size))
	e.str(r.volume)
	e.str(r.tenant)
	e.str(r.replica)
	return e.bytes()
}

func decodeSnapshot(b []byte) (r snapshotRecord, err error) {
	d := newDecoder(b)
	r.layer, r.number = d.u64(), d.u64()
	r.size = int64(d.u64())
	r.volume, r.tenant, r.replica = d.str(), d.str(), d.str()
	d.bad = d.bad || badSize(r.size)
	return r, d.end("a snapshot")
}

func badSize(n int64) bool {
	return n < layer.BlockSize || n > volume.MaxSize || n%layer.BlockSize != 0
}

// The superblock is the first bytes of slot 0: magic, then a poolRecord.
var superMagic = []byte("BALLASTPOOL\x00\x01\x00\x00\x00")

func encodeSuper(r poolRecord) []byte {
	rec := r.encode()
	b := append([]byte(nil), superMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(rec)))
	return append(b, rec...)
}

// decodeSuper reads the first block of a data file. A block of zeros has no pool: none is true.
func decodeSuper(b []byte) (r poolRecord, none bool, err error) {
	none = true
	for _, x := range b {
		none = none && x == 0
	}
	if none {
		return r, true, nil
	}
	if n := len(superMagic); len(b) > n+4 && string(b[:n]) == string(superMagic) {
		if l := binary.LittleEndian.Uint32(b[n:]); int64(l) <= int64(len(b)-n-4) {
			r, err = decodePool(b[n+4 : n+4+int(l)])
			return r, false, err
		}
	}
	return r, false, fmt.Errorf("superblock of the data file: %w", layer.ErrCorrupt)
}

// scrubRecord says when the last scrub ended, in seconds of Unix time, and from which page of which layer one that was cut
// off goes on; layer 0 is none.
type scrubRecord struct {
	ended int64
	layer uint64
	page  uint32
}

func (r scrubRecord) encode() []byte {
	e := newEncoder()
	e.u64(uint64(r.ended))
	e.u64(r.layer)
	e.u32(r.page)
	return e.bytes()
}

func decodeScrub(b []byte) (r scrubRecord, err error) {
	d := newDecoder(b)
	r.ended, r.layer, r.page = int64(d.u64()), d.u64(), d.u32()
	return r, d.end("the scrub")
}

// sums are the checksums of one page's extents, valid while the page is the one they were made from.
type sums struct {
	page uint32 // layer.PageSum
	crcs []uint32
}

func (s sums) encode() []byte {
	e := newEncoder()
	e.u32(s.page)
	e.u8(uint8(len(s.crcs)))
	for _, c := range s.crcs {
		e.u32(c)
	}
	return e.bytes()
}

func decodeSums(b []byte) (s sums, err error) {
	d := newDecoder(b)
	s.page = d.u32()
	n := int(d.u8())
	if n > layer.ExtentsPerPage {
		d.bad = true
	}
	for range n {
		if d.bad {
			break
		}
		s.crcs = append(s.crcs, d.u32())
	}
	return s, d.end("checksums")
}

// Records of the replication protocol.

func badKey(k []byte) error { return fmt.Errorf("record with key %x: %w", k, layer.ErrCorrupt) }

func encodeState(b []byte) []byte {
	e := newEncoder()
	e.u32(uint32(len(b)))
	e.b = append(e.b, b...)
	return e.bytes()
}

func decodeState(b []byte) ([]byte, error) {
	d := newDecoder(b)
	n := d.u32()
	if n > replication.MaxState {
		d.bad, n = true, 0
	}
	state := append([]byte{}, d.take(int(n))...)
	return state, d.end("the protocol's state")
}

// encodeFlushed is a time in nanoseconds of Unix time.
func encodeFlushed(at int64) []byte {
	e := newEncoder()
	e.u64(uint64(at))
	return e.bytes()
}

func decodeFlushed(b []byte) (int64, error) {
	d := newDecoder(b)
	at := int64(d.u64())
	return at, d.end("a replica's last flush")
}

// encodeWords is a bitmap of a fixed size.
func encodeWords(words []uint64) []byte {
	e := newEncoder()
	for _, w := range words {
		e.u64(w)
	}
	return e.bytes()
}

func decodeWords(what string, b []byte, words []uint64) error {
	d := newDecoder(b)
	for i := range words {
		words[i] = d.u64()
	}
	return d.end(what)
}

func encodePeer(t replication.MissedTag) []byte {
	e := newEncoder()
	e.u64(uint64(t.Since))
	e.str(string(t.Peer))
	return e.bytes()
}

func decodePeer(b []byte) (t replication.MissedTag, err error) {
	d := newDecoder(b)
	t.Since = volume.ConfigVersion(d.u64())
	t.Peer = volume.ReplicaID(d.str())
	return t, d.end("an absent peer")
}
