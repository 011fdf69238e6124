package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// DigestRegion is what one digest covers, in bytes.
	DigestRegion = 8 << 20
	// MaxDigests bounds the regions of one call.
	MaxDigests = 16
)

// Digest is what a copy of a snapshot has between an offset that was asked for and Next.
type Digest struct {
	// Regions are in order. One that reads as zeros is left out, whether it was ever written or not.
	Regions []RegionDigest
	// Next is where to go on; the snapshot's size is the end.
	Next int64
}

// RegionDigest is a hash of the bytes from Offset on, however they are stored.
type RegionDigest struct {
	Offset int64
	Sum    []byte
}

// of is the hash of the region at an offset; nil is zeros.
func (d Digest) of(offset int64) []byte {
	for _, r := range d.Regions {
		if r.Offset == offset {
			return r.Sum
		}
	}
	return nil
}

// Comparison is how far the copies of a snapshot are compared.
type Comparison struct {
	Snapshot volume.SnapshotID
	Offset   int64
	// Holders are those whose copies were compared up to Offset.
	Holders []volume.Replica
	// Done: nothing is left to compare.
	Done bool
}

// Compare goes on with a comparison of the copies of a ready snapshot, a bounded part of it, and ends it with the first difference,
// which it records. A copy is never changed for one: nobody can tell which is right. It returns volume.ErrBusy where the holders
// have changed meanwhile, and volume.ErrUnavailable where one does not answer: what was compared is worth nothing then.
func (s *Service) Compare(ctx context.Context, c Comparison) (Comparison, error) {
	x, err := s.comparable(ctx, &c)
	if err != nil || c.Done {
		return c, err
	}
	ds, err := s.digests(ctx, x, c.Offset, MaxDigests)
	if err != nil {
		return c, err
	}
	off, end := firstDifference(ds)
	if off < 0 {
		c.Offset, c.Done = end, end >= x.Size
		if c.Done && x.Differs != nil {
			s.o.Logger.Info("the copies of a snapshot are alike again", "snapshot", x.ID, "name", x.Name)
			return c, s.propose(ctx, command.NoteDifference{Snapshot: x.ID})
		}
		return c, nil
	}
	// The same again, and then the record: what was deleted, or filled in anew, meanwhile is no difference.
	again, err := s.digests(ctx, x, off, 1)
	if err != nil {
		return c, err
	}
	for i, d := range ds {
		if !bytes.Equal(d.of(off), again[i].of(off)) {
			return c, fmt.Errorf("the copy of snapshot %s on node %s is not the same twice, at offset %d: %w", x.ID, x.Holders[i].Node, off, volume.ErrBusy)
		}
	}
	if x, err = s.comparable(ctx, &c); err != nil || c.Done {
		return c, err
	}
	c.Done = true
	return c, s.noteDifference(ctx, x, off, ds)
}

// comparable returns the snapshot of a comparison as it is recorded; the comparison is Done where there is nothing to compare any more.
func (s *Service) comparable(ctx context.Context, c *Comparison) (volume.Snapshot, error) {
	x, err := s.Snapshot(ctx, c.Snapshot)
	if errors.Is(err, volume.ErrNotFound) {
		c.Done = true
		return x, nil
	}
	if err != nil {
		return x, err
	}
	if x.State != volume.Ready || len(x.Holders) < 2 {
		c.Done = true
		return x, nil
	}
	same := func(a, b volume.Replica) bool { return a.ID == b.ID && a.Pool == b.Pool && a.Node == b.Node }
	if c.Holders == nil {
		c.Holders = x.Holders
	} else if !slices.EqualFunc(c.Holders, x.Holders, same) {
		return x, fmt.Errorf("snapshot %s has got other holders while its copies were compared: %w", x.ID, volume.ErrBusy)
	}
	for _, h := range x.Holders {
		if h.Damaged {
			return x, fmt.Errorf("the copy of snapshot %s on node %s is damaged: %w", x.ID, h.Node, volume.ErrBusy)
		}
	}
	return x, nil
}

