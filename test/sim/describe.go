package sim

import (
	"encoding/json"
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/ballast-csi/ballast/pkg/replication"
)

var storeNames = [...]string{"none", "persist", "mark-wil", "clear-wil", "read", "write", "zero", "sync", "hash", "allocated",
	"missed", "track", "drop-missed", "mark-missed", "seal", "resize"}

// describe is an operation of a store in a few words.
func describe(o *replication.StoreOp) string {
	s := storeNames[o.Kind]
	switch o.Kind {
	case replication.StoreWrite:
		s += fmt.Sprintf(" block %d %v", o.Off/blockSize, decode(o.Data))
		if epoch, session, ok := stampOf(o.Data); ok {
			s += fmt.Sprintf(" of e%d.%d", epoch, session)
		}
	case replication.StoreRead, replication.StoreZero, replication.StoreHash:
		s += fmt.Sprintf(" block %d+%d", o.Off/blockSize, o.Len/blockSize)
	case replication.StoreMarkWIL, replication.StoreClearWIL:
		s += fmt.Sprintf(" %v", o.Runs)
	case replication.StoreMissed, replication.StoreTrack, replication.StoreDropMissed, replication.StoreMarkMissed, replication.StoreAllocated:
		s += fmt.Sprintf(" %+v", o.Set)
	case replication.StoreSeal:
		s += fmt.Sprintf(" %s #%d", o.Snapshot, o.Number)
	case replication.StoreResize:
		s += fmt.Sprintf(" %d", o.Len/blockSize)
	}
	if o.FUA {
		s += " FUA"
	}
	for _, m := range o.Marks {
		s += fmt.Sprintf(" missed by %s", m.Peer)
	}
	return s
}

func describeChange(c *replication.Change) string {
	b, err := json.Marshal(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func describeMessage(m *replication.Message) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%v e%d.%d seq %d op %d", m.Kind, m.Epoch, m.Session, m.Seq, m.Op)
	if m.Reply {
		fmt.Fprintf(&s, " -> %v", m.Status)
	}
	if m.Len > 0 || len(m.Data) > 0 {
		fmt.Fprintf(&s, " block %d+%d", m.Off/blockSize, max(m.Len, int64(len(m.Data)))/blockSize)
	}
	if m.Config != nil {
		fmt.Fprintf(&s, " %+v", *m.Config)
	}
	if m.Set != nil {
		fmt.Fprintf(&s, " %+v", *m.Set)
	}
	if m.Seal != nil {
		fmt.Fprintf(&s, " %+v", *m.Seal)
	}
	return s.String()
}

func stack() string { return string(debug.Stack()) }
