package sim

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// Counters count what a run, or many, came across: a suite in which something never happened proves nothing about it.
type Counters struct {
	// Clients.
	Reads, Writes, Zeros, Flushes, FUAs, Cancels, Acked, Errors, Reissued, Busy int
	// Machines.
	Messages, StoreOps, Ticks, Attaches, Assigned, Gone, Lives, KeptLives, FencedOnly, Reconnects, Cleared int
	FailedSuperseded, FailedLost                                                                           int
	// Controllers.
	CommitDone, CommitRefused, CommitUnknown, CtlLost, CtlReplyLost, CtlLate, CtlTwice int
	ISRChanges, ISRAdded, ISRRemoved, MinInSync                                        int
	// Network.
	Connected, Broken, Unnoticed, Dropped, Delayed, Duplicated, Held, Late, Partitions, Isolated, OneWay, CtlCuts, CtlDowns int
	// Nodes and disks.
	Kills, KeptKills, PowerLosses, SitePowerLosses, TargetsLost, Boots, Pauses, Swaps, Hangs, Full, Slow                          int
	FailedSyncs, FailedWrites, FailedReads, FailedMetas, Lost, Reopened, Rested, NoRoom, Corrupted, Rollbacks, RolledBack, Rogues int
	// Operations.
	CleanDetaches, Detached, ForcedDetaches, ForcedAttaches, Deletes, Salvages      int
	Prepared, Sealed, Ready, Aborted, Unsnapped, LayersDeleted, Groups, GroupsReady int
	Expands, Resized, Added, Evicted, Removed, Drains                               int
	HealedLives, Rejoined, HealedSnapshots, HealedExpands, HungEvicted, HealedMoves int
}

func (c *Counters) outcome(o replication.CommitOutcome) {
	switch o {
	case replication.CommitDone:
		c.CommitDone++
	case replication.CommitRefused:
		c.CommitRefused++
	case replication.CommitUnknown:
		c.CommitUnknown++
	}
}

func (c *Counters) failed(r replication.Reason) {
	switch r {
	case replication.ReasonSuperseded:
		c.FailedSuperseded++
	case replication.ReasonLostWrites:
		c.FailedLost++
	case replication.ReasonRolledBack:
		c.RolledBack++
	}
}

// Add sums up.
func (c *Counters) Add(o *Counters) {
	a, b := reflect.ValueOf(c).Elem(), reflect.ValueOf(o).Elem()
	for i := range a.NumField() {
		a.Field(i).SetInt(a.Field(i).Int() + b.Field(i).Int())
	}
}

// Never names what did not happen.
func (c *Counters) Never() []string {
	var names []string
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		if v.Field(i).Int() == 0 {
			names = append(names, v.Type().Field(i).Name)
		}
	}
	return names
}

func (c *Counters) String() string {
	var s strings.Builder
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		fmt.Fprintf(&s, "%-17s%9d", v.Type().Field(i).Name, v.Field(i).Int())
		if i%5 == 4 {
			s.WriteByte('\n')
		} else {
			s.WriteString("   ")
		}
	}
	return s.String()
}
