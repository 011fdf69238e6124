// Package sanity_test runs csi-sanity against the real daemon, with real devices and mounts: as filesystem and as raw
// block, with controller and node on sockets of their own and together, on one node and on a cluster of three, every
// idempotent call ten times.
//
// It needs root. What the driver advertises must not be skipped.
package sanity_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/test/harness"
)

const (
	gib = 1 << 30
	// specs is how many specifications csi-test 5.6.0 has for each configuration, those that are skipped included.
	specs = 103
	// secret is passed wherever a request has secrets; it must not turn up in the log.
	secret = "c0rrecth0rsebatterystaple"
)

// place is who is asked: a controller and a node, which may be the same daemon.
type place struct{ controller, node *harness.Daemon }

// configurations by name: how the volumes are used, and where.
var configurations = []struct {
	name   string
	on     string
	change func(*sanity.TestConfig)
}{
	{"filesystem, separate endpoints", "split", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "mount"
	}},
	{"raw block, separate endpoints", "split", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "block"
	}},
	{"xfs, one endpoint", "one", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "mount"
		c.TestVolumeParameters["fsType"] = "xfs"
		c.TestVolumeParameters["blockSize"] = "512"
	}},
	{"btrfs, one endpoint", "one", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "mount"
		c.TestVolumeParameters["fsType"] = "btrfs"
	}},
	{"cluster, filesystem, three replicas", "cluster", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "mount"
		replicated(c)
	}},
	{"cluster, raw block, three replicas", "cluster", func(c *sanity.TestConfig) {
		c.TestVolumeAccessType = "block"
		replicated(c)
	}},
}

func replicated(c *sanity.TestConfig) {
	c.TestVolumeParameters["replicas"], c.TestVolumeParameters["minInSync"] = "3", "2"
	c.TestVolumeParameters["dataLocality"] = "preferred"
	c.TestVolumeMutableParameters["replicas"] = "3"
}

func TestSanity(t *testing.T) {
	bin, err := harness.Build(t.Context(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	split, one := start(t, bin, true), start(t, bin, false)
	cluster := startCluster(t, bin)
	// The controller that is asked is on another node than the volumes.
	places := map[string]place{"split": {split, split}, "one": {one, one}, "cluster": {cluster[1], cluster[0]}}
	daemons := append([]*harness.Daemon{split, one}, cluster...)

	var report types.Report
	ginkgo.ReportAfterSuite("keep the report", func(r types.Report) { report = r })
	gomega.RegisterFailHandler(ginkgo.Fail)
	for i, c := range configurations {
		config := configure(t, places[c.on], filepath.Join(places[c.on].node.Dir(), fmt.Sprint("c", i)))
		c.change(&config)
		ginkgo.Describe(c.name, func() {
			s := sanity.GinkgoTest(&config)
			t.Cleanup(s.Finalize)
		})
	}
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.Timeout = 18 * time.Minute
	reporter.Succinct = true
	if !ginkgo.RunSpecs(t, "csi-sanity", suite, reporter) {
		for _, d := range daemons {
			t.Logf("the end of %s:\n%s", d.LogPath(), d.LogTail(100))
		}
	}
	check(t, report, split)
	for _, d := range daemons {
		for _, leak := range d.Leaks() {
			t.Errorf("left behind: %s", leak)
		}
		log, err := os.ReadFile(d.LogPath())
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(log), secret) {
			t.Errorf("a secret is in %s", d.LogPath())
		}
		for _, p := range places {
			if p.node == d && !strings.Contains(string(log), "NodeStageVolume") {
				t.Errorf("no calls are in %s: the search for secrets proves nothing", d.LogPath())
			}
		}
	}
}

// settings of every daemon.
var settings = []string{"--log-level", "debug", "--pool-capacity", "200Gi", "--over-provision", "100"}

// directory makes one for daemons, and removes it with what they left when the test has passed.
func directory(t *testing.T, done func() error) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ballast-sanity-") // t.TempDir's names are too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := done(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("%s is kept", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// startCluster starts three nodes, all of them controllers.
func startCluster(t *testing.T, bin harness.Binaries) []*harness.Daemon {
	t.Helper()
	var c *harness.Cluster
	dir := directory(t, func() error { return c.Close() })
	c, err := harness.NewCluster(harness.ClusterOptions{Dir: dir, Bin: bin, Nodes: 3, Split: true, Args: settings})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c.Nodes()
}

// start starts a daemon in a directory of its own, for the time of the test.
func start(t *testing.T, bin harness.Binaries, split bool) *harness.Daemon {
	t.Helper()
	var d *harness.Daemon
	dir := directory(t, func() error { return d.Close() })
	d, err := harness.New(harness.Options{Dir: dir, Bin: bin, Split: split, Args: settings})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, d.LogTail(50))
	}
	return d
}

