package replicanet

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// carriers are the fields that the carrier sets by itself.
var carriers = []string{"Volume", "Replica", "Conn"}

// fill sets everything below v to something that may be sent and is not zero.
func fill(t *testing.T, v reflect.Value, draw func(n uint64) uint64) {
	switch x := v.Addr().Interface().(type) {
	case *replication.Kind:
		*x = replication.Kind(1 + draw(200))
		for !x.Valid() {
			*x = replication.Kind(1 + draw(200))
		}
		return
	case *replication.Status:
		*x = replication.Status(1 + draw(200))
		for !x.Valid() {
			*x = replication.Status(1 + draw(200))
		}
		return
	case *replication.Role:
		*x = replication.RoleNEW + replication.Role(draw(4))
		return
	case *replication.Slot:
		*x = replication.Slot(1 + draw(replication.MaxMembers-1))
		return
	case *[]region.Run:
		at := uint32(0)
		for range 1 + draw(5) {
			r := region.Run{First: at + uint32(draw(1000)), N: 1 + uint32(draw(1000))}
			*x = append(*x, r)
			at = r.End()
		}
		return
	case *replication.Now:
		*x = replication.Now(1 + draw(1<<62))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int64:
		v.SetInt(int64(1 + draw(1<<62)))
	case reflect.Uint8:
		v.SetUint(1 + draw(255))
	case reflect.Uint32:
		v.SetUint(1 + draw(1<<32-1))
	case reflect.Uint64:
		v.SetUint(1 + draw(1<<63))
	case reflect.String:
		v.SetString(fmt.Sprintf("id-%d", draw(1<<60)))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), draw)
	case reflect.Slice:
		n := int(1 + draw(5))
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			fill(t, v.Index(i), draw)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), draw)
		}
	default:
		t.Fatalf("a %s cannot be sent: teach the codec and this test", v.Type())
	}
}

// carry encodes and decodes.
func carry(m *replication.Message, sums bool) (*replication.Message, error) {
	rest := appendRest(nil, m)
	var h [headLen]byte
	var sum uint32
	if sums {
		sum = checksum(m.Data)
	}
	putHead(&h, m, 7, rest, m.Data, sum)
	hd, err := getHead(&h)
	if err != nil {
		return nil, err
	}
	if hd.link != 7 || hd.rest != len(rest) || hd.data != len(m.Data) {
		return nil, fmt.Errorf("head %+v", hd)
	}
	got := new(replication.Message)
	if err := getBody(got, &h, hd, rest); err != nil {
		return nil, err
	}
	got.Data = m.Data
	return got, nil
}

func bare(m *replication.Message) *replication.Message {
	c := *m
	c.Volume, c.Replica, c.Conn = "", "", 0
	return &c
}

