package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/nbd"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// exportGrace is how long the end of an export waits for requests in flight. Who takes a volume away waits as long.
const exportGrace = 2 * time.Second

// exports are those that are served now, by the id of the volume or the snapshot. Each of them has one at most, which
// many clients may share.
type exports struct {
	mu sync.Mutex
	m  map[string]*export
}

// export is served on a socket of its own.
type export struct {
	what    string // for people
	id      string
	volume  volume.ID
	replica volume.ReplicaID // of a volume that is not attached; the export has it open
	end     context.CancelCauseFunc
	done    chan struct{} // closed when nothing of it is left
}

// errExportEnded is why an export ended without its client's asking.
func errExportEnded(e *export, why string) error {
	return fmt.Errorf("the export of %s has ended: %s: %w", e.what, why, volume.ErrInUse)
}

func (n *Node) exportDir() string { return filepath.Join(n.cfg.RunDir, "exports") }

// ExportVolume serves a volume over NBD, on a Unix socket that only root may open, until ctx ends. A volume that is in
// use here is served through its engine, beside its user; one that is not attached, from its one replica. Unless
// writable, it is served read-only. It calls started, with what NBD clients on this host take, once they may connect, and
// ends with its error.
//
// Whoever takes the volume away (an unstage, a detach, a delete) ends the export, which then returns volume.ErrInUse and
// why. A volume that is exported while it is not attached is not staged until the export has ended.
//
// It returns volume.ErrInUse for a volume that is exported already, or attached to another node.
func (n *Node) ExportVolume(ctx context.Context, id volume.ID, writable bool, started func(uri string) error) error {
	c, err := n.connected()
	if err != nil {
		return err
	}
	cv, err := used(ctx, c, id)
	if err != nil {
		return err
	}
	v, err := n.acquire(ctx, id, true)
	if err != nil {
		return err
	}
	e := &export{what: "volume " + string(id), id: string(id), volume: id}
	served, closeDevice, err := n.exported(ctx, v, cv, e)
	if err == nil {
		served.ReadOnly = !writable
		ctx, err = n.begin(ctx, e)
		if err != nil {
			err = errors.Join(err, closeDevice())
		}
	}
	n.release(v)
	if err != nil {
		return err
	}
	return n.serveExport(ctx, e, served, started, closeDevice)
}

// exported returns what an export of the volume serves, and what ends its use. The volume is locked.
func (n *Node) exported(ctx context.Context, v *vol, cv volume.Volume, e *export) (nbd.Export, func() error, error) {
	switch a := cv.Attachment; {
	case cv.State == volume.Deleting:
		return nbd.Export{}, nil, fmt.Errorf("volume %s is being deleted: %w", cv.ID, volume.ErrNotFound)
	case v.eng != nil:
		return nbd.Export{Device: v.eng.dev}, func() error { return nil }, nil
	case a != nil && a.Node != n.cfg.ID:
		return nbd.Export{}, nil, fmt.Errorf("volume %s is attached to node %s; export it there: %w", cv.ID, a.Node, volume.ErrInUse)
	case a != nil:
		return nbd.Export{}, nil, fmt.Errorf("volume %s is attached to this node and not staged yet; try again, or detach it first: %w", cv.ID, volume.ErrInUse)
	case len(cv.Replicas) != 1:
		// One of several may be behind the others; who attaches finds that out.
		return nbd.Export{}, nil, fmt.Errorf("volume %s is not attached and has %d replicas; take a snapshot and export that: %w", cv.ID, len(cv.Replicas), volume.ErrInUse)
	}
	at := cv.Replicas[0]
	if _, err := n.pool(at.Node, at.Pool); err != nil {
		return nbd.Export{}, nil, fmt.Errorf("volume %s: %w", cv.ID, err)
	}
	dev, done, err := n.host.lend(ctx, at.ID)
	if err != nil {
		return nbd.Export{}, nil, fmt.Errorf("volume %s: %w", cv.ID, err)
	}
	e.replica = at.ID
	return nbd.Export{Device: dev}, done, nil
}

// ExportSnapshot serves a snapshot that a pool of this node holds, as ExportVolume does; it cannot be written. Its space
// is not freed before the export has ended.
func (n *Node) ExportSnapshot(ctx context.Context, s volume.Snapshot, started func(uri string) error) error {
	for _, h := range s.Holders {
		pool := n.pools[h.Pool]
		if h.Node != n.cfg.ID || pool == nil {
			continue
		}
		dev, err := pool.OpenSnapshot(ctx, s.ID)
		if err != nil {
			return fmt.Errorf("open snapshot %s: %w", s.ID, err)
		}
		e := &export{what: "snapshot " + string(s.ID), id: string(s.ID)}
		ctx, err := n.begin(ctx, e)
		if err != nil {
			return errors.Join(err, dev.Close())
		}
		return n.serveExport(ctx, e, nbd.Export{Device: dev, ReadOnly: true, Extents: written(pool, s.ID)}, started, dev.Close)
	}
	if len(s.Holders) == 0 {
		return fmt.Errorf("no node holds snapshot %s: %w", s.ID, volume.ErrUnavailable)
	}
	return fmt.Errorf("snapshot %s is held by node %s; export it there: %w", s.ID, s.Holders[0].Node, volume.ErrInUse)
}

