package quota

import (
	"errors"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestReserve(t *testing.T) {
	type a = volume.Amounts
	for _, c := range []struct {
		name             string
		limit, used, ask a
		says             string // "" is allowed
	}{
		{"no limit", a{}, a{LogicalBytes: 1 << 60}, a{LogicalBytes: 1 << 60, Volumes: 1}, ""},
		{"exactly", a{LogicalBytes: 10}, a{LogicalBytes: 4}, a{LogicalBytes: 6}, ""},
		{"one byte over", a{LogicalBytes: 10}, a{LogicalBytes: 4}, a{LogicalBytes: 7}, "quota of logical bytes is 10, 4 are in use and 7 are asked for"},
		{"volumes", a{Volumes: 2}, a{Volumes: 2}, a{Volumes: 1}, "quota of volumes is 2, 2 are in use and 1"},
		{"snapshots", a{Snapshots: 2}, a{Snapshots: 2}, a{Snapshots: 1}, "quota of snapshots"},
		{"another limit is used up", a{Volumes: 2}, a{Volumes: 2}, a{Snapshots: 1}, ""},
		{"physical below", a{PhysicalBytes: 10}, a{PhysicalBytes: 9}, a{LogicalBytes: 100}, ""},
		{"physical reached", a{PhysicalBytes: 10}, a{PhysicalBytes: 10}, a{Snapshots: 1}, "quota of physical bytes is 10, 10 are in use"},
		{"limit lowered below use", a{LogicalBytes: 5}, a{LogicalBytes: math.MaxInt64}, a{LogicalBytes: 1}, "quota of logical bytes"},
		{"overflow", a{LogicalBytes: math.MaxInt64}, a{LogicalBytes: math.MaxInt64 - 1}, a{LogicalBytes: math.MaxInt64}, "quota of logical bytes"},
	} {
		got, err := Reserve("t", c.limit, c.used, c.ask)
		switch {
		case c.says == "" && (err != nil || got != Add(c.used, c.ask)):
			t.Errorf("%s: %+v %v", c.name, got, err)
		case c.says != "" && (!errors.Is(err, volume.ErrQuota) || !strings.Contains(err.Error(), c.says) || got != c.used):
			t.Errorf("%s: %+v %v", c.name, got, err)
		}
	}
	if _, err := Reserve("t", a{}, a{}, a{Volumes: -1}); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("a negative ask: %v", err)
	}
}

func TestArithmeticStaysInBounds(t *testing.T) {
	draw := func(t *rapid.T, name string) volume.Amounts {
		n := func() int64 { return rapid.Int64().Draw(t, name) }
		return volume.Amounts{LogicalBytes: n(), PhysicalBytes: n(), Volumes: n(), Snapshots: n()}
	}
	rapid.Check(t, func(t *rapid.T) {
		used := Add(volume.Amounts{}, draw(t, "used"))
		x := draw(t, "x")
		for _, got := range []volume.Amounts{Add(used, x), Release(used, x)} {
			if min(got.LogicalBytes, got.PhysicalBytes, got.Volumes, got.Snapshots) < 0 {
				t.Fatalf("%+v and %+v became %+v", used, x, got)
			}
		}
		pos := Add(volume.Amounts{}, x)
		if sum := Add(used, pos); sum.LogicalBytes < math.MaxInt64 && Release(sum, pos).LogicalBytes != used.LogicalBytes {
			t.Fatalf("%+v plus and minus %+v is not the same", used, pos)
		}
	})
}
