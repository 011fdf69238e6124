package fuseloop

import "testing"

func TestParseMount(t *testing.T) {
	for line, want := range map[string]mountPoint{
		`36 35 0:52 / /run/a\040b/devices/vol@1 rw,nosuid shared:1 master:2 - fuse.ballast ballast rw,user_id=0`: {"0:52", "/run/a b/devices/vol@1", "fuse.ballast", "ballast"},
		`51 27 7:2 / /mnt rw,relatime - ext4 /dev/loop2 rw`:                                                      {"7:2", "/mnt", "ext4", "/dev/loop2"},
		`51 27 7:2 /sub /mnt\134x rw - btrfs /dev/loop\0413 rw`:                                                  {"7:2", `/mnt\x`, "btrfs", "/dev/loop!3"},
	} {
		if got, ok := parseMount(line); !ok || got != want {
			t.Errorf("parseMount(%q) = %+v, %v; want %+v", line, got, ok, want)
		}
	}
	for _, line := range []string{"", "-", " - ", "36 35 0:52 / /run - ext4", "a b c d e f - g"} {
		if got, ok := parseMount(line); ok {
			t.Errorf("parseMount(%q) = %+v", line, got)
		}
	}
	if got := (mountPoint{number: "0:52"}).minor(); got != 52 {
		t.Errorf("minor of 0:52 is %d", got)
	}
	if got := (mountPoint{number: "odd"}).minor(); got != 0 {
		t.Errorf("minor of nonsense is %d", got)
	}
}

func TestKilledStatus(t *testing.T) {
	for status, want := range map[string]bool{
		"Name:\tx\nState:\tS (sleeping)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n": false,
		"Name:\tx\nState:\tZ (zombie)\n": true,
		"Name:\tx\nState:\tX (dead)\n":   true,
		"State:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n":       true,
		"State:\tD (disk sleep)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n":       true,
		"State:\tD (disk sleep)\nSigPnd:\t0000000000004000\nShdPnd:\t0000000000004000\n":       false, // SIGTERM
		"Name:\tState: Z\nState:\tR (running)\nSigBlk:\tffffffffffffffff\nSigPnd:\tnonsense\n": false,
	} {
		if got := killed(status); got != want {
			t.Errorf("killed(%q) = %v", status, got)
		}
	}
}

func TestRemnantName(t *testing.T) {
	for path, want := range map[string]string{"/run/d/vol-1@7": "vol-1", "/run/d/a@b@12": "a@b", "/run/d/plain": "plain"} {
		if got := (remnant{path: path}).name(); got != want {
			t.Errorf("name of %s is %s, want %s", path, got, want)
		}
	}
}
