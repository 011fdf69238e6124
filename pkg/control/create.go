package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

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
	c, err := s.cluster(ctx)
	if err != nil {
		return volume.Volume{}, err
	}
	choice, err := placement.Choose(c.view(), placement.Request{
		Size: size, Replicas: p.Replicas, Pool: p.Pool, Locality: p.DataLocality,
		Requisite: r.Requisite, Preferred: r.Preferred, Sources: holders, Refused: refused,
	})
	if errors.Is(err, volume.ErrNoSpace) {
		if settling := s.settling(c); settling != nil {
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
		x := volume.Replica{ID: replicaID(v.ID, i), Node: pool.Node, Pool: pool.ID, Role: volume.InSync}
		if r.Source != nil && !slices.Contains(holders, pool.ID) {
			x.Role = volume.Filling // from the others, once the volume is there
		}
		v.Replicas = append(v.Replicas, x)
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
		if len(snap.Holders) == 0 {
			return x, fmt.Errorf("source snapshot %s is lost: every copy was on pools that were forgotten: %w", snap.ID, volume.ErrDataLoss)
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
		if v.Lost {
			return x, fmt.Errorf("source volume %s is lost: every copy was on pools that were forgotten: %w", v.ID, volume.ErrDataLoss)
		}
		x, rs = source{size: v.Size, blockSize: v.Parameters.BlockSize, filesystem: v.Filesystem}, v.InSync()
	}
	if sound := slices.DeleteFunc(slices.Clone(rs), func(r volume.Replica) bool { return r.Damaged }); len(sound) > 0 {
		rs = sound
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
	if err := s.build(ctx, v); err != nil {
		var failed *failedReplica
		isReplica := errors.As(err, &failed)
		elsewhere := isReplica && errors.Is(err, volume.ErrUnavailable) && s.elsewhere(ctx, v, failed.pool, refused)
		if !definite(err) && !startOver(err) && !elsewhere {
			return v, fmt.Errorf("volume %s is being made: %w", v.ID, unfinished(err))
		}
		if undo := s.abandonCreate(ctx, v, err); undo != nil && !elsewhere {
			return v, undo
		}
		if isReplica && (elsewhere || errors.Is(err, volume.ErrNoSpace)) {
			refused[failed.pool] = failed.err.Error()
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

// failedReplica says which pool could not make its replica.
type failedReplica struct {
	pool volume.PoolID
	err  error
}

func (f *failedReplica) Error() string { return f.err.Error() }
func (f *failedReplica) Unwrap() error { return f.err }

// build makes the replicas of a new volume, on all nodes at once. A clone is made through a hidden snapshot of its source.
func (s *Service) build(ctx context.Context, v volume.Volume) error {
	var parent volume.SnapshotID
	switch {
	case v.Source == nil:
	case v.Source.Snapshot != "":
		parent = v.Source.Snapshot
	default:
		// Once the replicas are there the cut may be gone: they are not to be made from a later one.
		made, err := s.hasAll(ctx, v)
		if err != nil {
			return err
		}
		if made {
			return s.dropCut(ctx, v)
		}
		cut, err := s.cutSource(ctx, v)
		if err != nil {
			return err
		}
		parent = cut.ID
	}
	errs := make([]error, len(v.Replicas))
	var wg sync.WaitGroup
	for i, r := range v.Replicas {
		spec := ReplicaSpec{ID: r.ID, Volume: v.ID, Tenant: v.Tenant, Pool: r.Pool, Size: v.Size}
		if r.Role == volume.InSync {
			spec.Parent = parent
		}
		wg.Go(func() {
			if err := s.agents.CreateReplica(ctx, r.Node, spec); err != nil {
				errs[i] = &failedReplica{r.Pool, fmt.Errorf("replica on node %s: %w", r.Node, err)}
			}
		})
	}
	wg.Wait()
	// What is final decides, whatever became of the others.
	for _, err := range errs {
		if err != nil && definite(err) {
			return err
		}
	}
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return s.dropCut(ctx, v)
}

func (s *Service) hasAll(ctx context.Context, v volume.Volume) (bool, error) {
	for _, r := range v.Replicas {
		has, err := s.agents.HasReplica(ctx, r.Node, r.Pool, r.ID)
		if err != nil {
			return false, &failedReplica{r.Pool, fmt.Errorf("replica on node %s: %w", r.Node, err)}
		}
		if !has {
			return false, nil
		}
	}
	return true, nil
}

// cutSource cuts the snapshot through which a clone is made, or returns the one that was cut.
func (s *Service) cutSource(ctx context.Context, v volume.Volume) (volume.Snapshot, error) {
	id := cloneCut(v.ID)
	unlock, err := s.flights.lock(ctx, snapshotKey(string(id)))
	if err != nil {
		return volume.Snapshot{}, err
	}
	defer unlock()
	x, _, err := s.takeSnapshot(ctx, command.BeginSnapshot{Now: s.now(), ID: id, Name: string(id), Volume: v.Source.Volume, Hidden: true})
	switch {
	case err != nil:
		return x, fmt.Errorf("cut the source of volume %s: %w", v.ID, err)
	case x.Size > v.Size:
		return x, fmt.Errorf("source volume %s has grown to %d bytes: %w", x.Volume, x.Size, volume.ErrOutOfRange)
	}
	for _, r := range v.InSync() {
		if !slices.ContainsFunc(x.Holders, func(h volume.Replica) bool { return h.Pool == r.Pool }) {
			return x, again{fmt.Errorf("pool %s lost the source of volume %s meanwhile; try again: %w", r.Pool, v.ID, volume.ErrBusy)}
		}
	}
	return x, nil
}

// dropCut frees the snapshot through which a clone was made.
func (s *Service) dropCut(ctx context.Context, v volume.Volume) error {
	if v.Source == nil || v.Source.Volume == "" {
		return nil
	}
	unlock, err := s.flights.lock(ctx, snapshotKey(string(cloneCut(v.ID))))
	if err != nil {
		return err
	}
	defer unlock()
	x, err := s.proposeSnapshot(ctx, command.BeginDeleteSnapshot{Snapshot: cloneCut(v.ID)})
	if err != nil {
		return ignoreNotFound(err)
	}
	return s.completeDeleteSnapshot(ctx, x.Snapshot)
}

// elsewhere tells whether a new volume can be placed without a pool whose node does not answer.
func (s *Service) elsewhere(ctx context.Context, v volume.Volume, down volume.PoolID, refused map[volume.PoolID]string) bool {
	c, err := s.cluster(ctx)
	if err != nil || ctx.Err() != nil {
		return false
	}
	without := maps.Clone(refused)
	without[down] = "its node does not answer"
	r := placement.Request{
		Size: v.Size, Replicas: v.Parameters.Replicas, Pool: v.Parameters.Pool, Locality: v.Parameters.DataLocality,
		Requisite: v.Accessible, Refused: without,
	}
	if v.Source != nil {
		src, err := s.source(ctx, *v.Source)
		if err != nil {
			return false
		}
		r.Sources = src.holders
	}
	_, err = placement.Choose(c.view(), r)
	return err == nil
}

// abandonCreate undoes a create that was refused with cause. nil: nothing of it is left. Otherwise the reconciler goes on,
// and the error is not a final one; again where another controller has made the volume meanwhile, which stays.
func (s *Service) abandonCreate(ctx context.Context, v volume.Volume, cause error) error {
	ctx, cancel := s.undoing(ctx)
	defer cancel()
	x, err := s.proposeVolume(ctx, command.BeginDelete{Volume: v.ID, Unfinished: true})
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err == nil && x.Volume.State == volume.Ready {
		return again{fmt.Errorf("volume %s was refused (%v), and another controller has made it; try again: %w", v.ID, cause, volume.ErrBusy)}
	}
	if err == nil {
		err = s.completeDelete(ctx, x.Volume)
	}
	if err != nil {
		return fmt.Errorf("volume %s was refused (%v) and is still being undone (%v): %w", v.ID, cause, err, volume.ErrUnavailable)
	}
	return nil
}
