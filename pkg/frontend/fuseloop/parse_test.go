package fuseloop

import "testing"

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
