package replicanet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// errWire: the peer sent what is no frame of this protocol. The connection is of no more use.
var errWire = errors.New("malformed frame")

// A frame is a head of fixed length, then the rest of the message (lists and what is rare), then its data.
//
//	 0  4  CRC-32C of the head from byte 4 on, and of the rest
//	 4  1  kind of message, or one of the control kinds
//	 5  1  flags
//	 6  1  status
//	 7  1  missed
//	 8  4  link
//	12  4  length of the rest
//	16  4  length of the data
//	20  4  CRC-32C of the data; 0 on connections with TLS, which has its own
//	24  8  epoch
//	32  8  session
//	40  8  seq
//	48  8  op
//	56  8  offset
//	64  8  length
//
// Numbers are little-endian.
const (
	headLen = 72
	// maxRest bounds the rest: the longest is the answer to a fence.
	maxRest = 1 << 20
)

const (
	flagReply = 1 << iota
	flagFUA
	flagHole
	flagCopy
	flagsKnown = 1<<iota - 1
)

// Control kinds: opening and closing of links. Their data is empty.
const (
	// kindOpen asks for a link to a replica, under the number in the head. Rest: volume, replica.
	kindOpen = 0xf0 + iota
	// kindOpened answers it. Rest: the name of the failure and a message for people; both empty for success.
	kindOpened
	// kindClose ends a link; nothing more comes under its number.
	kindClose
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// head is a decoded head, less what goes into the message directly.
type head struct {
	kind       byte
	link       uint32
	rest, data int
	dataSum    uint32
}

// Sections of the rest, by bit. Those that are present follow the byte with the bits, in this order.
const (
	secUpto = 1 << iota
	secBoot
	secSnapshot
	secFence
	secConfig
	secSet
	secSeal
	secKnown = 1<<iota - 1
)

// sections tells what m has that is not in the head.
func sections(m *replication.Message) byte {
	var s byte
	if m.Upto != 0 {
		s |= secUpto
	}
	if m.Boot != 0 {
		s |= secBoot
	}
	if m.Snapshot != "" {
		s |= secSnapshot
	}
	if m.Fence != nil {
		s |= secFence
	}
	if m.Config != nil {
		s |= secConfig
	}
	if m.Set != nil {
		s |= secSet
	}
	if m.Seal != nil {
		s |= secSeal
	}
	return s
}

// putHead writes the head of a message that is sent with a rest and data.
func putHead(h *[headLen]byte, m *replication.Message, link uint32, rest, data []byte, dataSum uint32) {
	le := binary.LittleEndian
	var flags byte
	if m.Reply {
		flags |= flagReply
	}
	if m.FUA {
		flags |= flagFUA
	}
	if m.Hole {
		flags |= flagHole
	}
	if m.Copy {
		flags |= flagCopy
	}
	h[4], h[5], h[6], h[7] = byte(m.Kind), flags, byte(m.Status), byte(m.Missed)
	le.PutUint32(h[8:], link)
	le.PutUint32(h[12:], uint32(len(rest)))
	le.PutUint32(h[16:], uint32(len(data)))
	le.PutUint32(h[20:], dataSum)
	le.PutUint64(h[24:], uint64(m.Epoch))
	le.PutUint64(h[32:], uint64(m.Session))
	le.PutUint64(h[40:], m.Seq)
	le.PutUint64(h[48:], m.Op)
	le.PutUint64(h[56:], uint64(m.Off))
	le.PutUint64(h[64:], uint64(m.Len))
	seal(h, rest)
}

// putControl writes the head of a control frame.
func putControl(h *[headLen]byte, kind byte, link uint32, rest []byte) {
	*h = [headLen]byte{4: kind}
	binary.LittleEndian.PutUint32(h[8:], link)
	binary.LittleEndian.PutUint32(h[12:], uint32(len(rest)))
	seal(h, rest)
}

func seal(h *[headLen]byte, rest []byte) {
	binary.LittleEndian.PutUint32(h[:], headSum(h, rest))
}

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

func headSum(h *[headLen]byte, rest []byte) uint32 {
	return crc32.Update(crc32.Checksum(h[4:], castagnoli), castagnoli, rest)
}

// getHead reads what bounds the frame. The sum is checked by getBody, when the rest is there: nothing but lengths, which
// are bounded here, is used before that.
func getHead(h *[headLen]byte) (head, error) {
	le := binary.LittleEndian
	rest, data := le.Uint32(h[12:]), le.Uint32(h[16:])
	if rest > maxRest || data > replication.MaxData {
		return head{}, fmt.Errorf("lengths %d and %d: %w", rest, data, errWire)
	}
	return head{kind: h[4], link: le.Uint32(h[8:]), rest: int(rest), data: int(data), dataSum: le.Uint32(h[20:])}, nil
}

// getBody checks the head's sum and fills m from head and rest. Volume, Replica, Conn and Data are for the caller.
func getBody(m *replication.Message, h *[headLen]byte, hd head, rest []byte) error {
	le := binary.LittleEndian
	if le.Uint32(h[:]) != headSum(h, rest) {
		return fmt.Errorf("wrong checksum: %w", errWire)
	}
	if hd.kind >= kindOpen {
		if hd.kind > kindClose || hd.data != 0 {
			return fmt.Errorf("control frame %#x: %w", hd.kind, errWire)
		}
		return nil
	}
	*m = replication.Message{
		Kind: replication.Kind(h[4]), Reply: h[5]&flagReply != 0, FUA: h[5]&flagFUA != 0, Hole: h[5]&flagHole != 0, Copy: h[5]&flagCopy != 0,
		Status: replication.Status(h[6]), Missed: replication.PeerSet(h[7]),
		Epoch: volume.Epoch(le.Uint64(h[24:])), Session: replication.Session(le.Uint64(h[32:])),
		Seq: le.Uint64(h[40:]), Op: le.Uint64(h[48:]), Off: int64(le.Uint64(h[56:])), Len: int64(le.Uint64(h[64:])),
	}
	if !m.Kind.Valid() || !m.Status.Valid() || h[5]&^flagsKnown != 0 || m.Off < 0 || m.Len < 0 {
		return fmt.Errorf("kind %d, status %d, flags %#x, offset %d, length %d: %w", h[4], h[6], h[5], m.Off, m.Len, errWire)
	}
	if hd.rest == 0 {
		return nil
	}
	return getRest(m, rest)
}

// appendRest encodes what is not in the head.
func appendRest(b []byte, m *replication.Message) []byte {
	s := sections(m)
	if s == 0 {
		return b
	}
	b = append(b, s)
	if s&secUpto != 0 {
		b = binary.LittleEndian.AppendUint64(b, m.Upto)
	}
	if s&secBoot != 0 {
		b = binary.LittleEndian.AppendUint64(b, uint64(m.Boot))
	}
	if s&secSnapshot != 0 {
		b = appendString(b, m.Snapshot)
	}
	if s&secFence != 0 {
		b = appendFence(b, m.Fence)
	}
	if s&secConfig != 0 {
		b = appendConfig(b, m.Config)
	}
	if s&secSet != 0 {
		b = appendSet(b, m.Set)
	}
	if s&secSeal != 0 {
		b = appendSeal(b, m.Seal)
	}
	return b
}

func getRest(m *replication.Message, b []byte) error {
	r := reader{b: b}
	s := r.byte()
	if s&^secKnown != 0 || s == 0 {
		return fmt.Errorf("sections %#x: %w", s, errWire)
	}
	if s&secUpto != 0 {
		m.Upto = r.u64()
	}
	if s&secBoot != 0 {
		m.Boot = replication.BootID(r.u64())
	}
	if s&secSnapshot != 0 {
		m.Snapshot = volume.SnapshotID(r.string())
	}
	if s&secFence != 0 {
		m.Fence = r.fence()
	}
	if s&secConfig != 0 {
		m.Config = r.config()
	}
	if s&secSet != 0 {
		m.Set = r.set()
	}
	if s&secSeal != 0 {
		m.Seal = r.seal()
	}
	if r.bad || len(r.b) > 0 || sections(m) != s {
		return fmt.Errorf("rest of a %s: %w", m.Kind, errWire)
	}
	return nil
}

func appendFence(b []byte, f *replication.FenceReply) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(f.Incarnation))
	b = binary.LittleEndian.AppendUint64(b, uint64(f.BootID))
	b = binary.AppendUvarint(b, uint64(f.Epoch))
	b = binary.AppendUvarint(b, uint64(f.Lineage))
	b = binary.AppendUvarint(b, uint64(f.ConfigVersion))
	b = append(b, byte(f.Role), bit(f.Poisoned), bit(f.PoisonedBefore))
	b = binary.AppendUvarint(b, uint64(f.LeaseLeft))
	b = binary.AppendUvarint(b, uint64(f.Size))
	b = appendReplicas(b, f.ISR)
	b = region.AppendRuns(b, f.WIL)
	b = binary.AppendUvarint(b, uint64(len(f.Missed)))
	for _, t := range f.Missed {
		b = appendString(b, t.Peer)
		b = binary.AppendUvarint(b, uint64(t.Since))
	}
	b = binary.AppendUvarint(b, uint64(len(f.Snapshots)))
	for _, s := range f.Snapshots {
		b = appendString(b, s.ID)
		b = binary.AppendUvarint(b, s.Number)
	}
	return b
}

