package admin_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/volume"
	"github.com/ballast-csi/ballast/test/admintest"
)

func dial(t *testing.T, c *admintest.Cluster) adminpb.AdminClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+admintest.Serve(t, c), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return adminpb.NewAdminClient(conn)
}

func TestReferences(t *testing.T) {
	c := admintest.Sample()
	// A name that looks like another volume's id, and a name that a volume which is being deleted still carries.
	c.Vols = append(c.Vols,
		volume.Volume{ID: "vol-00000000000000000004", Name: "vol-00000000000000000001", State: volume.Ready},
		volume.Volume{ID: "vol-00000000000000000005", Name: "scratch", State: volume.Ready})
	c.NodeList[1].Pools = []volume.Pool{{ID: "pool-3", Name: "default", Node: "node-2"}}
	a := dial(t, c)
	for _, r := range []struct{ ref, id string }{
		{"orders", "vol-00000000000000000001"},
		{"vol-00000000000000000001", "vol-00000000000000000001"},
		{"scratch", "vol-00000000000000000005"},
		{"vol-00000000000000000003", "vol-00000000000000000003"},
	} {
		v, err := a.GetVolume(t.Context(), &adminpb.GetRequest{Ref: r.ref})
		if err != nil || v.Id != r.id {
			t.Errorf("%s: %v %v", r.ref, v.GetId(), err)
		}
	}
	for _, r := range []struct {
		ref, id string
		code    codes.Code
	}{
		{"fast", "pool-2", codes.OK}, {"pool-3", "pool-3", codes.OK}, {"node-2/default", "pool-3", codes.OK}, {"default", "", codes.InvalidArgument}, {"x", "", codes.NotFound},
	} {
		p, err := a.GetPool(t.Context(), &adminpb.GetRequest{Ref: r.ref})
		if status.Code(err) != r.code || p.GetId() != r.id {
			t.Errorf("%s: %v %v", r.ref, p.GetId(), err)
		}
	}
}

func TestRequestsAreBounded(t *testing.T) {
	a := dial(t, admintest.Sample())
	long := strings.Repeat("x", 1000)
	ctx := t.Context()
	calls := map[string]func() error{
		"volume": func() error { _, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: long}); return err },
		"empty volume": func() error {
			_, err := a.GetVolume(ctx, &adminpb.GetRequest{})
			return err
		},
		"control character": func() error { _, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: "a\x00b"}); return err },
		"snapshot":          func() error { _, err := a.GetSnapshot(ctx, &adminpb.GetRequest{Ref: long}); return err },
		"pool":              func() error { _, err := a.GetPool(ctx, &adminpb.GetRequest{Ref: long}); return err },
		"node":              func() error { _, err := a.GetNode(ctx, &adminpb.GetRequest{Ref: long}); return err },
		"tenant":            func() error { _, err := a.SetQuota(ctx, &adminpb.SetQuotaRequest{Tenant: long}); return err },
		"page":              func() error { _, err := a.ListVolumes(ctx, &adminpb.ListVolumesRequest{Max: -1}); return err },
		"kind":              func() error { _, err := a.Why(ctx, &adminpb.WhyRequest{Kind: 99, Ref: "x"}); return err },
		"access": func() error {
			_, err := a.CreateVolume(ctx, &adminpb.CreateVolumeRequest{Name: "x", Access: "psychic"})
			return err
		},
		"audit": func() error {
			s, err := a.Audit(ctx, &adminpb.AuditRequest{Last: 1 << 30})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
	}
	for name, call := range calls {
		if err := call(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := a.GetVolume(ctx, &adminpb.GetRequest{Ref: strings.Repeat("x", 1<<20)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request of 1 MiB: %v", err)
	}
}

func TestChangesAreRecordedWithTheirCaller(t *testing.T) {
	a := dial(t, admintest.Sample())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	follow, err := a.Audit(ctx, &adminpb.AuditRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.DeleteVolume(ctx, &adminpb.DeleteRequest{Ref: "orders"}); status.Code(err) != codes.FailedPrecondition {
		t.Fatal(err)
	}
	if _, err := a.SetQuota(ctx, &adminpb.SetQuotaRequest{Tenant: "lab"}); err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("admin uid=%d pid=%d", os.Geteuid(), os.Getpid())
	last, err := a.Audit(ctx, &adminpb.AuditRequest{Last: 2})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"volume.delete", "quota.set"} {
		e, err := last.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.What != want || e.Who != me || (e.Outcome == "ok") != (want == "quota.set") {
			t.Errorf("%v", e)
		}
	}
	// The stream may have been opened before or after the first of them.
	if e, err := follow.Recv(); err != nil || e.Who != me {
		t.Errorf("%v %v", e, err)
	}
}

func TestDetachNamesTheNode(t *testing.T) {
	a := dial(t, admintest.Sample())
	_, err := a.DetachVolume(t.Context(), &adminpb.DetachVolumeRequest{Ref: "orders", Node: "node-2"})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "attached to node node-1, not to node-2") {
		t.Error(err)
	}
	v, err := a.DetachVolume(t.Context(), &adminpb.DetachVolumeRequest{Ref: "orders", Node: "node-1"})
	if err != nil || v.Attachment != nil {
		t.Errorf("%v %v", v, err)
	}
}

// A removal that not all nodes have heard of is asked for again, by the name that is gone.
func TestANodeIsRemovedAgain(t *testing.T) {
	c := admintest.Sample()
	c.NodeList = append(c.NodeList, volume.Node{ID: "node-9"})
	a := dial(t, c)
	for range 2 {
		if _, err := a.RemoveNode(t.Context(), &adminpb.DeleteRequest{Ref: "node-9"}); err != nil {
			t.Error(err)
		}
	}
	if _, err := a.RemoveNode(t.Context(), &adminpb.DeleteRequest{Ref: "node-8"}); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
}
