package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
	"github.com/ballast-csi/ballast/test/admintest"
)

func TestWhatIsShownOfACluster(t *testing.T) {
	socket := admintest.Serve(t, admintest.Several(t))
	for _, args := range []string{
		"cluster status", "cluster status -o json", "cluster join-token list", "cluster join-token list -o yaml", "node list", "node list -o wide", "node get node-1",
		"node why node-3", "node why node-4", "replica list", "replica list -o wide", "replica list --volume db -o wide", "replica list --node node-3", "replica list --volume db -o json",
		"volume list", "volume list -o wide", "volume get db", "volume get queue", "volume get db -o json", "volume why db", "salvage archive", "salvage archive -o json",
		"snapshot group list", "snapshot group get nightly", "snapshot group why nightly", "snapshot group list -o json",
	} {
		t.Run(args, func(t *testing.T) {
			r := ctl(socket, strings.Fields(args)...)
			if r.code != exitOK {
				t.Fatalf("exit %d: %s", r.code, r.err)
			}
			golden(t, "cluster/"+strings.NewReplacer(" ", "_", "-", "").Replace(args), r.out)
		})
	}
	alone := ctl(admintest.Serve(t, admintest.Sample()), "cluster", "status")
	if alone.code != exitOK || !strings.Contains(alone.out, "This node is alone") {
		t.Errorf("exit %d: %s%s", alone.code, alone.out, alone.err)
	}
}