func (r *reader) fence() *replication.FenceReply {
	f := &replication.FenceReply{
		Incarnation:    replication.Incarnation(r.u64()),
		BootID:         replication.BootID(r.u64()),
		Epoch:          volume.Epoch(r.uvarint()),
		Lineage:        replication.Lineage(r.uvarint()),
		ConfigVersion:  volume.ConfigVersion(r.uvarint()),
		Role:           r.role(),
		Poisoned:       r.bool(),
		PoisonedBefore: r.bool(),
		LeaseLeft:      replication.Now(r.positive()),
		Size:           r.positive(),
		ISR:            r.replicas(),
		WIL:            r.wil(),
	}
	for range r.count(replication.MaxMembers) {
		f.Missed = append(f.Missed, replication.MissedTag{
			Peer: volume.ReplicaID(r.string()), Since: volume.ConfigVersion(r.uvarint())})
	}
	for range r.count(replication.MaxSnapshots) {
		f.Snapshots = append(f.Snapshots, replication.SealedSnapshot{ID: volume.SnapshotID(r.string()), Number: r.uvarint()})
	}
	return f
}

func appendConfig(b []byte, c *replication.Config) []byte {
	b = binary.AppendUvarint(b, uint64(c.Lineage))
	b = binary.AppendUvarint(b, uint64(c.ConfigVersion))
	b = append(b, byte(c.Role), bit(c.Reset), bit(c.Unlogged))
	b = appendReplicas(b, c.ISR)
	b = binary.AppendUvarint(b, uint64(len(c.Absent)))
	for _, a := range c.Absent {
		b = append(b, byte(a.Slot))
		b = appendString(b, a.ID)
		b = binary.AppendUvarint(b, uint64(a.Since))
	}
	return b
}

