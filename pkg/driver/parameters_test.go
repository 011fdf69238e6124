package driver

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestParseParameters(t *testing.T) {
	for name, tt := range map[string]struct {
		parameters, mutable map[string]string
		want                classParameters
		bad                 string // what the error names
	}{
		"none": {want: classParameters{implied: true}},
		"all": {
			parameters: map[string]string{"replicas": "3", "minInSync": "2", "dataLocality": "required", "pool": "nvme", "tenant": "a",
				"fsType": "xfs", "blockSize": "512"},
			mutable: map[string]string{"iopsLimit": "1000", "bandwidthLimit": "100Mi"},
			want: classParameters{tenant: "a", qos: volume.QoS{IOPS: 1000, Bandwidth: 100 << 20}, Parameters: volume.Parameters{
				Replicas: 3, MinInSync: 2, DataLocality: volume.LocalityRequired, Pool: "nvme", FSType: "xfs", BlockSize: 512}},
		},
		"mutable takes precedence": {
			parameters: map[string]string{"replicas": "1", "minInSync": "1", "dataLocality": "none"},
			mutable:    map[string]string{"replicas": "2", "minInSync": "2", "dataLocality": "preferred"},
			want:       classParameters{implied: true, Parameters: volume.Parameters{Replicas: 2, MinInSync: 2, DataLocality: volume.LocalityPreferred}},
		},
		"namespace": {parameters: map[string]string{"csi.storage.k8s.io/pvc/namespace": "n"}, want: classParameters{tenant: "n", implied: true}},
		"fstype of Kubernetes": {parameters: map[string]string{"csi.storage.k8s.io/fstype": "btrfs", "fsType": "btrfs"},
			want: classParameters{implied: true, Parameters: volume.Parameters{FSType: "btrfs"}}},
		"one fstype is empty": {parameters: map[string]string{"csi.storage.k8s.io/fstype": "xfs", "fsType": ""},
			want: classParameters{implied: true, Parameters: volume.Parameters{FSType: "xfs"}}},
		"fstypes contradict":     {parameters: map[string]string{"csi.storage.k8s.io/fstype": "xfs", "fsType": "ext4"}, bad: "fsType"},
		"unknown":                {parameters: map[string]string{"replicas": "1", "Replicas": "1"}, bad: `"Replicas"`},
		"unknown of Kubernetes":  {parameters: map[string]string{"csi.storage.k8s.io/color": "red"}, bad: "color"},
		"unknown mutable":        {mutable: map[string]string{"pool": "x"}, bad: `"pool"`},
		"replicas 0":             {parameters: map[string]string{"replicas": "0"}, bad: "replicas"},
		"replicas text":          {parameters: map[string]string{"replicas": "one"}, bad: "replicas"},
		"replicas empty":         {parameters: map[string]string{"replicas": ""}, bad: "replicas"},
		"minInSync 6":            {parameters: map[string]string{"minInSync": "6"}, bad: "minInSync"},
		"locality":               {parameters: map[string]string{"dataLocality": "Preferred"}, bad: "dataLocality"},
		"filesystem":             {parameters: map[string]string{"fsType": "EXT4"}, bad: "fsType"},
		"blockSize":              {parameters: map[string]string{"blockSize": "0512"}, bad: "blockSize"},
		"iops":                   {mutable: map[string]string{"iopsLimit": "-5"}, bad: "iopsLimit"},
		"a long value is quoted": {parameters: map[string]string{strings.Repeat("k", 500): ""}, bad: "kkk"},
	} {
		got, err := parseParameters(tt.parameters, tt.mutable)
		if tt.bad != "" {
			if !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), tt.bad) || len(err.Error()) > 300 {
				t.Errorf("%s: got %v, want ErrInvalid that names %s", name, err, tt.bad)
			}
			continue
		}
		if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(classParameters{})); d != "" || err != nil {
			t.Errorf("%s: %v, want -, got +\n%s", name, err, d)
		}
	}
}

func TestParseQuantity(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "5000": 5000, "10k": 10000, "1.5k": 1500, "100Mi": 100 << 20, "1.5Gi": 3 << 29, "2G": 2e9, "0.5Ki": 512,
		"9223372036854775807": math.MaxInt64, "7Ei": 7 << 60, "3T": 3e12, "007": 7, "1.": 1, ".5k": 500,
	} {
		if got, err := parseQuantity(s); got != want || err != nil {
			t.Errorf("%q: got %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "-1", "+1", " 1", "1 ", "k", "Mi", ".", "1.5", "1..5k", "0.3Ki", "10K", "10mi", "10ki", "1e3", "1m", "8Ei",
		"9223372036854775808", "1/2", "0x10", "1_000", "100MiB", strings.Repeat("9", 40), "∞"} {
		if got, err := parseQuantity(s); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%q: got %d, %v, want ErrInvalid", s, got, err)
		}
	}
}

func TestParseSnapshotParameters(t *testing.T) {
	for value, want := range map[string]bool{"true": true, "false": false} {
		got, err := parseSnapshotParameters(map[string]string{"freezeFilesystem": value, "csi.storage.k8s.io/volumesnapshot/name": "n",
			"csi.storage.k8s.io/volumesnapshotcontent/name": "c", "csi.storage.k8s.io/volumesnapshot/namespace": "s"})
		if got != want || err != nil {
			t.Errorf("%s: got %v, %v", value, got, err)
		}
	}
	for _, bad := range []map[string]string{{"freezeFilesystem": ""}, {"freezeFilesystem": "True"}, {"freeze": "true"}} {
		if _, err := parseSnapshotParameters(bad); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%v: got %v", bad, err)
		}
	}
}
