package command

import (
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Result is what the state machine answers to a command: Done, Volume, Snapshot, Group, JoinToken or Refused.
type Result interface{ result() }

// Done answers a command that has nothing to say.
type Done struct{}

// Volume answers with the record as it is after the command.
type Volume struct {
	Volume volume.Volume
	// Created is true where this command made it, its attachment or its reservation.
	Created bool
}

// Snapshot answers with the record as it is after the command.
type Snapshot struct {
	Snapshot volume.Snapshot
	// Created is true where this command made it.
	Created bool
}

// Group answers with the records as they are after the command; Snapshots are its members, in its order.
type Group struct {
	Group     volume.Group
	Snapshots []volume.Snapshot
	// Created is true where this command made it.
	Created bool
}

// JoinToken answers with the record as it is after the command.
type JoinToken struct {
	Record jointoken.Record
}

// Refused says that the state forbids the command: nothing was changed.
type Refused struct {
	// Reason names a sentinel error of package volume, or a refusal of package replication.
	Reason  Reason
	Message string
}

// Reason is the stable name of an error.
type Reason string

var reasons = []struct {
	name     Reason
	sentinel error
}{
	// The more special ones first.
	{"stale-epoch", replication.ErrStaleEpoch},
	{"stale-version", replication.ErrStaleVersion},
	{"last-member", replication.ErrLastMember},
	{"unknown-member", replication.ErrUnknownMember},
	{"attached", replication.ErrAttached},
	{"member-in-sync", replication.ErrMemberInSync},
	{"deleted", replication.ErrDeleted},
	{"no-barrier", replication.ErrNoBarrier},
	{"barrier-pending", replication.ErrBarrierPending},
	{"invalid", volume.ErrInvalid},
	{"denied", volume.ErrDenied},
	{"not-found", volume.ErrNotFound},
	{"exists", volume.ErrExists},
	{"in-use", volume.ErrInUse},
	{"out-of-range", volume.ErrOutOfRange},
	{"no-space", volume.ErrNoSpace},
	{"quota", volume.ErrQuota},
	{"busy", volume.ErrBusy},
	{"unavailable", volume.ErrUnavailable},
	{"stale", volume.ErrStale},
	{"data-loss", volume.ErrDataLoss},
}

// Refuse makes a Refused of an error.
func Refuse(err error) Refused {
	for _, r := range reasons {
		if errors.Is(err, r.sentinel) {
			return Refused{Reason: r.name, Message: err.Error()}
		}
	}
	return Refused{Message: err.Error()}
}

// Err is the error that was refused with: it says the same and wraps the same sentinel.
func (r Refused) Err() error {
	for _, x := range reasons {
		if r.Reason == x.name {
			return &refusal{r.Message, x.sentinel}
		}
	}
	return fmt.Errorf("refused: %s", r.Message)
}

type refusal struct {
	message  string
	sentinel error
}

func (e *refusal) Error() string { return e.message }
func (e *refusal) Unwrap() error { return e.sentinel }

func (Done) result()      {}
func (Volume) result()    {}
func (Snapshot) result()  {}
func (Group) result()     {}
func (JoinToken) result() {}
func (Refused) result()   {}