func (r *reader) config() *replication.Config {
	c := &replication.Config{
		Lineage:       replication.Lineage(r.uvarint()),
		ConfigVersion: volume.ConfigVersion(r.uvarint()),
		Role:          r.role(),
		Reset:         r.bool(),
		Unlogged:      r.bool(),
		ISR:           r.replicas(),
	}
	for range r.count(replication.MaxMembers) {
		a := replication.AbsentPeer{Slot: replication.Slot(r.byte()), ID: volume.ReplicaID(r.string()),
			Since: volume.ConfigVersion(r.uvarint())}
		r.bad = r.bad || a.Slot >= replication.MaxMembers
		c.Absent = append(c.Absent, a)
	}
	return c
}

func appendSet(b []byte, s *replication.SetPage) []byte {
	b = appendString(b, s.Peer)
	b = binary.AppendUvarint(b, uint64(s.Since))
	b = append(b, bit(s.Adopt), bit(s.More))
	b = appendString(b, s.Base)
	b = binary.AppendUvarint(b, uint64(s.From))
	return region.AppendRuns(b, s.Runs)
}

func (r *reader) set() *replication.SetPage {
	return &replication.SetPage{
		Peer:  volume.ReplicaID(r.string()),
		Since: volume.ConfigVersion(r.uvarint()),
		Adopt: r.bool(),
		More:  r.bool(),
		Base:  volume.SnapshotID(r.string()),
		From:  r.u32(),
		Runs:  r.runs(replication.MaxRuns),
	}
}