// digests are those of all holders, in their order.
func (s *Service) digests(ctx context.Context, x volume.Snapshot, offset int64, regions int) ([]Digest, error) {
	ds := make([]Digest, len(x.Holders))
	g, ctx := errgroup.WithContext(ctx)
	for i, h := range x.Holders {
		g.Go(func() (err error) {
			ds[i], err = s.agents.Digest(ctx, h, x.ID, offset, regions)
			switch {
			case err != nil:
				return fmt.Errorf("copy of snapshot %s on node %s: %w", x.ID, h.Node, err)
			case ds[i].Next <= offset && offset < x.Size || len(ds[i].Regions) > regions:
				return fmt.Errorf("node %s did not answer what it was asked of snapshot %s: %w", h.Node, x.ID, volume.ErrUnavailable)
			}
			return nil
		})
	}
	return ds, g.Wait()
}

// firstDifference is the offset of the first region that is not alike in all copies, as far as all were read, which is end; -1 is none.
func firstDifference(ds []Digest) (off, end int64) {
	end = ds[0].Next
	for _, d := range ds {
		end = min(end, d.Next)
	}
	off = -1
	for _, d := range ds {
		for _, r := range d.Regions {
			if r.Offset >= end || off >= 0 && r.Offset >= off {
				break
			}
			if slices.ContainsFunc(ds, func(o Digest) bool { return !bytes.Equal(o.of(r.Offset), r.Sum) }) {
				off = r.Offset
			}
		}
	}
	return off, end
}

func (s *Service) noteDifference(ctx context.Context, x volume.Snapshot, off int64, ds []Digest) error {
	diff := volume.Difference{Offset: off}
	var sums [][]byte
	for i, h := range x.Holders {
		sum := ds[i].of(off)
		at := slices.IndexFunc(sums, func(o []byte) bool { return bytes.Equal(o, sum) })
		if at < 0 {
			at = len(sums)
			sums, diff.Alike = append(sums, sum), append(diff.Alike, nil)
		}
		diff.Alike[at] = append(diff.Alike[at], h.Pool)
	}
	slices.SortStableFunc(diff.Alike, func(a, b []volume.PoolID) int { return len(b) - len(a) })
	if reflect.DeepEqual(x.Differs, &diff) {
		return nil
	}
	if err := s.propose(ctx, command.NoteDifference{Snapshot: x.ID, Differs: &diff}); err != nil {
		return err
	}
	x.Differs = &diff
	s.o.Logger.Error("the copies of a snapshot differ", "snapshot", x.ID, "name", x.Name, "volume", x.Volume, "offset", off, "copies", copiesText(x, diff))
	return nil
}

const condDiffer = "CopiesDiffer"

// SnapshotConditions are what is wrong with a snapshot; none is healthy.
func SnapshotConditions(x volume.Snapshot) []volume.Condition {
	what, next := differing(x)
	if what == "" {
		return nil
	}
	return []volume.Condition{{Severity: volume.Degraded, Reason: condDiffer, Message: what + "; " + next}}
}

// differing says how the copies of a snapshot differ, and the safe next step; "" where they are not known to.
func differing(x volume.Snapshot) (what, next string) {
	d := x.CopiesDiffer()
	if d == nil || x.State != volume.Ready {
		return "", ""
	}
	odd := "nobody can tell which is right"
	if len(d.Alike) == 2 && len(d.Alike[0]) > 1 && len(d.Alike[1]) == 1 {
		odd = "the one that stands alone is likely wrong, but nobody can tell"
	}
	what = fmt.Sprintf("its copies differ within %s from offset %d on: %s; no checksum tells of damage, so %s, and all are kept",
		bytesText(DigestRegion), d.Offset, copiesText(x, *d), odd)
	next = fmt.Sprintf("delete neither it nor its volume, which may differ likewise; on each of these nodes `ballastctl volume export @%s` "+
		"serves the copy there: check each, and copy the right one into a new volume", x.Name)
	return what, next
}

// copiesText says which nodes have the same copy.
func copiesText(x volume.Snapshot, d volume.Difference) string {
	var copies []string
	for _, pools := range d.Alike {
		var on []string
		for _, h := range x.Holders {
			if slices.Contains(pools, h.Pool) {
				on = append(on, string(h.Node))
			}
		}
		copies = append(copies, strings.Join(on, ", "))
	}
	return "one on " + strings.Join(copies, ", another on ")
}
