package volume

import (
	"errors"
	"strings"
	"testing"
)

// The rule is the CSI specification's for CreateVolumeRequest.name and CreateSnapshotRequest.name.
func TestCheckName(t *testing.T) {
	for _, good := range []string{"a", " ", "a\tb\nc\rd", "pvc-1/ä 漢字", "\ufffd", "\u00a0", strings.Repeat("x", MaxNameLen)} {
		if err := CheckName("name", good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	bad := []string{"", strings.Repeat("x", MaxNameLen+1), "a\xff"}
	for r := rune(0); r <= 0x9f; r++ {
		if r <= 0x08 || r == 0x0b || r == 0x0c || r >= 0x0e && r <= 0x1f || r >= 0x7f {
			bad = append(bad, "a"+string(r))
		}
	}
	for _, name := range bad {
		if err := CheckName("name", name); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
