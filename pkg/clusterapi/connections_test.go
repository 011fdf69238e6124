package clusterapi

import (
	"context"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// hanging answers to nobody until the caller is gone.
type hanging struct {
	recorder
	called, over chan struct{}
}

func (h *hanging) Detach(ctx context.Context, _ volume.NodeID, _ volume.ID, _ volume.Epoch) (bool, error) {
	h.called <- struct{}{}
	<-ctx.Done()
	h.over <- struct{}{}
	return false, ctx.Err()
}

// TestConnectionsAreDropped: a connection ends with the calls on it, from either side, whose peer is not to be spoken to any more,
// and the next call is made on another.
func TestConnectionsAreDropped(t *testing.T) {
	h := &hanging{called: make(chan struct{}, 1), over: make(chan struct{}, 1)}
	server, client := new(Connections), new(Connections)
	cc, _ := pairNoted(t, Services{Node: h}, server, client, pki.RoleController)
	agents := NewAgents(dialed{cc})
	named := func(name string) func(pki.Peer) bool { return func(p pki.Peer) bool { return p.Name == name } }
	within := func(t *testing.T, what string, c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: not yet", what)
		}
	}
	for name, drop := range map[string]func(){"the server": func() { server.Drop(named("n2")) }, "the client": func() { client.Drop(named("n1")) }} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				_, err := agents.Detach(ctx, "n1", "v", 1)
				ended <- err
			}()
			within(t, "the call", h.called)
			server.Drop(named("n1"))
			client.Drop(named("n2"))
			if err := agents.Release(t.Context(), "n1", control.SnapshotSpec{}); err != nil { // on the same connection
				t.Error(err)
			}
			if len(h.over) > 0 || len(ended) > 0 {
				t.Error("a call of another ended")
			}
			drop()
			within(t, "the end of the call", h.over)
			if err := <-ended; err == nil {
				t.Error("a call that was cut off is answered")
			}
			for range 100 { // until it has connected again
				if err := agents.Release(t.Context(), "n1", control.SnapshotSpec{}); err == nil {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			t.Error("it does not connect again")
		})
	}
	if err := cc.Close(); err != nil {
		t.Error(err)
	}
	for range 100 {
		client.mu.Lock()
		n := len(client.open)
		client.mu.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("a connection that was closed is noted still")
}