func TestNothingNeedsAttention(t *testing.T) {
	c := admintest.Several(t)
	for i := range c.NodeList {
		c.NodeList[i].State, c.NodeList[i].LastSeen = volume.NodeActive, admintest.Ago(0)
		for j := range c.NodeList[i].Pools {
			c.NodeList[i].Pools[j].Used = 1
		}
	}
	for i := range c.ControllerList {
		c.ControllerList[i].Answers = true
	}
	c.Sick = nil
	if r := ctl(admintest.Serve(t, c), "cluster", "status"); r.code != exitOK || !strings.Contains(r.out, "nothing needs it") {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
}

func TestWithoutAMajority(t *testing.T) {
	c := admintest.Several(t)
	c.Refuse = fmt.Errorf("no controller leads: %w", volume.ErrUnavailable)
	for i := range c.ControllerList {
		c.ControllerList[i].Leader, c.ControllerList[i].Answers = false, i == 0
	}
	socket := admintest.Serve(t, c)
	r := ctl(socket, "cluster", "status")
	if r.code != exitUnreachable || !strings.Contains(r.err, "cannot be read: no controller leads") || strings.Contains(r.out, "Volumes:") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	golden(t, "cluster/no_majority", r.out)
	var v clusterView
	if r := ctl(socket, "cluster", "status", "-o", "json"); json.Unmarshal([]byte(r.out), &v) != nil || len(v.Controllers) != 3 || v.Unreadable == "" {
		t.Errorf("exit %d: %s", r.code, r.out)
	}
	// Whatever else is asked for, it is said who is away and what to do.
	r = ctl(socket, "volume", "list")
	if r.code != exitUnreachable || !strings.Contains(r.err, "no controller leads") || !strings.Contains(r.err, "1 of 3 controllers answer, 2 must (not node-2, node-3): bring 1 of these") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	w := startCtl(t, socket, "volume", "watch")
	if code, errs := w.end(t); code != exitUnreachable || !strings.Contains(errs, "not node-2, node-3") {
		t.Errorf("exit %d: %s", code, errs)
	}
	c.Mu.Lock()
	c.ControllerList[1].Answers = true // it is something else that is not there
	c.Mu.Unlock()
	if r := ctl(socket, "volume", "list"); r.code != exitUnreachable || strings.Contains(r.err, "controllers answer") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
}

// slowTyping is a person who takes their time.
type slowTyping struct {
	io.Reader
	wait time.Duration
}

func (s *slowTyping) Read(p []byte) (int, error) {
	time.Sleep(s.wait)
	s.wait = 0
	return s.Reader.Read(p)
}

func TestAQuestionIsNotTimed(t *testing.T) {
	defer func(p func(any) bool) { isPerson = p }(isPerson)
	isPerson = func(any) bool { return true }
	socket := admintest.Serve(t, admintest.Several(t))
	for _, c := range []struct{ args, typed string }{
		{"volume delete web", "y\n"},
		{"salvage archive --replica rep-c2 --accept-data-loss", "archive\n"},
	} {
		const timeout = time.Second
		var out, errs bytes.Buffer
		args := append([]string{"--socket", socket, "--timeout", timeout.String()}, strings.Fields(c.args)...)
		if code := run(context.Background(), args, streams{in: &slowTyping{strings.NewReader(c.typed), 3 * timeout / 2}, out: &out, err: &errs}); code != exitOK {
			t.Errorf("%s: exit %d: %s", c.args, code, errs.String())
		}
	}
}

func TestJoinTokens(t *testing.T) {
	c := admintest.Several(t)
	socket := admintest.Serve(t, c)
	r := ctl(socket, strings.Fields("cluster join-token create --role controller,storage --node node-3 --ttl 2h")...)
	text := regexp.MustCompile(`(?m)^ballast-join-\S+$`).FindString(r.out)
	token, err := jointoken.Parse(text)
	if r.code != exitOK || err != nil || token.CA != c.CA.Pin() {
		t.Fatalf("exit %d, %v: %s%s", r.code, err, r.out, r.err)
	}
	if want := "\n  ballastd --node-id node-3 --listen ADDRESS:9820 --join " + text + " --controllers 10.0.0.1:9820,10.0.0.2:9820,10.0.0.3:9820\n"; !strings.Contains(r.out, want) {
		t.Errorf("%q is not in %q", want, r.out)
	}
	record := c.TokenList[len(c.TokenList)-1]
	if record.ID != token.ID() || record.Hash != token.Hash() || record.Uses != 1 || record.ExpiresAt != admintest.Ago(-2*time.Hour) || !strings.Contains(record.CreatedBy, "uid=0") {
		t.Errorf("%+v", record)
	}
	if r := ctl(socket, "cluster", "join-token", "list", "-o", "json"); strings.Contains(r.out, text) || strings.Contains(r.out, record.Hash) {
		t.Errorf("a secret is listed: %s", r.out)
	}
	if r := ctl(socket, "cluster", "join-token", "revoke", text); r.code != exitOK || len(c.TokenList) != 1 {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	if r := ctl(socket, "audit", "--last", "100"); strings.Contains(r.out, text) || !strings.Contains(r.out, "token.revoke") {
		t.Errorf("%s", r.out)
	}
	var v tokenView
	r = ctl(socket, strings.Fields("cluster join-token create --uses 3 -o json")...)
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v.Uses != 3 || !strings.Contains(v.Command, v.Token) || v.Roles[0] != "storage" {
		t.Errorf("%+v %v %s", v, err, r.err)
	}
}

func TestClusterErrorsSayWhatToDo(t *testing.T) {
	socket := admintest.Serve(t, admintest.Several(t))
	alone := admintest.Serve(t, admintest.Sample())
	for _, c := range []struct {
		socket, args string
		code         int
		want         []string
	}{
		{socket, "node drain node-1", exitRefused, []string{"must stay up", "volume db", "volume queue", "--wait", "64 MiB/s"}},
		{socket, "cluster join-token create --uses 0", exitUsage, []string{"--uses 0"}},
		{socket, "cluster join-token create --ttl 0s", exitUsage, []string{"--ttl 0s"}},
		{socket, "cluster join-token create --role boss", exitUsage, []string{`"boss"`, "controller", "storage"}},
		{socket, "volume set db", exitUsage, []string{"--replicas", "--min-in-sync"}},
		{socket, "node drain node-9", exitNotFound, []string{"no node"}},
		{socket, "node remove node-1 --yes", exitRefused, []string{"is a controller", "remove-controller node-1"}},
		{socket, "node remove node-4", exitUsage, []string{"say --yes"}},
		{socket, "cluster remove-controller node-9 --yes", exitNotFound, []string{"is not a member"}},
		{socket, "cluster join-token create --role king", exitUsage, []string{`role "king"`}},
		{socket, "cluster join-token create --uses 101", exitUsage, []string{"1 to 100"}},
		{socket, "cluster join-token create --ttl 1000h", exitUsage, []string{"720h"}},
		{socket, "cluster join-token create --ttl -1s", exitUsage, []string{"ttl"}},
		{socket, "cluster join-token revoke nonsense", exitNotFound, []string{"no join token"}},
		{alone, "cluster join-token create", exitRefused, []string{"node node-1 is alone", "--listen"}},
		{alone, "cluster remove-controller node-1 --yes", exitRefused, []string{"is alone"}},
		{alone, "cluster admin-cert x", exitRefused, []string{"is alone"}},
		{socket, "cluster admin-cert ../x", exitUsage, []string{"--out"}},
		{socket, "cluster admin-cert x --role king", exitUsage, []string{`role "king"`}},
		{socket, "salvage archive --replica rep-c2", exitUsage, []string{"--accept-data-loss"}},
		{socket, "salvage archive --accept-data-loss", exitUsage, []string{"--replica"}},
		{socket, "salvage archive --replica rep-c2 --accept-data-loss", exitUsage, []string{"say --yes"}},
		{socket, "salvage archive --replica rep-x --accept-data-loss --yes", exitNotFound, []string{`no replica "rep-x"`}},
		{socket, "salvage db --replica rep-a1 --accept-data-loss --yes", exitRefused, []string{"attached to node node-1"}},
		{socket, "volume set db", exitUsage, []string{"replicas"}},
		{socket, "replica list --node node-9", exitNotFound, []string{"no node"}},
		{socket, "snapshot group get nothing", exitNotFound, []string{"no group"}},
		{socket, "snapshot group create x", exitUsage, []string{"VOLUME is missing"}},
		{socket, "--server localhost:1 volume list", exitUsage, []string{"--cert"}},
	} {
		r := ctl(c.socket, strings.Fields(c.args)...)
		if r.code != c.code || r.out != "" || strings.Count(r.err, "\n") != 1 {
			t.Errorf("%s: exit %d, want %d: %q %q", c.args, r.code, c.code, r.out, r.err)
		}
		for _, w := range c.want {
			if !strings.Contains(r.err, w) {
				t.Errorf("%s: %q is not in %q", c.args, w, r.err)
			}
		}
	}
}

func TestNodesAreChanged(t *testing.T) {
	c := admintest.Several(t)
	socket := admintest.Serve(t, c)
	for _, step := range []struct{ args, want string }{
		{"node drain node-4", "Node node-4 is drained"},
		{"node undrain node-4", "Node node-4 is used again"},
		{"node empty node-2", "Node node-2 is being emptied: 3 replicas and 0 snapshots are left"},
		{"node undrain node-4", "used again"},
		{"node empty node-4 --wait", "Node node-4 is empty: ballastctl node remove node-4"},
		{"node remove node-4 --yes", "Node node-4 is removed"},
		{"cluster remove-controller node-3 --yes", "no controller any more"},
		{"snapshot group create weekly db queue", "of 2 snapshots is ready"},
		{"snapshot group delete weekly --yes", "Group weekly is deleted"},
	} {
		r := ctl(socket, strings.Fields(step.args)...)
		if r.code != exitOK || !strings.Contains(r.out, step.want) {
			t.Errorf("%s: exit %d\n%s%s", step.args, r.code, r.out, r.err)
		}
	}
}

func TestDrainWaits(t *testing.T) {
	defer func(d time.Duration) { waitEvery = d }(waitEvery)
	waitEvery = 5 * time.Millisecond
	c := admintest.Several(t)
	c.Vols = c.Vols[:1]
	c.Vols[0].Replicas[1].Role = volume.Stale
	socket := admintest.Serve(t, c)
	d := startCtl(t, socket, "node", "drain", "node-1", "--wait")
	for end := time.Now().Add(30 * time.Second); !strings.Contains(ctl(socket, "audit").out, "node.drain"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not ask")
		}
	}
	select {
	case code := <-d.code:
		t.Fatalf("it does not wait: exit %d", code)
	case <-time.After(50 * time.Millisecond):
	}
	c.Mu.Lock()
	rs := append([]volume.Replica(nil), c.Vols[0].Replicas...)
	rs[1].Role, rs[2].Role = volume.InSync, volume.InSync
	c.Vols[0].Replicas = rs
	for i := range c.NodeList {
		c.NodeList[i].LastSeen = admintest.Ago(0)
	}
	c.Mu.Unlock()
	if code, errs := d.end(t); code != exitOK || !strings.Contains(errs, "waiting: volume db") || !strings.Contains(d.output(), "is drained") {
		t.Errorf("exit %d: %q %q", code, d.output(), errs)
	}
	// Waiting is not asking again and again: each refusal is a line of the audit log.
	if r := ctl(socket, "audit", "-o", "json"); strings.Count(r.out, "node.drain") != 2 {
		t.Errorf("a refusal and a grant: %s", r.out)
	}
}

func TestASnapshotKeepsANodeUp(t *testing.T) {
	c := admintest.Several(t)
	c.Vols = c.Vols[3:] // web, on node-1 and node-2
	c.Vols[0].Parameters.MinInSync = 1
	c.Snaps = []volume.Snapshot{{ID: "snap-1", Name: "monday", Volume: c.Vols[0].ID, State: volume.Ready, Holders: []volume.Replica{{Node: "node-2", Pool: "pool-2"}}}}
	socket := admintest.Serve(t, c)
	for _, want := range []string{"snapshot monday of volume web: its only copy is there; ", "volume set web --replicas N", "or delete it"} {
		if r := ctl(socket, "node", "drain", "node-2"); r.code != exitRefused || !strings.Contains(r.err, want) {
			t.Errorf("exit %d: %s; want %q", r.code, r.err, want)
		}
	}
	if r := ctl(socket, "node", "why", "node-2"); !strings.Contains(strings.Join(strings.Fields(r.out), " "), "make what needs 1 snapshot (monday) wait") {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
	c.Mu.Lock()
	c.Snaps[0].Volume = "vol-gone"
	c.Mu.Unlock()
	if r := ctl(socket, "node", "drain", "node-2"); r.code != exitRefused || !strings.Contains(r.err, "of volume vol-gone, which was deleted: its only copy") || strings.Contains(r.err, "replicas N") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
}

func TestSalvageWantsTheName(t *testing.T) {
	defer func(p func(any) bool) { isPerson = p }(isPerson)
	isPerson = func(any) bool { return true }
	c := admintest.Several(t)
	socket := admintest.Serve(t, c)
	salvage := func(typed string) result {
		var out, errs bytes.Buffer
		code := run(context.Background(), []string{"--socket", socket, "salvage", "archive", "--replica", "rep-c2", "--accept-data-loss"}, streams{in: strings.NewReader(typed), out: &out, err: &errs})
		return result{code, out.String(), errs.String()}
	}
	for _, typed := range []string{"", "y\n", "db\n"} {
		if r := salvage(typed); r.code != exitFailed || !strings.Contains(r.err, "nothing was changed") {
			t.Errorf("%q: exit %d: %s", typed, r.code, r.err)
		}
	}
	if r := salvage("archive\n"); r.code != exitOK || !strings.Contains(r.out, "is what replica rep-c2 has (lineage 2)") {
		t.Errorf("exit %d: %s%s", r.code, r.out, r.err)
	}
	if r := ctl(socket, "audit"); !strings.Contains(r.out, "volume.salvage") {
		t.Error(r.out)
	}
}

func TestWatchShowsProgress(t *testing.T) {
	c := admintest.Several(t)
	socket := admintest.Serve(t, c)
	w := startCtl(t, socket, "volume", "watch", "db")
	w.until(t, "████████░░  75%  1.0 GiB left  64 MiB/s  16s")
	c.Mu.Lock()
	c.Reports["vol-00000000000000000001"] = volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: "rep-a3", Done: 9 << 30, Left: 1 << 30, Rate: 128 << 20}}}
	c.Mu.Unlock()
	w.until(t, " 90%  1.0 GiB left  128 MiB/s  8s")
	w.stop()
	if code, errs := w.end(t); code != exitOK || strings.Contains(w.output(), overwrite) {
		t.Errorf("exit %d: %s %q", code, errs, w.output())
	}
	t.Setenv("CLICOLOR_FORCE", "1")
	w = startCtl(t, socket, "volume", "watch", "db")
	w.until(t, " 90%")
	c.Mu.Lock()
	c.Reports["vol-00000000000000000001"] = volume.EngineReport{Phase: "live", Resyncs: []volume.Resync{{Replica: "rep-a3", Done: 19 << 30, Left: 1 << 30}}}
	c.Mu.Unlock()
	w.until(t, " 95%")
	if !strings.Contains(w.output(), overwrite) {
		t.Errorf("progress is not shown in one place: %q", w.output())
	}
}

