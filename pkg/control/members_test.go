package control_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestJoinTokens(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	now := volume.Timestamp(w.now.UnixNano())
	key := func(c string) string { return strings.Repeat(c, 64) }
	token := jointoken.Record{ID: strings.Repeat("a", 16), Hash: key("b"), Roles: []string{"storage"}, Uses: 1, CreatedAt: now, ExpiresAt: now + volume.Timestamp(time.Hour)}
	claim := jointoken.Claim{Token: token.ID, Hash: token.Hash, Node: "n9", Key: key("c")}
	redeem := func(c jointoken.Claim, want error) {
		t.Helper()
		r, err := w.RedeemJoinToken(ctx, c)
		if wantErr(t, err, want); err == nil && !slices.Equal(r.Roles, token.Roles) {
			t.Errorf("%+v", r)
		}
	}
	redeem(claim, volume.ErrNotFound)
	wantErr(t, w.CreateJoinToken(ctx, token), nil)
	wantErr(t, w.CreateJoinToken(ctx, token), volume.ErrExists)
	forged, other := claim, claim
	forged.Hash = key("d")
	other.Node = "n8"
	redeem(forged, volume.ErrNotFound)
	redeem(claim, nil)
	redeem(claim, nil) // the answer was lost
	redeem(other, volume.ErrInUse)
	if list, err := w.JoinTokens(ctx); err != nil || len(list) != 1 || len(list[0].Redeemed) != 1 {
		t.Errorf("%+v %v", list, err)
	}
	wantErr(t, w.RevokeJoinToken(ctx, token.ID), nil)
	wantErr(t, w.RevokeJoinToken(ctx, token.ID), nil)
	redeem(claim, volume.ErrNotFound)

	// A node that was removed comes back with a token only.
	w.register("n9")
	wantErr(t, w.RemoveNode(ctx, "n9"), nil)
	wantErr(t, w.RegisterNode(ctx, volume.Node{ID: "n9"}), volume.ErrInUse)
	wantErr(t, w.CreateJoinToken(ctx, token), nil)
	redeem(claim, nil)
	if removed, err := w.RemovedNodes(ctx); err != nil || len(removed) != 0 {
		t.Errorf("%v %v", removed, err)
	}
	w.register("n9")
	wantErr(t, w.RemoveNode(ctx, "n9"), nil)
	redeem(claim, volume.ErrInUse) // the token that it came with
	if g, err := w.Generations(ctx); err != nil || len(g) != 1 || g["n9"] != 2 {
		t.Errorf("%v %v", g, err)
	}
	if removed, err := w.RemovedNodes(ctx); err != nil || len(removed) != 1 {
		t.Errorf("%v %v", removed, err)
	}
	w.now = w.now.Add(2 * time.Hour)
	redeem(claim, volume.ErrStale)
	if list, err := w.JoinTokens(ctx); err != nil || len(list) != 0 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestWhatANodeSaysOfItself(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	n := volume.Node{
		ID: "n1", Zone: "a", Address: "10.0.0.1:7", DataAddress: "10.0.0.1:8", Roles: []volume.NodeRole{volume.RoleStorage}, BootID: 1 << 63,
		State: volume.NodeDrained, Pools: []volume.Pool{pool("p1", "n1", 100*gib)},
	}
	wantErr(t, w.RegisterNode(ctx, n), nil)
	got, err := w.Node(ctx, "n1")
	if err != nil || got.Zone != n.Zone || got.Address != n.Address || got.DataAddress != n.DataAddress || got.BootID != n.BootID || !slices.Equal(got.Roles, n.Roles) || len(got.Pools) != 1 {
		t.Errorf("%+v %v", got, err)
	}
	if got.State != volume.NodeActive {
		t.Error("a node drains itself")
	}
	wantErr(t, w.DrainNode(ctx, "n1"), nil)
	wantErr(t, w.RegisterNode(ctx, n), nil)
	if got, _ := w.Node(ctx, "n1"); got.State != volume.NodeDrained {
		t.Error("a restart ends a drain")
	}
	_, err = w.CreateVolume(ctx, create("v"))
	wantErr(t, err, volume.ErrNoSpace)
	wantErr(t, w.UndrainNode(ctx, "n1"), nil)
	w.mustCreate(create("v"))
}