func appendSeal(b []byte, s *replication.Seal) []byte {
	b = appendString(b, s.Snapshot)
	b = binary.AppendUvarint(b, s.Number)
	b = binary.AppendUvarint(b, uint64(s.ConfigVersion))
	return append(b, bit(s.Fill))
}

func (r *reader) seal() *replication.Seal {
	return &replication.Seal{
		Snapshot:      volume.SnapshotID(r.string()),
		Number:        r.uvarint(),
		ConfigVersion: volume.ConfigVersion(r.uvarint()),
		Fill:          r.bool(),
	}
}

func appendReplicas(b []byte, ids []volume.ReplicaID) []byte {
	b = binary.AppendUvarint(b, uint64(len(ids)))
	for _, id := range ids {
		b = appendString(b, id)
	}
	return b
}

func appendString[S ~string](b []byte, s S) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func bit(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// reader takes a frame's rest apart. After a fault it is bad and returns zeros.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) fail() {
	r.bad = true
	r.b = nil
}

func (r *reader) byte() byte {
	if len(r.b) < 1 {
		r.fail()
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) bool() bool {
	v := r.byte()
	r.bad = r.bad || v > 1
	return v == 1
}

func (r *reader) u64() uint64 {
	if len(r.b) < 8 {
		r.fail()
		return 0
	}
	v := binary.LittleEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) positive() int64 {
	v := int64(r.uvarint())
	r.bad = r.bad || v < 0
	return v
}

func (r *reader) u32() uint32 {
	v := r.uvarint()
	r.bad = r.bad || v > 1<<32-1
	return uint32(v)
}

// count is a number of things to come; each takes a byte at least.
func (r *reader) count(most int) int {
	v := r.uvarint()
	if v > uint64(most) || v > uint64(len(r.b)) {
		r.fail()
		return 0
	}
	return int(v)
}

func (r *reader) role() replication.Role {
	v := replication.Role(r.byte())
	r.bad = r.bad || v > replication.RoleSTALE
	return v
}

func (r *reader) string() string { return r.text(volume.MaxNameLen) }

// text is a string of at most a number of bytes.
func (r *reader) text(most int) string {
	n := r.count(most)
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

func (r *reader) replicas() []volume.ReplicaID {
	var ids []volume.ReplicaID
	for range r.count(replication.MaxMembers) {
		ids = append(ids, volume.ReplicaID(r.string()))
	}
	return ids
}

// wil is a write-intent log: of so many regions at most, and of the largest volume.
func (r *reader) wil() []region.Run {
	g := replication.DefaultGeometry()
	left, end := int64(replication.MaxWIL*g.MaxActive), volume.MaxSize/g.Region
	runs := r.runs(int(left))
	for _, run := range runs {
		if left -= int64(run.N); left < 0 || int64(run.End()) > end {
			r.fail()
			return nil
		}
	}
	return runs
}

func (r *reader) runs(most int) []region.Run {
	if r.bad {
		return nil
	}
	runs, rest, err := region.DecodeRuns(r.b, most)
	if err != nil {
		r.fail()
		return nil
	}
	r.b = rest
	return runs
}