func TestOtherNodesAreNamed(t *testing.T) {
	c := admintest.Several(t)
	c.OtherControllers = c.NodeList[:2]
	c.Refuse = volume.ErrUnavailable
	socket := admintest.Serve(t, c)
	r := ctl(socket, "volume", "list")
	if s := ctl(socket, "status"); s != r {
		t.Errorf("status: %+v", s)
	}
	if r.code != exitUnreachable || !strings.Contains(r.err, "node node-1 is no controller of its cluster; run this on one that is: node-1 (10.0.0.1), node-2 (10.0.0.2)") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
}

func TestAdminsOverTheNetwork(t *testing.T) {
	c := admintest.Several(t)
	socket := admintest.Serve(t, c)
	address := admintest.ServeTLS(t, c)
	dir := t.TempDir()
	file := func(role string) string { return filepath.Join(dir, role+".pem") }
	for _, role := range []string{"viewer", "operator", "admin"} {
		if r := ctl(socket, "cluster", "admin-cert", "alice-"+role, "--role", role, "--out", file(role)); r.code != exitOK {
			t.Fatalf("exit %d: %s", r.code, r.err)
		}
		if i, err := os.Stat(file(role)); err != nil || i.Mode().Perm() != 0o600 {
			t.Errorf("%v %v", i.Mode(), err)
		}
	}
	if r := ctl(socket, "cluster", "admin-cert", "bob", "--out", file("admin")); r.code != exitUsage {
		t.Errorf("a certificate is overwritten: exit %d: %s", r.code, r.err)
	}
	other, err := pki.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ca *pki.CA, name string, id pki.Identity) string {
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := key.Request()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := ca.Issue(csr, id, 0, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := pki.Save(file(name), chain, key); err != nil {
			t.Fatal(err)
		}
		return name
	}
	issue(other, "stranger", pki.Admin("mallory", pki.RoleAdmin))
	issue(c.CA, "withdrawn", pki.Admin(admintest.Withdrawn, pki.RoleAdmin))
	issue(c.CA, "node", pki.Node("node-1", pki.RoleController))
	for _, x := range []struct {
		cert, args string
		code       int
		want       string
	}{
		{"viewer", "volume list", exitOK, ""},
		{"viewer", "volume why db", exitOK, ""},
		{"viewer", "volume set db --iops 5", exitRefused, `admin "alice-viewer" (viewer) may not; it takes the role operator`},
		{"operator", "volume set db --iops 5", exitOK, ""},
		{"operator", "cluster join-token create", exitRefused, "it takes the role admin"},
		{"operator", "salvage archive --replica rep-c2 --accept-data-loss --yes", exitRefused, "it takes the role admin"},
		{"admin", "cluster join-token create", exitOK, ""},
		{"stranger", "volume list", exitUnreachable, "is no controller of the cluster that made"},
		{"withdrawn", "volume list", exitUnreachable, "refuses the certificate"},
		{"node", "volume list", exitUsage, "certificate of node"},
		{"nothing", "volume list", exitUsage, "no file"},
	} {
		r := ctl("/nonexistent", append([]string{"--server", address, "--cert", file(x.cert)}, strings.Fields(x.args)...)...)
		if r.code != x.code || !strings.Contains(r.err, x.want) {
			t.Errorf("%s: %s: exit %d: %s", x.cert, x.args, r.code, r.err)
		}
	}
	if r := ctl(socket, "audit"); !strings.Contains(r.out, `admin "alice-operator" (operator)`) {
		t.Error(r.out)
	}
	if r := ctl("", "--server", "127.0.0.1:1", "--cert", file("viewer"), "volume", "list"); r.code != exitUnreachable || !strings.Contains(r.err, "cannot connect") {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
}

func TestClusterCompletion(t *testing.T) {
	socket := admintest.Serve(t, admintest.Several(t))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"node", "drain", ""}, "node-1"},
		{[]string{"node", "remove", "node-4", ""}, ":4"},
		{[]string{"salvage", "arch"}, "archive\t"},
		{[]string{"salvage", "archive", "--replica", ""}, "rep-c2\tstale on node-2"},
		{[]string{"cluster", "join-token", "revoke", ""}, "0123456789abcdef\tcontroller, storage"},
		{[]string{"cluster", "join-token", "create", "--role", ""}, "controller,storage"},
		{[]string{"cluster", "remove-controller", ""}, "node-3"},
		{[]string{"cluster", "admin-cert", "x", "--role", ""}, "operator"},
		{[]string{"snapshot", "group", "get", ""}, "nightly\t2 snapshots"},
		{[]string{"snapshot", "group", "create", "x", "db", ""}, "queue\t"},
		{[]string{"replica", "list", "--node", ""}, "node-2"},
		{[]string{"volume", "set", "db", "--data-locality", ""}, "required"},
	} {
		r := ctl(socket, append([]string{"__complete"}, c.args...)...)
		if r.code != exitOK || !strings.Contains(r.out, c.want) {
			t.Errorf("%v: exit %d: %q is not in %q", c.args, r.code, c.want, r.out)
		}
	}
}

