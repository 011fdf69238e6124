// Package deploy has the manifests, and tests that they say what the code does.
package deploy

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// object is what is looked at of a manifest.
type object struct {
	file string
	all  map[string]any

	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string            `json:"name"`
		Namespace string            `json:"namespace"`
		Labels    map[string]string `json:"labels"`
	} `json:"metadata"`
	Provisioner string            `json:"provisioner"`
	Driver      string            `json:"driver"`
	DriverName  string            `json:"driverName"`
	Parameters  map[string]string `json:"parameters"`
}

// manifests are the objects of a directory. Duplicate keys are refused, and so is what is no object.
func manifests(t *testing.T, dir string) []object {
	t.Helper()
	var out []object
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yaml" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, doc := range bytes.Split(b, []byte("\n---\n")) {
			o := object{file: path}
			if err := yaml.UnmarshalStrict(doc, &o.all); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			if err := yaml.Unmarshal(doc, &o); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			if o.APIVersion == "" || o.Kind == "" {
				t.Errorf("%s: a document has no apiVersion or kind", path)
			}
			out = append(out, o)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// known are the API versions of the kinds that are used.
var known = map[string]string{
	"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1", "Namespace": "v1", "ServiceAccount": "v1", "Pod": "v1", "PersistentVolumeClaim": "v1",
	"CSIDriver": "storage.k8s.io/v1", "StorageClass": "storage.k8s.io/v1", "VolumeAttributesClass": "storage.k8s.io/v1",
	"ClusterRole": "rbac.authorization.k8s.io/v1", "ClusterRoleBinding": "rbac.authorization.k8s.io/v1",
	"Role": "rbac.authorization.k8s.io/v1", "RoleBinding": "rbac.authorization.k8s.io/v1", "StatefulSet": "apps/v1", "DaemonSet": "apps/v1",
	"VolumeSnapshotClass": "snapshot.storage.k8s.io/v1", "VolumeSnapshot": "snapshot.storage.k8s.io/v1",
}

func TestManifestsNameThingsThatExist(t *testing.T) {
	parameters := map[string][]string{
		"StorageClass":          {"replicas", "minInSync", "dataLocality", "pool", "tenant", "fsType", "blockSize"},
		"VolumeAttributesClass": {"iopsLimit", "bandwidthLimit", "replicas", "minInSync", "dataLocality"},
		"VolumeSnapshotClass":   {"freezeFilesystem"},
	}
	for _, o := range manifests(t, "kubernetes") {
		if known[o.Kind] != o.APIVersion {
			t.Errorf("%s: %s of %s", o.file, o.Kind, o.APIVersion)
		}
		for _, name := range []string{o.Provisioner, o.Driver, o.DriverName} {
			if name != "" && name != volume.DriverName {
				t.Errorf("%s: driver %s", o.file, name)
			}
		}
		for p := range o.Parameters {
			if !slices.Contains(parameters[o.Kind], p) {
				t.Errorf("%s: a %s has no parameter %s", o.file, o.Kind, p)
			}
		}
	}
}

// byHand are manifests that are in no kustomization.
var byHand = []string{"found.yaml"}

func TestKustomizationsAreComplete(t *testing.T) {
	pinned := regexp.MustCompile(`^v\d+\.\d+\.\d+$`)
	var tags []string
	for _, i := range readKustomization(t, "images").Images {
		tags = append(tags, i.Name)
		if !pinned.MatchString(i.NewTag) {
			t.Errorf("image %s is not pinned: %q", i.Name, i.NewTag)
		}
	}
	for _, dir := range []string{"base", "cluster"} {
		k := readKustomization(t, dir)
		if !slices.Equal(k.Components, []string{"../images"}) || len(k.Images) > 0 {
			t.Errorf("%s: the images are not those of images/", dir)
		}
		files, err := filepath.Glob("kubernetes/" + dir + "/*.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name := filepath.Base(f)
			if name != "kustomization.yaml" && slices.Contains(byHand, name) == slices.Contains(k.Resources, name) {
				t.Errorf("%s is in no kustomization, or should be in none", f)
			}
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?m)^\s+image: ([^:\s]+)(:v\S+)?$`).FindAllSubmatch(b, -1) {
				if !slices.Contains(tags, string(m[1])) || slices.Contains(byHand, name) != (len(m[2]) > 0) {
					t.Errorf("%s: image %s%s", f, m[1], m[2])
				}
			}
		}
		for _, r := range k.Resources {
			if _, err := os.Stat(filepath.Join("kubernetes", dir, r)); err != nil {
				t.Error(err)
			}
		}
	}
}

type kustomization struct {
	Resources, Components []string
	Images                []struct{ Name, NewTag string }
}

func readKustomization(t *testing.T, dir string) (k kustomization) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("kubernetes", dir, "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &k); err != nil {
		t.Fatal(err)
	}
	return k
}

func TestMountsReachTheHost(t *testing.T) {
	for _, file := range []string{"base/ballast.yaml", "cluster/daemon.yaml"} {
		b, err := os.ReadFile("kubernetes/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"/var/lib/kubelet", "/run/ballast"} {
			if !bytes.Contains(b, []byte("mountPath: "+path+"\n              mountPropagation: Bidirectional")) {
				t.Errorf("%s: mounts below %s stay in the pod", file, path)
			}
		}
	}
	unit, err := os.ReadFile("systemd/ballastd.service")
	if err != nil {
		t.Fatal(err)
	}
	// systemd.exec(5): each of these gives the service a mount namespace, or has systemd work on directories with mounts.
	for _, line := range strings.Split(string(unit), "\n") {
		key, _, _ := strings.Cut(line, "=")
		switch key {
		case "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "ProtectSystem", "ProtectHome", "ProtectKernelTunables",
			"ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ReadWritePaths", "ReadOnlyPaths",
			"InaccessiblePaths", "BindPaths", "TemporaryFileSystem", "RootDirectory", "MountFlags", "DynamicUser",
			"RuntimeDirectory", "StateDirectory":
			t.Errorf("the unit has %s", line)
		}
	}
}
