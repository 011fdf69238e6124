package sim

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// ruleOff is the protocol without one rule.
func ruleOff(t *testing.T, name string) replication.Rules {
	t.Helper()
	var r replication.Rules
	f := reflect.ValueOf(&r).Elem().FieldByName(name)
	if !f.IsValid() {
		t.Fatalf("no rule is called %s", name)
	}
	f.SetBool(true)
	return r
}

// focusOf names, for rules that chance alone would seldom need, the kind of world in which they matter. What is violated
// there is found by the same checks as anywhere.
var focusOf = map[string]Focus{
	"WithoutReconcileLock":        "outage",
	"WithoutReconcile":            "outage",
	"WithoutKeptDeviceCheck":      "kept",
	"WithoutLease":                "lease",
	"WithoutLeaseWait":            "lease",
	"WithoutRebootLease":          "lease",
	"WithoutMaxISR":               "commit",
	"WithoutUnknownKeeps":         "commit",
	"WithoutErrorReconcile":       "commit",
	"WithoutCopyDrain":            "laggard",
	"WithoutCopyLock":             "resync",
	"WithoutCopyReadLock":         "resync",
	"WithoutTargetUnflushed":      "target",
	"WithoutEqualUnflushed":       "target",
	"WithoutProbeLock":            "resync",
	"WithoutTargetDrain":          "laggard",
	"WithoutOwnWIL":               "resync",
	"WithoutAdoptMissed":          "resync",
	"WithoutHigherVersionRefusal": "rollback",
	"WithoutVerify":               "corrupt",
	"WithoutSealNumber":           "snapshot",
	"WithoutBarrierAbort":         "snapshot",
	"WithoutLogFirst":             "alone",
}

const (
	mutationSeeds = 10000
	mutationTime  = 10 * time.Minute // the seeds are the bound; this one is for a machine that hardly runs
)

// TestMutation switches each rule of the protocol off, one at a time, and must find a violation.
func TestMutation(t *testing.T) {
	fmt.Printf("%-28s %-12s %-10s %8s %8s\n", "rule off", "focus", "violated", "seeds", "seconds")
	rules := reflect.TypeFor[replication.Rules]()
	for i := range rules.NumField() {
		name := rules.Field(i).Name
		if *without != "" && !slices.Contains(strings.Split(*without, ","), name) {
			continue
		}
		began := time.Now()
		f := focusOf[name]
		_, failure, _, ran, _ := search(Options{Rules: ruleOff(t, name), Focus: f}, 1, mutationSeeds, mutationTime)
		found := "NOT FOUND"
		if failure != nil {
			found = failure.Invariant
		} else {
			t.Errorf("%s: no violation in %d seeds: an untested rule", name, ran)
		}
		fmt.Printf("%-28s %-12s %-10s %8d %8.1f\n", name, f, found, ran, time.Since(began).Seconds())
	}
}