func TestChangesOfAClusterAreData(t *testing.T) {
	socket := admintest.Serve(t, admintest.Several(t))
	for _, args := range []string{
		"node drain node-4", "node undrain node-4", "node empty node-4", "node remove node-4 --yes", "cluster remove-controller node-3 --yes",
		"cluster join-token create", "cluster join-token revoke 0123456789abcdef", "cluster admin-cert eve --out " + filepath.Join(t.TempDir(), "eve.pem"),
		"volume set db --replicas 2", "salvage archive --replica rep-c2 --accept-data-loss --yes", "snapshot group create weekly db", "snapshot group delete weekly --yes",
	} {
		r := ctl(socket, append(strings.Fields(args), "-o", "json")...)
		var v map[string]any
		if err := json.Unmarshal([]byte(r.out), &v); r.code != exitOK || err != nil || len(v) == 0 {
			t.Errorf("%s: exit %d, %v: %q %s", args, r.code, err, r.out, r.err)
		}
	}
}

// What a pool has yet to free of a snapshot is shown, counts for its node, and is no copy.
func TestACopyThatLeavesIsShown(t *testing.T) {
	c := admintest.Several(t)
	at := func(n string) []volume.Replica {
		return []volume.Replica{{Node: volume.NodeID("node-" + n), Pool: volume.PoolID("pool-" + n)}}
	}
	c.Snaps = []volume.Snapshot{{ID: "snap-1", Name: "monday", Volume: c.Vols[0].ID, State: volume.Ready, Holders: at("1"), Leaving: at("2")}}
	socket := admintest.Serve(t, c)
	for args, want := range map[string]string{
		"snapshot get monday": "To be freed by: node-2", "snapshot get monday -o json": `"role": "leaving"`,
		"snapshot list -o json": `"node": "node-1"`, "node get node-2": "1 snapshots",
	} {
		if r := ctl(socket, strings.Fields(args)...); r.code != exitOK || !strings.Contains(strings.Join(strings.Fields(r.out), " "), want) {
			t.Errorf("%s: exit %d: %s%s; want %q", args, r.code, r.out, r.err, want)
		}
	}
	if r := ctl(socket, "snapshot", "list"); !strings.Contains(strings.Join(strings.Fields(r.out), " "), "ready 1 ") {
		t.Errorf("it is counted: %s", r.out)
	}
}
