package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/placement"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// again says that the world changed under a step, that nothing of it is left, and that starting over may help. It reads
// as the error within.
type again struct{ error }

func (a again) Unwrap() error { return a.error }

func startOver(err error) bool {
	var a again
	return errors.As(err, &a)
}

// starts bounds how often an operation is started over.
const starts = 4

// CreateVolume makes a volume and returns it Ready. The same request again returns the same volume.
//
// volume.ErrInvalid: malformed or unsupported. ErrNotFound: the source. ErrExists: the name is taken by a volume that
// differs, the field is named. ErrNoSpace: no pool has room or the topology cannot be met. ErrQuota. ErrOutOfRange: the
// size. After these nothing of the request exists. After ErrUnavailable, ErrBusy or the end of ctx it may be half made.
func (s *Service) CreateVolume(ctx context.Context, r CreateVolume) (volume.Volume, error) {
	r, err := normalise(r)
	if err != nil {
		return volume.Volume{}, err
	}
	unlock, err := s.flights.lock(ctx, volumeNameKey(r.Name))
	if err != nil {
		return volume.Volume{}, err
	}
	defer unlock()
	refused := map[volume.PoolID]string{}
	for n := 1; ; n++ {
		v, made, err := s.createOnce(ctx, r, refused)
		if startOver(err) && n < starts {
			continue
		}
		if made || err != nil {
			s.record(ctx, "volume.create", objectOf(v.ID, r.Name), fmt.Sprintf("name %q, tenant %s, %d bytes", r.Name, r.Tenant, v.Size), err)
		}
		if err != nil {
			return volume.Volume{}, err
		}
		return v, nil
	}
}

func objectOf[T ~string](id T, name string) string {
	if id == "" {
		return name
	}
	return string(id)
}

func (s *Service) createOnce(ctx context.Context, r CreateVolume, refused map[volume.PoolID]string) (v volume.Volume, made bool, err error) {
	v, err = s.store.VolumeByName(ctx, r.Name)
	if errors.Is(err, volume.ErrNotFound) {
		return s.createNew(ctx, r, refused)
	}
	if err != nil {
		return v, false, err
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return v, false, err
	}
	if err := compare(r, v, nodes); err != nil {
		return v, false, err
	}
	if v.State == volume.Ready {
		return v, false, nil
	}
	unlock, err := s.flights.lock(ctx, volumeKey(string(v.ID)))
	if err != nil {
		return v, false, err
	}
	defer unlock()
	v, err = s.completeCreate(ctx, v.ID, refused)
	return v, true, err
}

func (s *Service) createNew(ctx context.Context, r CreateVolume, refused map[volume.PoolID]string) (v volume.Volume, made bool, err error) {
	v, err = s.plan(ctx, r, refused)
	if err != nil {
		return v, false, err
	}
	// The id is locked before it is known to anyone, so that the reconciler leaves it alone.
	unlock, err := s.flights.lock(ctx, volumeKey(string(v.ID)))
	if err != nil {
		return v, false, err
	}
	defer unlock()
	x, err := s.proposeVolume(ctx, command.CreateVolume{Volume: v})
	switch {
	case errors.Is(err, volume.ErrNoSpace), errors.Is(err, volume.ErrBusy), errors.Is(err, volume.ErrOutOfRange) && r.Source != nil:
		// Another create was faster than the view that the choice was made from, or the source grew.
		return v, false, again{err}
	case err != nil:
		return v, false, err
	case !x.Created:
		return v, false, again{fmt.Errorf("volume %s took the name %q just now; try again: %w", x.Volume.ID, r.Name, volume.ErrBusy)}
	}
	v, err = s.completeCreate(ctx, v.ID, refused)
	return v, true, err
}

// plan makes the record of a new volume: its size, what it inherits, and where its replicas go.
func (s *Service) plan(ctx context.Context, r CreateVolume, refused map[volume.PoolID]string) (volume.Volume, error) {
	var sourceSize int64
	var holders []volume.PoolID
	p := r.Parameters
	if r.Source != nil {
		src, err := s.source(ctx, *r.Source)
		if err != nil {
			return volume.Volume{}, err
		}
		if p, err = inherit(r, src.blockSize, src.filesystem); err != nil {
			return volume.Volume{}, err
		}
		sourceSize, holders = src.size, src.holders
	}
	size, err := chooseSize(r.RequiredBytes, r.LimitBytes, minimum(p, r.Capabilities), sourceSize)
	if err != nil {
		return volume.Volume{}, err
	}
	view, err := s.view(ctx)
	if err != nil {
		return volume.Volume{}, err
	}
	choice, err := placement.Choose(view, placement.Request{
		Size: size, Replicas: p.Replicas, Pool: p.Pool, Locality: p.DataLocality,
		Requisite: r.Requisite, Preferred: r.Preferred, Sources: holders, Refused: refused,
	})
	if errors.Is(err, volume.ErrNoSpace) {
		if settling := s.settling(view); settling != nil {
			return volume.Volume{}, fmt.Errorf("%v; %w", err, settling)
		}
	}
	if err != nil {
		return volume.Volume{}, err
	}
	random, err := newID()
	if err != nil {
		return volume.Volume{}, err
	}
	v := volume.Volume{
		ID: volume.ID(volumePrefix + random), Name: r.Name, Tenant: r.Tenant, State: volume.Creating, Size: size, Parameters: p,
		QoS: r.QoS, Capabilities: r.Capabilities, Source: r.Source, Accessible: r.Requisite[:min(len(r.Requisite), command.MaxTopology)], CreatedAt: s.now(),
	}
	for i, pool := range choice {
		v.Replicas = append(v.Replicas, volume.Replica{ID: replicaID(v.ID, i), Node: pool.Node, Pool: pool.ID})
	}
	return v, nil
}

