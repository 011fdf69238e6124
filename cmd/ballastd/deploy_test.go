package main

import (
	"cmp"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// container is what is looked at of a container of ballastd.
type container struct {
	Name string
	Args []string
	Env  []struct {
		Name      string
		ValueFrom struct {
			FieldRef        struct{ FieldPath string }
			SecretKeyRef    struct{ Name, Key string }
			ConfigMapKeyRef struct{ Name, Key string }
		}
	}
}

// command is what Kubernetes would start the daemon with on a node at 10.0.0.2: its arguments, and its environment that is set.
func (c container) command(t *testing.T) []string {
	t.Helper()
	given := map[string]string{
		"spec.nodeName": "node-1", "status.hostIP": "10.0.0.2", "metadata.labels['topology.kubernetes.io/zone']": "rack-2",
		"ballast-join/token": "a-token", "ballast-cluster/controllers": "10.0.0.1:9820,10.0.0.2:9820,10.0.0.3:9820",
	}
	settings := map[string]bool{}
	flags := pflag.NewFlagSet("ballastd", pflag.ContinueOnError)
	addFlags(flags)
	flags.VisitAll(func(f *pflag.Flag) { settings[envName(f.Name)] = true })
	args := strings.Join(c.Args, "\n")
	for _, e := range c.Env {
		f := e.ValueFrom
		v := given[cmp.Or(f.FieldRef.FieldPath, f.SecretKeyRef.Name+f.ConfigMapKeyRef.Name+"/"+f.SecretKeyRef.Key+f.ConfigMapKeyRef.Key)]
		if v == "" {
			t.Errorf("%s is of nothing that is given: %+v", e.Name, f)
		}
		if !strings.Contains(args, "$("+e.Name+")") && !settings[e.Name] {
			t.Errorf("%s is neither used nor a setting", e.Name)
		}
		args = strings.ReplaceAll(args, "$("+e.Name+")", v)
		t.Setenv(e.Name, v)
	}
	if strings.Contains(args, "$(") {
		t.Errorf("a variable is not set: %s", args)
	}
	return strings.Split(args, "\n")
}

// The manifests of Kubernetes start the daemon with settings that it has.
func TestKubernetesHasValidSettings(t *testing.T) {
	alone := config{node: "node-1", csi: "/csi/csi.sock", metrics: ":9810"}
	first := config{node: "node-1", csi: "/run/ballast/csi.sock", metrics: "10.0.0.2:9810", cluster: &clusterConfig{}}
	member := config{node: "node-1", csi: "/csi/csi.sock", metrics: "10.0.0.2:9810", cluster: &clusterConfig{
		zone: "rack-2", join: "a-token", controllers: []string{"10.0.0.1:9820", "10.0.0.2:9820", "10.0.0.3:9820"},
	}}
	for file, want := range map[string]config{"base/ballast.yaml": alone, "cluster/daemon.yaml": member, "cluster/found.yaml": first} {
		t.Run(file, func(t *testing.T) {
			b, err := os.ReadFile("../../deploy/kubernetes/" + file)
			if err != nil {
				t.Fatal(err)
			}
			var o struct {
				Spec struct {
					Containers []container
					Template   struct {
						Spec struct{ Containers []container }
					}
				}
			}
			if err := yaml.Unmarshal(b, &o); err != nil {
				t.Fatal(err)
			}
			daemon := append(o.Spec.Containers, o.Spec.Template.Spec.Containers...)[0]
			args := daemon.command(t)
			c, err := parse(t, args...)
			if err != nil || daemon.Name != "ballastd" || c.node != want.node || c.csi != want.csi || c.metrics != want.metrics || c.dataDir != "/var/lib/ballast" || c.runDir != "/run/ballast" {
				t.Errorf("%v: %+v %v", args, c, err)
			}
			if (c.cluster == nil) != (want.cluster == nil) {
				t.Fatalf("%v: %+v", args, c.cluster)
			}
			if c.cluster == nil {
				return
			}
			got := *c.cluster
			if got.listen.api != "10.0.0.2:9820" || got.advertise != got.listen {
				t.Errorf("%+v", got)
			}
			if got.zone != want.cluster.zone || got.join != want.cluster.join || !slices.Equal(got.controllers, want.cluster.controllers) {
				t.Errorf("%+v, want %+v", got, *want.cluster)
			}
		})
	}
}

// So do the others.
func TestManifestsHaveValidSettings(t *testing.T) {
	t.Setenv("CSI_ENDPOINT", "unix:///csi/csi.sock")
	for file, listen := range map[string]string{"ballast.nomad.hcl": "", "cluster.nomad.hcl": "10.0.0.2:9820"} {
		job, err := os.ReadFile("../../deploy/nomad/" + file)
		if err != nil {
			t.Fatal(err)
		}
		var args []string
		for _, m := range regexp.MustCompile(`(?m)^ +"(--[^"]*)",$`).FindAllStringSubmatch(string(job), -1) {
			args = append(args, strings.NewReplacer("${node.unique.name}", "client-1", "${attr.unique.network.ip-address}", "10.0.0.2").Replace(m[1]))
		}
		for _, m := range regexp.MustCompile(`(?m)^ +(BALLAST_[A-Z_]+) += var\.([a-z]+)$`).FindAllStringSubmatch(string(job), -1) {
			if envName(m[2]) != m[1] || !strings.Contains(string(job), `variable "`+m[2]+`"`) {
				t.Errorf("%s: %s is no setting, or of no variable", file, m[0])
			}
		}
		c, err := parse(t, args...)
		if err != nil || len(args) < 2 || c.node != "client-1" || c.csi != "/csi/csi.sock" || (c.cluster != nil) != (listen != "") {
			t.Errorf("%s: %v: %+v %v", file, args, c, err)
		}
		if c.cluster != nil && c.cluster.listen.api != listen {
			t.Errorf("%s: %+v", file, c.cluster)
		}
	}

	env, err := os.ReadFile("../../deploy/systemd/ballastd.default")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("CSI_ENDPOINT", "")
	settings := regexp.MustCompile(`(?m)^#(BALLAST_[A-Z_]+)=(.*)$`).FindAllStringSubmatch(string(env), -1)
	for _, m := range settings {
		t.Setenv(m[1], strings.Trim(m[2], `"`))
	}
	if _, err := parse(t); err == nil || !strings.Contains(err.Error(), "/etc/ballast/join-token") {
		t.Errorf("the file of the token: %v", err)
	}
	token := filepath.Join(t.TempDir(), "join-token")
	if err := os.WriteFile(token, []byte("a-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("BALLAST_JOIN", "@"+token)
	c, err := parse(t)
	if err == nil && (c.cluster == nil || c.cluster.join != "a-token" || c.cluster.zone != "rack-2" || c.cluster.listen.api != "10.0.0.2:9820" || len(c.cluster.controllers) != 1) {
		t.Errorf("the cluster: %+v", c.cluster)
	}
	if err != nil || len(settings) != 10 || c.metrics != "127.0.0.1:9810" || c.pools[0].capacity != 200<<30 || c.logFormat != "json" {
		t.Errorf("%+v %v", c, err)
	}
}
