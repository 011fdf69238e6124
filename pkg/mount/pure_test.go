package mount

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestParseFlags(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []string
		want Flags
		bind []string
		err  error
	}{
		{name: "none", bind: []string{}},
		{name: "split", in: []string{"noatime,discard", "nodev"}, want: Flags{Options: []string{"noatime", "discard", "nodev"}}, bind: []string{"noatime", "nodev"}},
		{
			name: "quoted commas", in: []string{`noatime,context="system_u:object_r:x_t:s0:c1,c2",nosuid`},
			want: Flags{Options: []string{"noatime", `context="system_u:object_r:x_t:s0:c1,c2"`, "nosuid"}}, bind: []string{"noatime", "nosuid"},
		},
		{name: "read-only", in: []string{"ro"}, want: Flags{ReadOnly: true}, bind: []string{"ro"}},
		{name: "the last one counts", in: []string{"ro", "rw"}, bind: []string{}},
		{name: "ro within quotes is a value", in: []string{`context="a,ro,b"`}, want: Flags{Options: []string{`context="a,ro,b"`}}, bind: []string{}},
		{name: "open quote", in: []string{`context="a`}, err: volume.ErrInvalid},
		{name: "bind", in: []string{"noatime,bind"}, err: volume.ErrInvalid},
		{name: "remount", in: []string{"remount"}, err: volume.ErrInvalid},
		{name: "userspace option", in: []string{"X-mount.mkdir=0777"}, err: volume.ErrInvalid},
		{name: "loop", in: []string{"loop=/dev/loop9"}, err: volume.ErrInvalid},
		{name: "control", in: []string{"no\natime"}, err: volume.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseFlags(c.in)
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			if d := cmp.Diff(c.bind, got.bindOptions()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestDecide(t *testing.T) {
	const size = 1 << 30
	blank, foreign := Found{Blank: true, DeviceSize: size}, Found{DeviceSize: size}
	found := func(t string) Found { return Found{Type: t, DeviceSize: size} }
	formatting := volume.Filesystem{Phase: volume.Formatting, Type: "ext4"}
	formatted := volume.Filesystem{Phase: volume.Formatted, Type: "ext4"}
	for _, c := range []struct {
		name     string
		rec      volume.Filesystem
		want     string
		found    Found
		readOnly bool
		plan     Plan
		err      error
	}{
		{name: "new", want: "xfs", found: blank, plan: Plan{Type: "xfs", Format: true}},
		{name: "new, any", found: blank, plan: Plan{Type: "ext4", Format: true}},
		{name: "new, unknown type", want: "ntfs", found: blank, err: volume.ErrInvalid},
		{name: "new, read-only", found: blank, readOnly: true, err: volume.ErrInUse},
		{name: "new, too small", want: "xfs", found: Found{Blank: true, DeviceSize: 64 << 20}, err: volume.ErrInUse},
		{name: "never formatted, but data", found: foreign, err: volume.ErrInUse},
		{name: "never formatted, but that filesystem", want: "xfs", found: found("xfs"), plan: Plan{Type: "xfs"}},
		{name: "never formatted, any filesystem", found: found("xfs"), plan: Plan{Type: "xfs"}},
		{name: "never formatted, but another filesystem", want: "xfs", found: found("ext4"), err: volume.ErrInUse},
		{name: "never formatted, but partitions", found: found("unknown data, probably partitions"), err: volume.ErrInUse},
		{name: "never formatted, but a damaged superblock", found: found("damaged ext4"), err: volume.ErrInUse},
		{name: "cut off before mkfs", rec: formatting, found: blank, plan: Plan{Type: "ext4", Format: true}},
		{name: "cut off in mkfs", rec: formatting, found: foreign, plan: Plan{Type: "ext4", Format: true}},
		{name: "cut off in mkfs, superblock there", rec: formatting, found: found("ext4"), plan: Plan{Type: "ext4", Format: true}},
		{name: "cut off in mkfs, another filesystem", rec: formatting, want: "ext4", found: found("btrfs"), err: volume.ErrInUse},
		{name: "cut off in mkfs, now another type", rec: formatting, want: "xfs", found: found("ext4"), plan: Plan{Type: "xfs", Format: true}},
		{name: "formatted", rec: formatted, found: found("ext4"), plan: Plan{Type: "ext4"}},
		{name: "formatted, another asked", rec: formatted, want: "xfs", found: found("ext4"), err: volume.ErrInUse},
		{name: "formatted, nothing there", rec: formatted, found: foreign, err: volume.ErrDataLoss},
		{name: "formatted, zeros there", rec: formatted, found: blank, err: volume.ErrDataLoss},
		{name: "formatted, damaged", rec: formatted, found: found("damaged ext4"), err: volume.ErrDataLoss},
		{name: "formatted, another there", rec: formatted, found: found("xfs"), err: volume.ErrInUse},
		{name: "formatted anew by its user", rec: formatted, want: "xfs", found: found("xfs"), plan: Plan{Type: "xfs"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, err := Decide(c.rec, c.want, c.found, c.readOnly)
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if plan != c.plan {
				t.Errorf("plan %+v, want %+v", plan, c.plan)
			}
		})
	}
}
