package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/nbd"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/replicanet"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// replicated is what the table compares.
type replicated struct {
	name string
	up   func(ctx context.Context, dir string) (uri string, down func() error, err error)
}

var replicationLoads = []workload{
	{"4 KiB random write, QD 1", "randwrite", "4k", 1},
	{"4 KiB random write, QD 32", "randwrite", "4k", 32},
	{"1 MiB sequential write, QD 4", "write", "1m", 4},
	{"4 KiB random read, QD 1", "randread", "4k", 1},
	{"4 KiB random read, QD 32", "randread", "4k", 32},
}

// benchReplication measures an engine with replicas over loopback TCP, through NBD, against QEMU's quorum driver over
// nbdkit and against what the disks give: three plain files written at once.
func benchReplication(ctx context.Context, w io.Writer) (err error) {
	fmt.Fprintf(w, "## Replication\n\nfio's nbd engine, one connection over a Unix socket, for %v, all in turns; medians of %d. Every copy is a file of %d MiB, "+
		"filled before, on the same filesystem, opened with O_DIRECT; the first replica is on the engine's node, the others over loopback TCP. Quorum is QEMU's over three nbdkit, "+
		"over loopback TCP too. The limit is fio with io_uring on three plain files at once: what each of them gets.\n\n", frontendFor, frontendRounds, frontendSize>>20)
	dir, err := os.MkdirTemp("", "ballast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	systems := []replicated{
		{"quorum", quorumUp},
		{"1 replica", func(ctx context.Context, dir string) (string, func() error, error) {
			return engineUp(ctx, dir, 1, false)
		}},
		{"2 replicas", func(ctx context.Context, dir string) (string, func() error, error) {
			return engineUp(ctx, dir, 2, false)
		}},
		{"3 replicas", func(ctx context.Context, dir string) (string, func() error, error) {
			return engineUp(ctx, dir, 3, false)
		}},
		{"3, TLS", func(ctx context.Context, dir string) (string, func() error, error) {
			return engineUp(ctx, dir, 3, true)
		}},
	}
	var uris []string
	for _, s := range systems {
		at := filepath.Join(dir, strings.ReplaceAll(s.name, " ", "-"))
		if err := os.Mkdir(at, 0o700); err != nil {
			return err
		}
		uri, down, err := s.up(ctx, at)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		defer func() { err = errors.Join(err, down()) }()
		uris = append(uris, uri)
		// What was never written would be too easy to read and to write.
		fill := workload{name: "fill", rw: "write", block: "1m", depth: 4}
		if _, err := runFioFor(ctx, fill, 0, "--ioengine=nbd", "--uri="+uri, fmt.Sprintf("--size=%d", frontendSize)); err != nil {
			return fmt.Errorf("fill %s: %w", s.name, err)
		}
	}
	for i := range 3 {
		if _, err := backingFile(ctx, dir, fmt.Sprintf("plain.%d", i)); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "| Workload | limit | quorum | 1 replica | 2 | 3 | 3, TLS | 3 / limit | 3 / quorum | TLS / plain |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, load := range replicationLoads {
		m, err := inTurns(load, len(systems)+1, func(i int) (float64, error) {
			if i == 0 {
				limit, err := runFioFor(ctx, load, frontendFor, "--ioengine=io_uring", "--direct=1", "--allow_file_create=0", "--numjobs=3",
					"--group_reporting", "--directory="+dir, "--filename_format=plain.$jobnum", fmt.Sprintf("--size=%d", frontendSize))
				return limit / 3, err
			}
			v, err := runFio(ctx, load, "--ioengine=nbd", "--uri="+uris[i-1])
			if err != nil {
				err = fmt.Errorf("%s: %w", systems[i-1].name, err)
			}
			return v, err
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s", load.name)
		for _, v := range m {
			fmt.Fprintf(w, " | %s", load.show(v))
		}
		fmt.Fprintf(w, " | %.2f | %.2f | %.2f |\n", m[4]/m[0], m[4]/m[1], m[5]/m[4])
	}
	fmt.Fprintln(w)
	return nil
}

const benchVolume = volume.ID("vol-bench")

// benchCluster is the controllers of one volume: its record in memory.
type benchCluster struct {
	mu sync.Mutex
	m  replication.Membership
}

func (c *benchCluster) Commit(_ context.Context, _ volume.ID, change replication.Change) (replication.Membership, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m, err := c.m.Apply(change)
	if err == nil {
		c.m = m
	}
	return c.m, err
}

func (c *benchCluster) Membership(context.Context, volume.ID) (replication.Membership, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.m, nil
}

// benchPeers are the replicas: the first is local, the others are reached over TCP.
type benchPeers struct {
	local   *engine.Replica
	client  *replicanet.Client
	address map[volume.NodeID]string
}

func (p *benchPeers) Dial(ctx context.Context, node volume.NodeID, v volume.ID, r volume.ReplicaID,
	receive func(*replication.Message), down func(error)) (engine.Transport, error) {
	if node == "n1" {
		return p.local.Connect(receive, down)
	}
	return p.client.Dial(ctx, replicanet.Target{Node: node, Address: p.address[node], Volume: v, Replica: r}, benchLink{receive, down})
}

type benchLink struct {
	receive func(*replication.Message)
	down    func(error)
}

func (l benchLink) Receive(_ *replicanet.Link, m *replication.Message) { l.receive(m) }
func (l benchLink) Closed(_ *replicanet.Link, err error)               { l.down(err) }

type benchReplica struct{ r *engine.Replica }

func (b benchReplica) Open(_ context.Context, l *replicanet.Link, _ volume.ID, _ volume.ReplicaID) (replicanet.Handler, error) {
	c, err := b.r.Connect(func(m *replication.Message) {
		l.Send(m)
		l.Flush()
	}, func(error) { go l.Close() })
	if err != nil {
		return nil, err
	}
	return benchLink{func(m *replication.Message) { c.Send(m) }, func(error) { c.Close() }}, nil
}

// benchNode is one replica and, but for the first, its server.
func benchNode(ctx context.Context, dir string, i int, ca *pki.CA) (r *engine.Replica, address string, down func() error, err error) {
	id := volume.ReplicaID(fmt.Sprintf("r%d", i))
	pool, err := extentstore.Open(ctx, dir, extentstore.Options{Name: "bench", Capacity: 4 * frontendSize, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, "", nil, err
	}
	down = pool.Close
	if err := pool.CreateReplica(ctx, extentstore.ReplicaSpec{ID: id, Volume: benchVolume, Size: frontendSize}); err != nil {
		return nil, "", down, err
	}
	store, err := pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, "", down, err
	}
	r, err = engine.NewReplica(replication.ReplicaConfig{
		Volume: benchVolume, Replica: id, Incarnation: replication.Incarnation(i), BootID: replication.BootID(i),
		Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming(),
	}, store, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, "", down, err
	}
	down = func() error { return errors.Join(r.Close(), pool.Close()) }
	if i == 1 {
		return r, "", down, nil
	}
	node := volume.NodeID(fmt.Sprintf("n%d", i))
	config := replicanet.ServerConfig{Cluster: "bench", Node: node, Insecure: ca == nil, Acceptor: benchReplica{r}, Log: slog.New(slog.DiscardHandler)}
	if ca != nil {
		c, err := benchIdentity(ca, node)
		if err != nil {
			return nil, "", down, err
		}
		config.Cluster, config.TLS = ca.Cluster(), c.Server(nil)
	}
	server, err := replicanet.NewServer(config)
	if err != nil {
		return nil, "", down, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", down, err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	return r, l.Addr().String(), func() error { return errors.Join(server.Close(), <-served, r.Close(), pool.Close()) }, nil
}

func benchIdentity(ca *pki.CA, id volume.NodeID) (*pki.Credentials, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := key.Request()
	if err != nil {
		return nil, err
	}
	chain, err := ca.Issue(csr, pki.Node(id, pki.RoleStorage), 0, time.Now())
	if err != nil {
		return nil, err
	}
	return pki.NewCredentials(chain, key, nil)
}

// engineUp serves a volume with so many replicas over NBD.
func engineUp(ctx context.Context, dir string, n int, secure bool) (uri string, down func() error, err error) {
	var downs []func() error
	down = func() error {
		var errs []error
		for i := len(downs) - 1; i >= 0; i-- {
			errs = append(errs, downs[i]())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, down())
		}
	}()
	var ca *pki.CA
	config := replicanet.ClientConfig{Cluster: "bench", Node: "n1", Insecure: !secure, Log: slog.New(slog.DiscardHandler)}
	if secure {
		if ca, err = pki.NewCA(pki.NewClusterID(), time.Now()); err != nil {
			return "", nil, err
		}
		me, err := benchIdentity(ca, "n1")
		if err != nil {
			return "", nil, err
		}
		config.Cluster = ca.Cluster()
		config.TLS = func(id volume.NodeID) *tls.Config { return me.Client(pki.IsNode(id)) }
	}
	peers := &benchPeers{address: map[volume.NodeID]string{}}
	if peers.client, err = replicanet.NewClient(config); err != nil {
		return "", nil, err
	}
	downs = append(downs, func() error { peers.client.Close(); return nil })
	var members []replication.Member
	for i := 1; i <= n; i++ {
		node := volume.NodeID(fmt.Sprintf("n%d", i))
		r, address, stop, err := benchNode(ctx, filepath.Join(dir, string(node)), i, ca)
		if stop != nil {
			downs = append(downs, stop)
		}
		if err != nil {
			return "", nil, err
		}
		if i == 1 {
			peers.local = r
		}
		peers.address[node] = address
		members = append(members, replication.Member{ID: volume.ReplicaID(fmt.Sprintf("r%d", i)), Node: node, Pool: "bench"})
	}
	m, err := replication.NewMembership(benchVolume, frontendSize, 1, members)
	if err != nil {
		return "", nil, err
	}
	cluster := &benchCluster{m: m}
	if m, err = cluster.Commit(ctx, benchVolume, replication.Change{Attach: &replication.Attach{Node: "n1"}}); err != nil {
		return "", nil, err
	}
	e, err := engine.Open(engine.Config{
		Node: "n1", Controllers: cluster, Peers: peers, Logger: slog.New(slog.DiscardHandler),
		Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming(),
	}, m)
	if err != nil {
		return "", nil, err
	}
	downs = append(downs, e.Close)
	live, cancelLive := context.WithTimeout(ctx, time.Minute)
	defer cancelLive()
	if err := e.Live(live); err != nil {
		return "", nil, err
	}
	socket := filepath.Join(dir, "nbd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return "", nil, err
	}
	serving, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- nbd.Serve(serving, l, []nbd.Export{{Device: e}}, nbd.Options{}) }()
	downs = append(downs, func() error {
		stop()
		return <-done
	})
	return nbdURI(socket), down, nil
}

// quorumUp serves QEMU's quorum of three nbdkit over NBD.
func quorumUp(ctx context.Context, dir string) (string, func() error, error) {
	var procs []*exec.Cmd
	down := func() error {
		var errs []error
		for i := len(procs) - 1; i >= 0; i-- {
			errs = append(errs, procs[i].Process.Signal(unix.SIGTERM))
			_ = procs[i].Wait() // it ends with the signal's status
		}
		return errors.Join(errs...)
	}
	start := func(ready func() bool, name string, args ...string) error {
		cmd := exec.Command(name, args...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		procs = append(procs, cmd)
		for end := time.Now().Add(10 * time.Second); !ready(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				return fmt.Errorf("%s does not come up", name)
			}
		}
		return nil
	}
	var quorum []string
	args := []string{}
	for i := range 3 {
		path, err := backingFile(ctx, dir, fmt.Sprintf("copy%d", i))
		if err != nil {
			return "", nil, errors.Join(err, down())
		}
		port, err := freePort()
		if err != nil {
			return "", nil, errors.Join(err, down())
		}
		pid := filepath.Join(dir, fmt.Sprintf("copy%d.pid", i))
		if err := start(func() bool { _, err := os.Stat(pid); return err == nil }, "nbdkit", "--foreground", "--ipaddr", "127.0.0.1",
			"--port", fmt.Sprint(port), "--pidfile", pid, "file", path, "cache=none"); err != nil {
			return "", nil, errors.Join(err, down())
		}
		args = append(args, "--blockdev", fmt.Sprintf("driver=nbd,node-name=c%d,server.type=inet,server.host=127.0.0.1,server.port=%d", i, port))
		quorum = append(quorum, fmt.Sprintf("children.%d=c%d", i, i))
	}
	socket := filepath.Join(dir, "nbd.sock")
	args = append(args,
		"--blockdev", "driver=quorum,node-name=q,vote-threshold=2,"+strings.Join(quorum, ","),
		"--nbd-server", "addr.type=unix,addr.path="+socket, "--export", "type=nbd,id=e,node-name=q,name=,writable=on")
	if err := start(func() bool { _, err := os.Stat(socket); return err == nil }, "qemu-storage-daemon", args...); err != nil {
		return "", nil, errors.Join(err, down())
	}
	return nbdURI(socket), down, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
