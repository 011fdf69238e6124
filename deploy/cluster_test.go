package deploy

import (
	"encoding/json"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// The object that tells Kubernetes what the driver can do. Each field changes what Kubernetes asks of it.
func TestCSIDriver(t *testing.T) {
	var found []object
	for _, o := range manifests(t, "kubernetes") {
		if o.Kind == "CSIDriver" {
			found = append(found, o)
		}
	}
	if len(found) != 1 || found[0].Metadata.Name != volume.DriverName {
		t.Fatalf("%+v", found)
	}
	want := map[string]any{
		"attachRequired": true, "podInfoOnMount": false, "requiresRepublish": false, "fsGroupPolicy": "File",
		"volumeLifecycleModes": []any{"Persistent"}, "storageCapacity": true, "seLinuxMount": true,
		"nodeAllocatableUpdatePeriodSeconds": float64(60),
	}
	if got := found[0].all["spec"]; !reflect.DeepEqual(got, any(want)) {
		t.Errorf("%v, want %v", got, want)
	}
}

// workload is what is looked at of a DaemonSet or a StatefulSet.
type workload struct {
	Metadata struct{ Name string }
	Spec     struct {
		UpdateStrategy struct{ Type string }
		Template       struct {
			Spec struct {
				ServiceAccountName string
				HostNetwork        bool
				NodeSelector       map[string]string
				Containers         []struct {
					Name         string
					Args         []string
					VolumeMounts []struct{ Name, MountPath string }
				}
				Volumes []struct {
					Name     string
					HostPath struct{ Path string }
				}
			}
		}
	}
}

func readWorkload(t *testing.T, file string) (w workload) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("kubernetes", file))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	return w
}

// hostPath of a file in a container.
func (w workload) hostPath(container int, file string) string {
	for _, m := range w.Spec.Template.Spec.Containers[container].VolumeMounts {
		if rest, ok := strings.CutPrefix(file, m.MountPath+"/"); ok {
			for _, v := range w.Spec.Template.Spec.Volumes {
				if v.Name == m.Name {
					return path.Join(v.HostPath.Path, rest)
				}
			}
		}
	}
	return ""
}

func flagOf(args []string, name string) string {
	for _, a := range args {
		if v, ok := strings.CutPrefix(a, name+"="); ok {
			return v
		}
	}
	return ""
}

// What makes several nodes one cluster: who runs where, keeps what across pods, and meets at which socket.
func TestClusterFitsTogether(t *testing.T) {
	daemon, csi := readWorkload(t, "cluster/daemon.yaml"), readWorkload(t, "cluster/sidecars.yaml")
	pod := daemon.Spec.Template.Spec
	if daemon.Spec.UpdateStrategy.Type != "OnDelete" || !pod.HostNetwork || pod.NodeSelector["csi.ballast.dev/storage"] != "true" {
		t.Errorf("%+v", daemon)
	}
	socket := daemon.hostPath(0, strings.TrimPrefix(flagOf(pod.Containers[0].Args, "--csi-endpoint"), "unix://"))
	if want := "/var/lib/kubelet/plugins/" + volume.DriverName + "/csi.sock"; socket != want ||
		flagOf(pod.Containers[1].Args, "--kubelet-registration-path") != want || daemon.hostPath(1, flagOf(pod.Containers[1].Args, "--csi-address")) != want {
		t.Errorf("the daemon's socket is %s", socket)
	}
	for _, p := range []string{"/var/lib/ballast", "/run/ballast", "/var/lib/kubelet", "/dev"} {
		if got := daemon.hostPath(0, p+"/x"); got != p+"/x" {
			t.Errorf("%s/x of the daemon is %q of the host", p, got)
		}
	}
	if csi.Spec.Template.Spec.NodeSelector["csi.ballast.dev/controller"] != "true" {
		t.Errorf("%+v", csi)
	}
	var names []string
	for i, c := range csi.Spec.Template.Spec.Containers {
		names = append(names, c.Name)
		if !slices.Contains(c.Args, "--leader-election") || csi.hostPath(i, flagOf(c.Args, "--csi-address")) != socket {
			t.Errorf("%s: %v", c.Name, c.Args)
		}
	}
	// The same as beside a node that is alone.
	var alone []string
	for _, c := range readWorkload(t, "base/ballast.yaml").Spec.Template.Spec.Containers[2:] {
		alone = append(alone, c.Name)
	}
	if !slices.Equal(names, alone) {
		t.Errorf("sidecars %v, of a node that is alone %v", names, alone)
	}
	// Who runs has an account, and the sidecars' may hold leases.
	accounts, leases := map[string]bool{}, false
	for _, o := range append(manifests(t, "kubernetes/base"), manifests(t, "kubernetes/cluster")...) {
		accounts[o.Metadata.Name] = accounts[o.Metadata.Name] || o.Kind == "ServiceAccount"
		b, err := json.Marshal(o.all)
		if err != nil {
			t.Fatal(err)
		}
		leases = leases || o.Kind == "RoleBinding" && o.Metadata.Name == "ballast-leases" &&
			strings.Contains(string(b), `"name":"`+csi.Spec.Template.Spec.ServiceAccountName+`"`)
	}
	if !accounts[pod.ServiceAccountName] || !accounts[csi.Spec.Template.Spec.ServiceAccountName] || !leases {
		t.Errorf("accounts %v, leases %v", accounts, leases)
	}
}

// kustomize makes of a directory what `kubectl apply -k` applies: kubectl has the same library.
func kustomize(t *testing.T, dir string) []byte {
	t.Helper()
	all, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	out, err := all.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// What is applied for a node that is alone.
func TestTheBaseIsWhole(t *testing.T) {
	out := string(kustomize(t, filepath.Join("kubernetes", "base")))
	for kind, want := range map[string]int{"StatefulSet": 1, "DaemonSet": 0, "CSIDriver": 1, "StorageClass": 1, "Namespace": 1} {
		if got := strings.Count(out, "\nkind: "+kind+"\n"); got != want {
			t.Errorf("%d of kind %s, want %d", got, kind, want)
		}
	}
}

// What becomes of an overlay as the documentation shows it.
func TestOverlayOfTheCluster(t *testing.T) {
	here, err := filepath.Abs("kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "kubernetes"), os.DirFS(here)); err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "kubernetes", "mine")
	if err := os.Mkdir(overlay, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(overlay, "kustomization.yaml"), []byte(`
resources: [../cluster]
images:
  - {name: ballast, newName: registry.example/ballast}
configMapGenerator:
  - name: ballast-cluster
    namespace: ballast
    literals: ["controllers=10.0.0.1:9820,10.0.0.2:9820,10.0.0.3:9820"]
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out := kustomize(t, overlay)
	if err := os.WriteFile(filepath.Join(dir, "all.yaml"), out, 0o600); err != nil {
		t.Fatal(err)
	}
	kinds, controllers := map[string]int{}, ""
	if err := os.RemoveAll(filepath.Join(dir, "kubernetes")); err != nil {
		t.Fatal(err)
	}
	for _, o := range manifests(t, dir) {
		kinds[o.Kind]++
		if o.Kind == "ConfigMap" {
			controllers = o.Metadata.Name
		}
	}
	if kinds["DaemonSet"] != 2 || kinds["StatefulSet"] != 0 || kinds["CSIDriver"] != 1 || kinds["StorageClass"] != 1 {
		t.Errorf("%v", kinds)
	}
	for _, want := range []string{"image: registry.example/ballast:v", "image: csi-provisioner:v", "replicas: \"3\"", "key: controllers\n              name: " + controllers + "\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in it", want)
		}
	}
}
