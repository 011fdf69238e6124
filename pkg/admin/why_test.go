package admin

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var update = flag.Bool("update", false, "write the golden file anew")

// What is said of each state of a pool, a node, a snapshot, a group and a tenant, word by word. Volumes are control's.
func TestWhy(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	pool := volume.Pool{ID: "pool-1", Name: "p", Node: "n", Capacity: 100 << 20, OverProvision: 2}
	with := func(fn func(*volume.Pool)) volume.Pool {
		p := pool
		fn(&p)
		return p
	}
	full, offline := with(func(p *volume.Pool) { p.Used = p.Capacity }), with(func(p *volume.Pool) { p.Capacity = 0 })
	stopped := with(func(p *volume.Pool) { p.Failed = true })
	node := func(state volume.NodeState, pools ...volume.Pool) volume.Node {
		return volume.Node{ID: "n", LastSeen: volume.Timestamp(now.UnixNano()), State: state, Pools: pools}
	}
	up := node(volume.NodeActive, pool)
	second := with(func(p *volume.Pool) { p.Name = "q" })
	group := func(s volume.State) control.Group {
		return control.Group{Group: volume.Group{Name: "g", State: s, Volumes: []volume.ID{"v", "w"}}}
	}
	quota := func(limit, used volume.Amounts) volume.Quota {
		return volume.Quota{Tenant: "t", Limit: limit, Used: used}
	}
	var got strings.Builder
	for _, c := range []struct{ name, text string }{
		{"pool, usable", whyPool(pool, up, now)},
		{"pool, nearly full", whyPool(with(func(p *volume.Pool) { p.Used = p.Capacity * 95 / 100 }), up, now)},
		{"pool, full", whyPool(full, up, now)},
		{"pool, all provisioned", whyPool(with(func(p *volume.Pool) { p.Provisioned = 2 * p.Capacity }), up, now)},
		{"pool, its disk away", whyPool(offline, up, now)},
		{"pool, stopped", whyPool(stopped, up, now)},
		{"pool, its node silent", whyPool(pool, up, now.Add(time.Hour))},
		{"node, usable", whyNode(up, now)},
		{"node, two pools", whyNode(node(volume.NodeActive, pool, second), now)},
		{"node, no pool", whyNode(node(volume.NodeActive), now)},
		{"node, a disk away", whyNode(node(volume.NodeActive, second, offline), now)},
		{"node, a pool stopped", whyNode(node(volume.NodeActive, second, stopped), now)},
		{"node, pools full", whyNode(node(volume.NodeActive, full, full), now)},
		{"node, drained", whyNode(node(volume.NodeDrained, pool), now)},
		{"node, being emptied", whyNode(node(volume.NodeEmptying, pool), now)},
		{"node, silent", whyNode(up, now.Add(3*time.Minute))},
		{"node, drained and silent", whyNode(node(volume.NodeDrained, pool), now.Add(time.Hour))},
		{"node, being emptied and silent", whyNode(node(volume.NodeEmptying, pool), now.Add(time.Hour))},
		{"group, being cut", whyGroup(group(volume.Creating))},
		{"group, being deleted", whyGroup(group(volume.Deleting))},
		{"group, ready", whyGroup(group(volume.Ready))},
		{"tenant, no limits", whyQuota(quota(volume.Amounts{}, volume.Amounts{}))},
		{"tenant, within", whyQuota(quota(volume.Amounts{Volumes: 2, LogicalBytes: 1 << 40}, volume.Amounts{Volumes: 1, LogicalBytes: 1 << 30}))},
		{"tenant, at a limit", whyQuota(quota(volume.Amounts{Snapshots: 2, Volumes: 9}, volume.Amounts{Snapshots: 2}))},
	} {
		fmt.Fprintf(&got, "# %s\n%s\n\n", c.name, c.text)
	}
	const path = "testdata/why.golden"
	if *update {
		if err := os.WriteFile(path, []byte(got.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("want -, got +\n%s", diff)
	}
}