// TestEveryFieldIsSent: a field that is added to a message and forgotten by the codec fails here.
func TestEveryFieldIsSent(t *testing.T) {
	kind := reflect.TypeFor[replication.Message]()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range kind.NumField() {
		name := kind.Field(i).Name
		if slices.Contains(carriers, name) {
			continue
		}
		m := &replication.Message{Kind: replication.KindPing}
		fill(t, reflect.ValueOf(m).Elem().Field(i), r.Uint64N)
		got, err := carry(m, true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(m, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := new(replication.Message)
		v := reflect.ValueOf(m).Elem()
		draw := func(n uint64) uint64 { return rapid.Uint64Range(0, n-1).Draw(rt, "n") }
		m.Kind = replication.KindPing
		for i := range v.NumField() {
			if rapid.Bool().Draw(rt, v.Type().Field(i).Name) {
				v.Field(i).SetZero()
				fill(t, v.Field(i), draw)
			}
		}
		got, err := carry(m, rapid.Bool().Draw(rt, "sums"))
		if err != nil {
			rt.Fatal(err)
		}
		if diff := cmp.Diff(bare(m), got, cmpopts.EquateEmpty()); diff != "" {
			rt.Fatal(diff)
		}
	})
}

// TestLongestMessagesFit: what the bounds of package replication allow can be sent, and no more is taken.
func TestLongestMessagesFit(t *testing.T) {
	long := strings.Repeat("x", volume.MaxNameLen)
	runs := func(n int) []region.Run {
		var all []region.Run
		step := uint32(region.Max / n)
		for i := range n {
			all = append(all, region.Run{First: uint32(i) * step, N: step - 1})
		}
		return all
	}
	fence := func(wil, snapshots, members int) *replication.Message {
		f := &replication.FenceReply{Size: 1<<63 - 1, Epoch: 1<<64 - 1}
		for i := range wil {
			f.WIL = append(f.WIL, region.Run{First: uint32(2 * i), N: 1})
		}
		for range snapshots {
			f.Snapshots = append(f.Snapshots, replication.SealedSnapshot{ID: volume.SnapshotID(long), Number: 1<<64 - 1})
		}
		for range members {
			f.ISR = append(f.ISR, volume.ReplicaID(long))
			f.Missed = append(f.Missed, replication.MissedTag{Peer: volume.ReplicaID(long), Since: 1<<64 - 1})
		}
		return &replication.Message{Kind: replication.KindFence, Reply: true, Fence: f}
	}
	marked := func(run region.Run) *replication.Message {
		m := fence(0, 0, 0)
		m.Fence.WIL = []region.Run{run}
		return m
	}
	set := func(n int) *replication.Message {
		return &replication.Message{Kind: replication.KindMissed, Set: &replication.SetPage{Runs: runs(n)}}
	}
	for name, tt := range map[string]struct {
		m  *replication.Message
		ok bool
	}{
		"fence":           {fence(replication.MaxWIL*4096, replication.MaxSnapshots, replication.MaxMembers), true},
		"long WIL":        {fence(replication.MaxWIL*4096+1, 0, 0), false},
		"wide WIL":        {marked(region.Run{First: 0, N: replication.MaxWIL*4096 + 1}), false},
		"last region":     {marked(region.Run{First: 1<<26 - 1, N: 1}), true},
		"beyond it":       {marked(region.Run{First: 1 << 26, N: 1}), false},
		"many snapshots":  {fence(1, replication.MaxSnapshots+1, 0), false},
		"many members":    {fence(1, 0, replication.MaxMembers+1), false},
		"set":             {set(replication.MaxRuns), true},
		"long set":        {set(replication.MaxRuns + 1), false},
		"long name":       {&replication.Message{Kind: replication.KindRead, Snapshot: volume.SnapshotID(long)}, true},
		"a longer name":   {&replication.Message{Kind: replication.KindRead, Snapshot: volume.SnapshotID(long + "x")}, false},
		"most data":       {&replication.Message{Kind: replication.KindWrite, Data: make([]byte, replication.MaxData)}, true},
		"more data":       {&replication.Message{Kind: replication.KindWrite, Data: make([]byte, replication.MaxData+1)}, false},
		"negative offset": {&replication.Message{Kind: replication.KindRead, Off: -1}, false},
		"no kind":         {&replication.Message{}, false},
		"no such role":    {&replication.Message{Kind: replication.KindConfigure, Config: &replication.Config{Role: replication.RoleSTALE + 1}}, false},
		"no such slot": {&replication.Message{Kind: replication.KindConfigure, Config: &replication.Config{
			Absent: []replication.AbsentPeer{{Slot: replication.MaxMembers}}}}, false},
	} {
		if _, err := carry(tt.m, true); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDamageIsNoticed: any bit that is changed on the way.
func TestDamageIsNoticed(t *testing.T) {
	m := &replication.Message{Kind: replication.KindFlush, Reply: true, Boot: 5, Op: 9}
	rest := appendRest(nil, m)
	var good [headLen]byte
	putHead(&good, m, 7, rest, m.Data, 0)
	for bit := range (headLen + len(rest)) * 8 {
		h, r := good, bytes.Clone(rest)
		if bit < headLen*8 {
			h[bit/8] ^= 1 << (bit % 8)
		} else {
			r[bit/8-headLen] ^= 1 << (bit % 8)
		}
		hd, err := getHead(&h)
		if err == nil && hd.rest == len(r) {
			err = getBody(new(replication.Message), &h, hd, r)
			if err == nil {
				t.Fatalf("bit %d", bit)
			}
		}
	}
}

// FuzzFrame: whatever is taken can be sent, and is then the same.
func FuzzFrame(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		m := new(replication.Message)
		fill(&testing.T{}, reflect.ValueOf(m).Elem(), r.Uint64N)
		rest := appendRest(nil, m)
		var h [headLen]byte
		putHead(&h, m, 7, rest, m.Data, 0)
		f.Add(append(h[:], rest...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headLen {
			return
		}
		h := [headLen]byte(b)
		rest := b[headLen:]
		h[12], h[13], h[14], h[15] = byte(len(rest)), byte(len(rest)>>8), byte(len(rest)>>16), byte(len(rest)>>24)
		h[20], h[21], h[22], h[23] = 0, 0, 0, 0
		seal(&h, rest)
		hd, err := getHead(&h)
		if err != nil {
			return
		}
		m := new(replication.Message)
		if getBody(m, &h, hd, rest) != nil || hd.kind >= kindOpen {
			return
		}
		m.Data = make([]byte, hd.data)
		got, err := carry(m, false)
		if err != nil {
			t.Fatalf("%+v was taken and is not taken again: %v", m, err)
		}
		if diff := cmp.Diff(m, got); diff != "" {
			t.Fatal(diff)
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add(hello{Min: 1, Max: 2, Cluster: "c", From: "a", To: "b", Refusal: "no"}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHello(bytes.NewReader(b))
		if err == nil && !bytes.HasPrefix(b, h.encode()) {
			t.Fatalf("%+v from %x", h, b)
		}
	})
}
