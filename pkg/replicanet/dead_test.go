package replicanet

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
	"github.com/ballast-csi/ballast/test/netlab"
)

// inNamespace runs f on a thread that is in a network namespace; sockets made there stay there. The thread is not
// used again.
func inNamespace(name string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		ns, err := os.Open("/var/run/netns/" + name)
		if err == nil {
			defer ns.Close()
			if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err == nil {
				err = f()
			}
		}
		done <- err
	}()
	return <-done
}

// TestDeadPeer: where packets vanish in one direction, both sides find out by themselves, under way or idle.
func TestDeadPeer(t *testing.T) {
	tests := []struct {
		name string
		// requests says that those vanish, else answers do; busy that one is under way.
		requests, busy bool
	}{
		{"requests vanish", true, true},
		{"answers vanish", false, true},
		{"idle", true, false},
	}
	lab, err := netlab.New(100+os.Getpid()%100, 1+len(tests)) // several runs of this test may share a machine
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	server := lab.Nodes()[0]
	var listener net.Listener
	err = inNamespace(server.Namespace, func() (err error) {
		listener, err = net.Listen("tcp", server.Addr.String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	replicas := map[volume.ID]*replica{}
	for i := range tests {
		replicas[target("", i).Volume] = newReplica(t)
	}
	accept := acceptor(func(_ context.Context, _ *Link, v volume.ID, _ volume.ReplicaID) (Handler, error) {
		return replicas[v], nil
	})
	s, err := NewServer(ServerConfig{Cluster: "test", Node: "server", Insecure: true, Acceptor: accept, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(listener) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine()
			c := dial(t, false)
			c.dial = func(ctx context.Context, address string) (nc net.Conn, err error) {
				err = inNamespace(lab.Nodes()[1+i].Namespace, func() error {
					nc, err = new(net.Dialer).DialContext(ctx, "tcp", address)
					return err
				})
				return nc, err
			}
			rep := target(listener.Addr().String(), i)
			l := open(t, c, rep, e)
			defer l.Close()
			l.Send(&replication.Message{Kind: replication.KindPing, Seq: 1})
			l.Flush()
			within(t, "answer", e.answers)
			from, to := 0, 1+i
			if tt.requests {
				from, to = to, from
			}
			if err := lab.Cut(from, to); err != nil {
				t.Fatal(err)
			}
			if tt.busy {
				l.Send(&replication.Message{Kind: replication.KindPing, Seq: 2})
				l.Flush()
			}
			within(t, "end at the engine", e.closed)
			within(t, "end at the replica", replicas[rep.Volume].closed)
		})
	}
}
