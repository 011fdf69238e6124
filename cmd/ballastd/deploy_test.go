package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// The manifests start the daemon with settings that it has.
func TestManifestsHaveValidSettings(t *testing.T) {
	b, err := os.ReadFile("../../deploy/kubernetes/base/ballast.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct {
						Name string
						Args []string
					}
				}
			}
		}
	}
	if err := yaml.Unmarshal(b, &set); err != nil {
		t.Fatal(err)
	}
	daemon := set.Spec.Template.Spec.Containers[0]
	args := strings.Split(strings.ReplaceAll(strings.Join(daemon.Args, "\n"), "$(NODE_NAME)", "node-1"), "\n")
	if c, err := parse(t, args...); daemon.Name != "ballastd" || err != nil || c.node != "node-1" || c.csi != "/csi/csi.sock" {
		t.Errorf("%v: %+v %v", args, c, err)
	}

	job, err := os.ReadFile("../../deploy/nomad/ballast.nomad.hcl")
	if err != nil {
		t.Fatal(err)
	}
	args = nil
	for _, m := range regexp.MustCompile(`(?m)^ +"(--[^"]*)",$`).FindAllStringSubmatch(string(job), -1) {
		args = append(args, strings.ReplaceAll(m[1], "${node.unique.name}", "client-1"))
	}
	t.Setenv("CSI_ENDPOINT", "unix:///csi/csi.sock")
	if c, err := parse(t, args...); err != nil || len(args) != 2 || c.node != "client-1" || c.csi != "/csi/csi.sock" {
		t.Errorf("%v: %+v %v", args, c, err)
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
