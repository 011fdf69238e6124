package main

import (
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

func TestSnapshotWithConditions(t *testing.T) {
	x := &adminpb.Snapshot{Name: "monday", State: "ready"}
	if got := snapshotState(viewSnapshot(x)); got.text != "ready" {
		t.Errorf("%+v", got)
	}
	x.Conditions = []*adminpb.Condition{{Severity: "Degraded", Reason: "CopiesDiffer", Message: "they do"}}
	if got := snapshotState(viewSnapshot(x)); got.text != "degraded: CopiesDiffer" || got.style != styleWarn {
		t.Errorf("%+v", got)
	}
	var of string
	told := false
	for _, f := range snapshots(&of).describe(viewSnapshot(x), time.Now()) {
		told = told || f.value.text == "they do"
	}
	if !told {
		t.Error("get does not say what is wrong")
	}
}
