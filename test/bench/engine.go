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
	"strconv"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/engine"
	"github.com/ballast-csi/ballast/pkg/extentstore"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/replicanet"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

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

// openBenchReplica makes the i-th replica in a pool of its own.
func openBenchReplica(ctx context.Context, dir string, i int) (r *engine.Replica, down func() error, err error) {
	id := volume.ReplicaID(fmt.Sprintf("r%d", i))
	pool, err := extentstore.Open(ctx, dir, extentstore.Options{Name: "bench", Capacity: 4 * frontendSize, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, pool.Close())
		}
	}()
	if err := pool.CreateReplica(ctx, extentstore.ReplicaSpec{ID: id, Volume: benchVolume, Size: frontendSize}); err != nil {
		return nil, nil, err
	}
	store, err := pool.OpenReplica(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	r, err = engine.NewReplica(replication.ReplicaConfig{
		Volume: benchVolume, Replica: id, Incarnation: replication.Incarnation(i), BootID: replication.BootID(i),
		Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming(),
	}, store, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	return r, func() error { return errors.Join(r.Close(), pool.Close()) }, nil
}

// replicaProcess is what a process of its own does: it serves a replica until its standard input ends. It prints its address.
// args are the pool's directory, the replica's number, the cluster and, with TLS, the file of its credentials.
func replicaProcess(ctx context.Context, args []string) (err error) {
	i, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	r, down, err := openBenchReplica(ctx, args[0], i)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, down()) }()
	config := replicanet.ServerConfig{Cluster: args[2], Node: benchNode(i), Insecure: len(args) == 3, Acceptor: benchReplica{r}, Log: slog.New(slog.DiscardHandler)}
	if !config.Insecure {
		c, err := pki.Load(args[3], nil)
		if err != nil {
			return err
		}
		config.TLS = c.Server(nil)
	}
	server, err := replicanet.NewServer(config)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() { err = errors.Join(err, server.Close(), <-served) }()
	fmt.Println(l.Addr())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func benchNode(i int) volume.NodeID { return volume.NodeID(fmt.Sprintf("n%d", i)) }

// startReplica starts a process that serves the i-th replica, and returns its address.
func startReplica(dir string, i int, cluster string, ca *pki.CA) (address string, pid int, down func() error, err error) {
	args := []string{replicaCommand, dir, strconv.Itoa(i), cluster}
	if ca != nil {
		file := dir + ".pem"
		chain, key, err := benchIdentity(ca, benchNode(i))
		if err != nil {
			return "", 0, nil, err
		}
		if err := pki.Save(file, chain, key); err != nil {
			return "", 0, nil, err
		}
		args = append(args, file)
	}
	if address, pid, down, err = startSelf(args...); err != nil {
		return "", 0, nil, fmt.Errorf("replica %d: %w", i, err)
	}
	return address, pid, down, nil
}

// startSelf starts this program again with other arguments, and returns the address that it prints. It is to end when its
// standard input does.
func startSelf(args ...string) (address string, pid int, down func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", 0, nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", 0, nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", 0, nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", 0, nil, err
	}
	down = func() error { return errors.Join(stdin.Close(), cmd.Wait()) }
	if _, err := fmt.Fscan(stdout, &address); err != nil {
		return "", 0, nil, errors.Join(fmt.Errorf("%s does not start: %w", args[0], err), down())
	}
	return address, cmd.Process.Pid, down, nil
}

func benchIdentity(ca *pki.CA, id volume.NodeID) ([]byte, pki.Key, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, key, err
	}
	csr, err := key.Request()
	if err != nil {
		return nil, key, err
	}
	chain, err := ca.Issue(csr, pki.Node(id, pki.RoleStorage), 0, time.Now())
	return chain, key, err
}

// engineUp serves a volume with so many replicas over NBD.
func engineUp(ctx context.Context, dir string, n int, secure bool) (_ *service, err error) {
	var downs teardown
	pids := []int{os.Getpid()}
	defer func() {
		if err != nil {
			err = errors.Join(err, downs.all())
		}
	}()
	var ca *pki.CA
	config := replicanet.ClientConfig{Cluster: "bench", Node: "n1", Insecure: !secure, Log: slog.New(slog.DiscardHandler)}
	if secure {
		if ca, err = pki.NewCA(pki.NewClusterID(), time.Now()); err != nil {
			return nil, err
		}
		chain, key, err := benchIdentity(ca, "n1")
		if err != nil {
			return nil, err
		}
		me, err := pki.NewCredentials(chain, key, nil)
		if err != nil {
			return nil, err
		}
		config.Cluster = ca.Cluster()
		config.TLS = func(id volume.NodeID) *tls.Config { return me.Client(pki.IsNode(id)) }
	}
	peers := &benchPeers{address: map[volume.NodeID]string{}}
	if peers.client, err = replicanet.NewClient(config); err != nil {
		return nil, err
	}
	downs = append(downs, func() error { peers.client.Close(); return nil })
	var members []replication.Member
	for i := 1; i <= n; i++ {
		node, at := benchNode(i), filepath.Join(dir, string(benchNode(i)))
		var stop func() error
		if i == 1 {
			peers.local, stop, err = openBenchReplica(ctx, at, i)
		} else {
			var pid int
			peers.address[node], pid, stop, err = startReplica(at, i, config.Cluster, ca)
			pids = append(pids, pid)
		}
		if err != nil {
			return nil, err
		}
		downs = append(downs, stop)
		members = append(members, replication.Member{ID: volume.ReplicaID(fmt.Sprintf("r%d", i)), Node: node, Pool: "bench"})
	}
	m, err := replication.NewMembership(benchVolume, frontendSize, 1, members)
	if err != nil {
		return nil, err
	}
	cluster := &benchCluster{m: m}
	if m, err = cluster.Commit(ctx, benchVolume, replication.Change{Attach: &replication.Attach{Node: "n1"}}); err != nil {
		return nil, err
	}
	e, err := engine.Open(engine.Config{
		Node: "n1", Controllers: cluster, Peers: peers, Logger: slog.New(slog.DiscardHandler),
		Geometry: replication.DefaultGeometry(), Timing: replication.DefaultTiming(),
	}, m)
	if err != nil {
		return nil, err
	}
	downs = append(downs, e.Close)
	live, cancelLive := context.WithTimeout(ctx, time.Minute)
	defer cancelLive()
	if err := e.Live(live); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "nbd.sock")
	stop, err := serveNBD(ctx, socket, e)
	if err != nil {
		return nil, err
	}
	downs = append(downs, stop)
	return &service{nbdURI(socket), pids, downs.all}, nil
}
