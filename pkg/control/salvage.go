package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Candidate is a replica that a volume could be salvaged from.
type Candidate struct {
	Replica volume.Replica
	// Report is what the replica says; nil where it cannot be asked.
	Report *ReplicaReport
	// Against says why it is a bad choice, or none at all; "" is nothing.
	Against string
}

// Candidates lists the replicas of a volume, those that know the newest configuration first, for an admin who has to
// decide: what a replica lacks that is salvaged is lost.
func (s *Service) Candidates(ctx context.Context, id volume.ID) ([]Candidate, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return nil, err
	}
	list := make([]Candidate, len(v.Replicas))
	var wg sync.WaitGroup
	for i, r := range v.Replicas {
		wg.Go(func() {
			list[i].Replica = r
			limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
			defer cancel()
			report, err := s.agents.Inspect(limit, r, id)
			switch {
			case err != nil:
				list[i].Against = fmt.Sprintf("it cannot be asked: %v", err)
				return
			case !report.Present:
				list[i].Against = "its pool does not have it"
			case report.Poisoned:
				list[i].Against = "a sync of its disk failed: what it was given last may not be there"
			case report.Role == volume.Filling:
				list[i].Against = "it was being copied to: its bytes are a mixture"
			case report.Size < v.Size:
				list[i].Against = fmt.Sprintf("it has %d bytes, the volume %d", report.Size, v.Size)
			}
			list[i].Report = &report
		})
	}
	wg.Wait()
	slices.SortStableFunc(list, func(a, b Candidate) int {
		var x, y ReplicaReport
		if a.Report != nil {
			x = *a.Report
		}
		if b.Report != nil {
			y = *b.Report
		}
		return cmp.Or(cmp.Compare(rank(a.Against), rank(b.Against)), cmp.Compare(y.Lineage, x.Lineage), cmp.Compare(y.ConfigVersion, x.ConfigVersion),
			cmp.Compare(y.Epoch, x.Epoch), cmp.Compare(y.LastFlush, x.LastFlush))
	})
	return list, ctx.Err()
}

func rank(against string) int {
	if against == "" {
		return 0
	}
	return 1
}

// Salvage makes what one replica has the volume, under a new lineage; the others become stale, keep their bytes until they
// are overwritten with its, and are compared in full. It is an admin's decision only. It ends an attachment that nothing else
// can end; docs/adr/0008 says why nothing of the old engine reaches the new lineage. Cut off, the same call goes on.
//
// volume.ErrInUse: the volume is attached and can be detached, or a replica that is in sync can be reached and none is to be
// given up for another. ErrInvalid: the replica is none to choose. ErrUnavailable: the node to which the volume is attached
// still reports, or the replica cannot be fenced. ErrBusy: it was attached meanwhile. Force overrides that another replica would be better.
func (s *Service) Salvage(ctx context.Context, id volume.ID, replica volume.ReplicaID, force bool) (volume.Volume, error) {
	unlock, err := s.flights.lock(ctx, volumeKey(string(id)))
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	v, err := s.salvage(ctx, id, replica, force)
	s.record(ctx, "volume.salvage", string(id), fmt.Sprintf("replica %s, force %t", replica, force), err)
	return v, err
}

func (s *Service) salvage(ctx context.Context, id volume.ID, replica volume.ReplicaID, force bool) (volume.Volume, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return v, err
	}
	chosen, err := s.choose(ctx, v, replica, force)
	if err != nil {
		return v, err
	}
	if err := s.abandon(ctx, v); err != nil {
		return v, err
	}
	if v, err = s.live(ctx, id); err != nil {
		return v, err
	}
	if err := s.closeEngine(ctx, v); err != nil {
		return v, err
	}
	if v, err = s.live(ctx, id); err != nil {
		return v, err
	}
	// Until it refuses them, an engine that nobody reaches may reach the replica, and copy to it.
	limit, cancel := context.WithTimeout(ctx, s.o.FenceTimeout)
	defer cancel()
	if _, err := s.agents.Fence(limit, chosen.Replica, id, v.Epoch); err != nil {
		return v, fmt.Errorf("replica %s of volume %s cannot be fenced: %w", replica, id, unfinished(err))
	}
	chosen, err = s.choose(ctx, v, replica, force)
	if err != nil {
		return v, err
	}
	x, err := s.proposeVolume(ctx, command.Salvage{Volume: id, Replica: replica, Epoch: v.Epoch, Seen: chosen.seen, SeenEpoch: chosen.seenEpoch})
	return x.Volume, err
}

// choice is a candidate that may be salvaged.
type choice struct {
	Candidate
	// seen and seenEpoch are the newest configuration and epoch that any replica knows.
	seen      volume.ConfigVersion
	seenEpoch volume.Epoch
}

// choose checks that a volume may be salvaged from a replica.
func (s *Service) choose(ctx context.Context, v volume.Volume, replica volume.ReplicaID, force bool) (choice, error) {
	list, err := s.Candidates(ctx, v.ID)
	if err != nil {
		return choice{}, err
	}
	i := slices.IndexFunc(list, func(c Candidate) bool { return c.Replica.ID == replica })
	if i < 0 {
		return choice{}, fmt.Errorf("volume %s has no replica %.128q: %w", v.ID, replica, volume.ErrNotFound)
	}
	if a := v.Attachment; a != nil {
		for _, c := range list {
			if c.Replica.Role == volume.InSync && c.Report != nil && c.Report.Present {
				return choice{}, fmt.Errorf("volume %s is attached to node %s, and replica %s is in sync and answers; detach the volume there first: %w",
					v.ID, a.Node, c.Replica.ID, volume.ErrInUse)
			}
		}
	}
	chosen := choice{Candidate: list[i]}
	if chosen.Report == nil || !chosen.Report.Present || chosen.Report.Size < v.Size || chosen.Report.Role == volume.Filling {
		return choice{}, fmt.Errorf("volume %s cannot be salvaged from replica %s: %s: %w", v.ID, replica, chosen.Against, volume.ErrInvalid)
	}
	for j, c := range list {
		if c.Report != nil {
			chosen.seen, chosen.seenEpoch = max(chosen.seen, c.Report.ConfigVersion), max(chosen.seenEpoch, c.Report.Epoch)
		}
		better := c.Report != nil && c.Against == "" && (c.Replica.Role == volume.InSync || j < i)
		if j != i && better && chosen.Replica.Role != volume.InSync && !force {
			return choice{}, fmt.Errorf("replica %s of volume %s can be reached and is newer than %s: attach the volume, or salvage that one: %w",
				c.Replica.ID, v.ID, replica, volume.ErrInUse)
		}
	}
	return chosen, nil
}