func configure(t *testing.T, p place, dir string) sanity.TestConfig {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := sanity.NewTestConfig()
	c.Address = p.node.NodeSocket()
	c.ControllerAddress = p.controller.ControllerSocket()
	c.TargetPath, c.StagingPath = filepath.Join(dir, "targets"), filepath.Join(dir, "staging")
	c.IdempotentCount = 10
	c.TestNodeVolumeAttachLimit = true
	// csi-test compares a topology that it has sent with one that it received, bit by bit; sending a message leaves its
	// size in it. So what is sent is a copy.
	copied := grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn,
		invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return invoke(ctx, method, proto.Clone(req.(proto.Message)), reply, conn, opts...)
	})
	c.DialOptions, c.ControllerDialOptions = append(c.DialOptions, copied), append(c.ControllerDialOptions, copied)
	c.TestVolumeSize = 10 * gib
	c.TestVolumeExpandSize = 12 * gib
	c.TestVolumeParameters = map[string]string{
		"replicas": "1", "minInSync": "1", "dataLocality": "required",
		"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "sanity", "csi.storage.k8s.io/pv/name": "pv",
	}
	c.TestVolumeMutableParameters = map[string]string{"iopsLimit": "5000", "bandwidthLimit": "200Mi", "replicas": "1"}
	c.TestSnapshotParameters = map[string]string{"freezeFilesystem": "true"}
	c.SecretsFile = filepath.Join(dir, "secrets.yaml")
	var secrets strings.Builder
	for _, call := range []string{"CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ControllerUnpublishVolume",
		"ControllerValidateVolumeCapabilities", "NodeStageVolume", "NodePublishVolume", "CreateSnapshot", "DeleteSnapshot",
		"ControllerExpandVolume", "ControllerModifyVolume", "ListSnapshots", "GetSnapshot"} {
		fmt.Fprintf(&secrets, "%sSecret:\n  key: %s\n", call, secret)
	}
	if err := os.WriteFile(c.SecretsFile, []byte(secrets.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// check fails where a specification was left out that has no right to be.
func check(t *testing.T, report types.Report, d *harness.Daemon) {
	t.Helper()
	may := excuses(t, d)
	total, passed := map[string]int{}, map[string]int{}
	for _, s := range report.SpecReports.WithLeafNodeType(types.NodeTypeIt) {
		configuration := s.ContainerHierarchyTexts[0]
		total[configuration]++
		switch {
		case s.State == types.SpecStatePassed:
			passed[configuration]++
		case s.State == types.SpecStatePending: // csi-test itself has switched it off
		case s.State == types.SpecStateSkipped && !may[s.Failure.Message]:
			t.Errorf("skipped (%s): %s", s.Failure.Message, s.FullText())
		}
	}
	for _, c := range configurations {
		if total[c.name] != specs {
			t.Errorf("%s: %d specifications, want %d", c.name, total[c.name], specs)
		}
		t.Logf("%s: %d passed", c.name, passed[c.name])
	}
}

// excuses are the reasons to skip that hold as long as the driver does not advertise what they are about.
func excuses(t *testing.T, d *harness.Daemon) map[string]bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	may := map[string]bool{"GroupControllerService not supported": true}
	plugin, err := d.CSI().GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range plugin.GetCapabilities() {
		if c.GetService().GetType() == csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE {
			delete(may, "GroupControllerService not supported")
		}
	}
	return may
}