// written are the runs of a snapshot that hold data, as NBD asks for them.
func written(p Pool, id volume.SnapshotID) func(context.Context, int64, int64, func(off, n int64) error) error {
	return func(ctx context.Context, off, n int64, fn func(off, n int64) error) error {
		behind := errors.New("behind the range")
		err := p.Extents(ctx, id, "", off, func(o, k int64) error {
			if o >= off+n {
				return behind
			}
			return fn(o, min(k, off+n-o))
		})
		if errors.Is(err, behind) {
			return nil
		}
		return err
	}
}

// begin enters an export into the list. The context ends with the export.
func (n *Node) begin(ctx context.Context, e *export) (context.Context, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, n.stopping()
	}
	x := &n.exports
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.m[e.id] != nil {
		return nil, fmt.Errorf("%s is exported already, on %s; share that, or end it first: %w", e.what, n.exportSocket(e), volume.ErrInUse)
	}
	if x.m == nil {
		x.m = map[string]*export{}
	}
	x.m[e.id] = e
	e.done = make(chan struct{})
	ctx, e.end = context.WithCancelCause(ctx)
	n.wg.Add(1) // serveExport's; Close waits
	return ctx, nil
}

func (n *Node) exportSocket(e *export) string { return filepath.Join(n.exportDir(), e.id+".sock") }

// serveExport serves what begin has entered, and closes the device.
func (n *Node) serveExport(ctx context.Context, e *export, served nbd.Export, started func(uri string) error, closeDevice func() error) (err error) {
	defer n.wg.Done()
	unhook := context.AfterFunc(n.ctx, func() { e.end(n.stopping()) })
	defer func() {
		unhook()
		e.end(nil)
		err = errors.Join(err, closeDevice())
		n.exports.mu.Lock()
		delete(n.exports.m, e.id)
		n.exports.mu.Unlock()
		close(e.done)
		n.log.Info("export ended", "export", e.what)
	}()
	l, err := listenExport(n.exportSocket(e))
	if err != nil {
		return fmt.Errorf("export %s: %w", e.what, err)
	}
	n.log.Info("export begins", "export", e.what, "socket", n.exportSocket(e), "read-only", served.ReadOnly)
	result := make(chan error, 1)
	go func() {
		result <- nbd.Serve(ctx, l, []nbd.Export{served}, nbd.Options{Logger: n.log, Grace: exportGrace})
	}()
	if err = started(exportURI(n.exportSocket(e))); err != nil {
		e.end(nil)
	}
	err = errors.Join(err, <-result)
	// A client that went away is no error; another end is told.
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	return err
}

func exportURI(socket string) string {
	return "nbd+unix:///?socket=" + (&url.URL{Path: socket}).EscapedPath()
}

func listenExport(socket string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// endExports ends the exports that match and waits until nothing of them reaches their devices any more; volume.ErrBusy where that
// takes longer than ctx.
func (n *Node) endExports(ctx context.Context, match func(*export) bool, why string) error {
	n.exports.mu.Lock()
	var ending []*export
	for _, e := range n.exports.m {
		if match(e) {
			ending = append(ending, e)
		}
	}
	n.exports.mu.Unlock()
	for _, e := range ending {
		e.end(errExportEnded(e, why))
		select {
		case <-e.done:
		case <-ctx.Done():
			return fmt.Errorf("the export of %s has requests that its disk does not answer: %w: %w", e.what, ctx.Err(), volume.ErrBusy)
		}
	}
	return nil
}

// endVolumeExport ends the export of a volume through its engine, which gives every request back.
func (n *Node) endVolumeExport(id volume.ID) {
	_ = n.endExports(context.Background(), func(e *export) bool { return e.volume == id }, "the volume was taken from this node")
}

// endReplicaExport ends the export of a volume that is not attached.
func (n *Node) endReplicaExport(ctx context.Context, id volume.ReplicaID) error {
	return n.endExports(ctx, func(e *export) bool { return e.replica == id }, "the volume was deleted")
}

// notExported returns volume.ErrInUse while the volume or the snapshot of that id is exported.
func (n *Node) notExported(id string) error {
	n.exports.mu.Lock()
	defer n.exports.mu.Unlock()
	if e := n.exports.m[id]; e != nil {
		return fmt.Errorf("%s is exported on %s; end that first: %w", e.what, n.exportSocket(e), volume.ErrInUse)
	}
	return nil
}
