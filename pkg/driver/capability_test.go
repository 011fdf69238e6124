package driver

import (
	"errors"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// TestCapabilityModes is the table of access modes, and agrees with what the use cases take.
func TestCapabilityModes(t *testing.T) {
	for number, name := range csi.VolumeCapability_AccessMode_Mode_name {
		mode := csi.VolumeCapability_AccessMode_Mode(number)
		for _, tt := range []struct {
			in   *csi.VolumeCapability
			want bool
		}{
			{blockCap(mode), mode != csi.VolumeCapability_AccessMode_UNKNOWN},
			{mountCap(mode), mode != csi.VolumeCapability_AccessMode_UNKNOWN && mode != csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER &&
				mode != csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
		} {
			got, err := capability(tt.in)
			if (err == nil) != tt.want || err != nil && !errors.Is(err, volume.ErrInvalid) {
				t.Errorf("%v: got %+v, %v", tt.in, got, err)
			}
			if err != nil {
				continue
			}
			if string(got.Mode) != name {
				t.Errorf("%s became %s", name, got.Mode)
			}
			// What a node may be told by a later controller is not all that this one gives out.
			many := got.Mode == volume.MultiNodeMultiWriter || got.Mode == volume.MultiNodeSingleWriter
			if err := control.CheckCapability(got); (err != nil) != many {
				t.Errorf("%v: %v", tt.in, err)
			}
		}
	}
}
