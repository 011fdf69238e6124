package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/mount"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Observe implements control.Agents.
func (n *Node) Observe(_ context.Context, node volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	if err := n.here(node); err != nil {
		return nil, err
	}
	out := make([]control.Observation, len(of))
	for i, s := range of {
		out[i].Replica, out[i].LastFlush = n.observeReplica(s.Replica)
		out[i].Device = n.deviceConditions(s.Volume)
		if r, runs := n.engine(s.Volume); runs {
			out[i].Engine = &r
		}
	}
	return out, nil
}

// Health returns what is wrong with a volume as this node sees it, dead paths included. It returns volume.ErrNotFound for
// a volume that does not exist, or that has nothing to do with this node.
func (n *Node) Health(ctx context.Context, id volume.ID) ([]volume.Condition, error) {
	c, err := n.connected()
	if err != nil {
		return nil, err
	}
	v, known := n.known(id)
	cv, err := used(ctx, c, id)
	if err != nil && !(known && errors.Is(err, volume.ErrNotFound)) {
		return nil, err
	}
	i := slices.IndexFunc(cv.Replicas, func(r volume.Replica) bool { return r.Node == n.cfg.ID })
	var out []volume.Condition
	if i >= 0 {
		out, _ = n.observeReplica(cv.Replicas[i])
	} else if !known && (cv.Attachment == nil || cv.Attachment.Node != n.cfg.ID) {
		return nil, fmt.Errorf("volume %s is not on node %s: %w", id, n.cfg.ID, volume.ErrNotFound)
	}
	out = append(out, n.deviceConditions(id)...)
	if known {
		if dead := v.get().dead; dead > 0 {
			out = append(out, volume.Condition{
				Severity: volume.Inaccessible, Reason: "DeviceGone",
				Message: fmt.Sprintf("the volume was taken away from %d paths of node %s, where all I/O fails; restart the workloads that use them", dead, n.cfg.ID),
			})
		}
	}
	return out, nil
}

// observeReplica tells what is wrong with a replica here, and when it was flushed last; one without an ID has no troubles.
func (n *Node) observeReplica(r volume.Replica) ([]volume.Condition, volume.Timestamp) {
	bad := func(reason, format string, a ...any) ([]volume.Condition, volume.Timestamp) {
		return []volume.Condition{{Severity: volume.Inaccessible, Reason: reason, Message: fmt.Sprintf(format, a...)}}, 0
	}
	p, ok := n.pools[r.Pool]
	switch {
	case r.ID == "":
		return nil, 0
	case !ok:
		return bad("PoolMissing", "pool %s is not open on node %s; bring its disk back and restart ballastd", r.Pool, n.cfg.ID)
	case !p.HasReplica(r.ID):
		return bad("ReplicaMissing", "pool %s has no replica %s; was its directory replaced? Bring the old one back, or restore a snapshot", r.Pool, r.ID)
	}
	type answer struct {
		conditions []volume.Condition
		lastFlush  volume.Timestamp
	}
	a, ok := ask(&n.silent, string(r.Pool), func() answer { return answer{p.Conditions(r.ID), p.LastFlush(r.ID)} })
	if !ok {
		return bad("PoolSilent", "pool %s on node %s does not answer: its disk hangs; look at the kernel's log and at the disk, and restart ballastd once it is sound", p.Info().Name, n.cfg.ID)
	}
	return a.conditions, a.lastFlush
}

// deviceConditions are what is wrong with a volume's engine, device and filesystem here.
func (n *Node) deviceConditions(id volume.ID) []volume.Condition {
	var out []volume.Condition
	add := func(s volume.Severity, reason, message string) {
		out = append(out, volume.Condition{Severity: s, Reason: reason, Message: message})
	}
	v, known := n.known(id)
	if !known {
		return out
	}
	s := v.get()
	if s.inst != nil {
		out = append(out, s.inst.e.Status().Conditions...)
	}
	if s.failed != "" {
		c := volume.Condition{Severity: volume.Inaccessible, Reason: string(s.failed), Message: failures[s.failed]}
		if c.Message == "" {
			c.Message = "the volume's engine ended; restart the workloads that use it"
		}
		out = append(out, c)
	}
	if s.notRestored != "" {
		add(volume.Inaccessible, "DeviceNotRestored", "the volume is not usable on node "+string(n.cfg.ID)+" since a restart, and is tried again: "+s.notRestored)
	}
	if s.notGrown != "" {
		add(volume.Degraded, "FilesystemNotGrown", "the volume was expanded, its filesystem not yet; restart its workload, and it is grown before the next mount: "+s.notGrown)
	}
	if s.anchor == "" || s.device == "" {
		return out
	}
	e, mounted, err := mount.At(s.anchor)
	switch {
	case err != nil || !mounted || e.Source != s.device:
		// It is just being mounted or unmounted.
	case e.Shutdown:
		add(volume.Inaccessible, "FilesystemShutDown", "the kernel shut the filesystem down after an error; restart its workload, and it is recovered before the next mount")
	case e.SuperReadOnly && !s.readOnly:
		add(volume.Inaccessible, "FilesystemReadOnly", "the kernel made the filesystem read-only after an error; cut a snapshot, then restart its workload: it is checked before the next mount")
	case ext4Errors(s.device) > 0:
		add(volume.Degraded, "FilesystemErrors", "the kernel found errors in the filesystem; cut a snapshot, then restart its workload: it is checked before the next mount")
	}
	return out
}

// failures say what an engine's end means.
var failures = map[replication.Reason]string{
	replication.ReasonSuperseded: "the volume was taken from this node by force, or attached again; all I/O of its device here fails. Workloads that still use it must be restarted",
	replication.ReasonRolledBack: "a replica knows a newer configuration than the controllers: their state was restored from an old copy. Nothing is served, so that no write is lost; " +
		"bring the controllers' newest state back, or salvage the volume",
	replication.ReasonLostWrites: "every replica that was left has been restarted with writes that were not flushed, as in a power cut; restart the workloads that use the volume, and its filesystem is checked before the next mount",
}

// ext4Errors is the count of errors that ext4 keeps of the filesystem on a device.
func ext4Errors(device string) int {
	text, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "errors_count"))
	if err != nil {
		return 0
	}
	count, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return count
}

// nearlyFull is the part of a pool's capacity in use from which its health is degraded.
const nearlyFull = 0.95

// StorageHealth returns what is wrong with the node's pools.
func (n *Node) StorageHealth() []volume.Condition {
	var out []volume.Condition
	for _, p := range n.cfg.Pools {
		i := p.Info()
		switch used := float64(i.Used) / float64(max(1, i.Capacity)); {
		case used >= 1:
			out = append(out, volume.Condition{
				Severity: volume.Degraded, Reason: "PoolFull",
				Message: fmt.Sprintf("pool %s is full: writes to new space wait; delete volumes or snapshots, or add capacity", i.Name),
			})
		case used >= nearlyFull:
			out = append(out, volume.Condition{
				Severity: volume.Degraded, Reason: "PoolNearlyFull",
				Message: fmt.Sprintf("pool %s is %.0f %% full; delete volumes or snapshots, or add capacity", i.Name, used*100),
			})
		}
	}
	// A reason may come once.
	slices.SortFunc(out, func(a, b volume.Condition) int { return strings.Compare(a.Reason+a.Message, b.Reason+b.Message) })
	return slices.CompactFunc(out, func(a, b volume.Condition) bool { return a.Reason == b.Reason })
}
