package replicanet

import (
	"context"
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/replication"
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
	lab, err := netlab.New(100+os.Getpid()%100, 2) // several runs of this test may share a machine
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	server, client := lab.Nodes()[0], lab.Nodes()[1]
	var listener net.Listener
	err = inNamespace(server.Namespace, func() (err error) {
		listener, err = net.Listen("tcp", server.Addr.String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	rep := newReplica(t)
	s, err := NewServer(ServerConfig{Cluster: "test", Node: "server", Insecure: true, Acceptor: rep, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(listener) }()
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	for _, tt := range []struct {
		name     string
		from, to int
		busy     bool
	}{
		{"requests vanish", 1, 0, true},
		{"answers vanish", 0, 1, true},
		{"idle", 1, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := newEngine()
			c := dial(t, false)
			c.dial = func(ctx context.Context, address string) (nc net.Conn, err error) {
				err = inNamespace(client.Namespace, func() error {
					nc, err = new(net.Dialer).DialContext(ctx, "tcp", address)
					return err
				})
				return nc, err
			}
			l := open(t, c, target(listener.Addr().String(), 1), e)
			defer l.Close()
			l.Send(&replication.Message{Kind: replication.KindPing, Seq: 1})
			l.Flush()
			within(t, "answer", e.answers)
			if err := lab.Cut(tt.from, tt.to); err != nil {
				t.Fatal(err)
			}
			defer lab.HealAll()
			if tt.busy {
				l.Send(&replication.Message{Kind: replication.KindPing, Seq: 2})
				l.Flush()
			}
			within(t, "end at the engine", e.closed)
			within(t, "end at the replica", rep.closed)
		})
	}
}
