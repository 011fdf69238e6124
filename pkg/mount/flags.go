package mount

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// reserved options change what is mounted where; they are Ballast's alone.
var reserved = []string{"bind", "rbind", "move", "remount", "loop", "offset", "sizelimit", "helper", "norecovery", "noload",
	"private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"}

// vfs options belong to a mount, not to the superblock: they alone may differ between two mounts of one filesystem.
var vfs = []string{"ro", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "nodiratime", "diratime",
	"relatime", "norelatime", "strictatime", "nostrictatime"}

// Flags are mount options from outside, checked and split.
type Flags struct {
	// Options without ro and rw, quotes kept: context="system_u:object_r:x_t:s0:c1,c2" is one.
	Options []string
	// ReadOnly is whether ro was among them, and no rw after it.
	ReadOnly bool
}

// ParseFlags splits options at the commas that are not in double quotes. It returns volume.ErrInvalid for an open quote,
// a control character, or an option that would change what is mounted where. No value is put into the error: options
// may be secret.
func ParseFlags(flags []string) (Flags, error) {
	var f Flags
	for i, flag := range flags {
		if strings.ContainsFunc(flag, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
			return Flags{}, fmt.Errorf("mount flag %d has a control character: %w", i, volume.ErrInvalid)
		}
		if strings.Count(flag, `"`)%2 != 0 {
			return Flags{}, fmt.Errorf("mount flag %d has an open quote: %w", i, volume.ErrInvalid)
		}
		quoted := false
		for _, o := range strings.FieldsFunc(flag, func(r rune) bool {
			if r == '"' {
				quoted = !quoted
			}
			return r == ',' && !quoted
		}) {
			name, _, _ := strings.Cut(o, "=")
			lower := strings.ToLower(name)
			switch {
			case o == "ro":
				f.ReadOnly = true
			case o == "rw":
				f.ReadOnly = false
			case slices.Contains(reserved, lower) || strings.HasPrefix(lower, "x-"):
				return Flags{}, fmt.Errorf("mount flag %q is not allowed: it would change what is mounted where: %w", name, volume.ErrInvalid)
			default:
				f.Options = append(f.Options, o)
			}
		}
	}
	return f, nil
}

// bindOptions are those of a bind mount: the mount's own, without the superblock's.
func (f Flags) bindOptions() []string {
	out := []string{}
	for _, o := range f.Options {
		if slices.Contains(vfs, o) {
			out = append(out, o)
		}
	}
	if f.ReadOnly {
		out = append(out, "ro")
	}
	return out
}