type source struct {
	size       int64
	blockSize  int
	filesystem volume.Filesystem
	holders    []volume.PoolID
}

func (s *Service) source(ctx context.Context, from volume.Source) (source, error) {
	var x source
	var rs []volume.Replica
	if from.Snapshot != "" {
		snap, err := s.Snapshot(ctx, from.Snapshot)
		if err != nil {
			return x, fmt.Errorf("source: %w", err)
		}
		if snap.State != volume.Ready {
			return x, fmt.Errorf("source snapshot %s is not ready yet: %w", snap.ID, volume.ErrBusy)
		}
		x, rs = source{size: snap.Size, blockSize: snap.BlockSize, filesystem: snap.Filesystem}, snap.Holders
	} else {
		v, err := s.live(ctx, from.Volume)
		if err != nil {
			return x, fmt.Errorf("source: %w", err)
		}
		if v.State != volume.Ready {
			return x, fmt.Errorf("source volume %s is not ready yet: %w", v.ID, volume.ErrBusy)
		}
		x, rs = source{size: v.Size, blockSize: v.Parameters.BlockSize, filesystem: v.Filesystem}, v.Replicas
	}
	x.holders = []volume.PoolID{}
	for _, r := range rs {
		x.holders = append(x.holders, r.Pool)
	}
	return x, nil
}

// completeCreate takes a volume from wherever its creation stopped to Ready, or undoes it after a definite refusal. The
// caller has its lock. It returns again where nothing of the volume is left and another try may end otherwise.
func (s *Service) completeCreate(ctx context.Context, id volume.ID, refused map[volume.PoolID]string) (volume.Volume, error) {
	v, err := s.live(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		return v, again{fmt.Errorf("volume %s was deleted while it was made; try again: %w", id, volume.ErrBusy)}
	}
	if err != nil || v.State == volume.Ready {
		return v, err
	}
	for _, r := range v.Replicas {
		err := s.buildReplica(ctx, v, r)
		if err == nil {
			continue
		}
		if !definite(err) {
			return v, fmt.Errorf("volume %s is being made, replica on node %s: %w", v.ID, r.Node, unfinished(err))
		}
		if err := s.abandonCreate(ctx, v, err); err != nil {
			return v, err
		}
		if errors.Is(err, volume.ErrNoSpace) {
			refused[r.Pool] = err.Error()
			return v, again{err}
		}
		if errors.Is(err, volume.ErrOutOfRange) && v.Source != nil && v.Source.Volume != "" {
			return v, again{err} // the source grew since its size was read
		}
		return v, err
	}
	x, err := s.proposeVolume(ctx, command.FinishCreate{Volume: v.ID})
	if errors.Is(err, volume.ErrBusy) { // the source was formatted while it was copied
		if err := s.abandonCreate(ctx, v, err); err != nil {
			return v, err
		}
		return v, again{err}
	}
	return x.Volume, unfinished(err)
}

// buildReplica makes one replica of a new volume. A clone is made through a hidden snapshot of its source's replica in
// the same pool.
func (s *Service) buildReplica(ctx context.Context, v volume.Volume, r volume.Replica) error {
	spec := ReplicaSpec{ID: r.ID, Volume: v.ID, Tenant: v.Tenant, Pool: r.Pool, Size: v.Size}
	if v.Source == nil || v.Source.Volume == "" {
		if v.Source != nil {
			spec.Parent = v.Source.Snapshot
		}
		return s.agents.CreateReplica(ctx, r.Node, spec)
	}
	// Once the replica is there its cut may be gone: it is not to be made from a later one.
	has, err := s.agents.HasReplica(ctx, r.Node, r.Pool, r.ID)
	if err != nil {
		return err
	}
	if !has {
		from, err := s.replicaIn(ctx, v.Source.Volume, r.Pool)
		if err != nil {
			return err
		}
		cut := SnapshotSpec{ID: cloneCut(v.ID), Volume: v.Source.Volume, Replica: from.ID, Pool: r.Pool}
		if err := s.agents.CutSnapshot(ctx, r.Node, cut); err != nil {
			return err
		}
		spec.Parent = cut.ID
		if err := s.agents.CreateReplica(ctx, r.Node, spec); err != nil {
			return err
		}
	}
	return s.agents.DeleteSnapshot(ctx, r.Node, r.Pool, cloneCut(v.ID))
}

func (s *Service) replicaIn(ctx context.Context, id volume.ID, pool volume.PoolID) (volume.Replica, error) {
	v, err := s.live(ctx, id)
	if err != nil {
		return volume.Replica{}, err
	}
	for _, r := range v.Replicas {
		if r.Pool == pool {
			return r, nil
		}
	}
	return volume.Replica{}, fmt.Errorf("volume %s has no replica in pool %s: %w", id, pool, volume.ErrNotFound)
}

// abandonCreate undoes a create that was refused with cause. nil: nothing of it is left. Otherwise the reconciler goes on,
// and the error is not a final one.
func (s *Service) abandonCreate(ctx context.Context, v volume.Volume, cause error) error {
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	x, err := s.proposeVolume(ctx, command.BeginDelete{Volume: v.ID})
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = s.completeDelete(ctx, x.Volume)
	}
	if err != nil {
		return fmt.Errorf("volume %s was refused (%v) and is still being undone (%v): %w", v.ID, cause, err, volume.ErrUnavailable)
	}
	return nil
}
