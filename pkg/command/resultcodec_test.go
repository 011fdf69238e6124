package command

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ballast-csi/ballast/pkg/volume"
)

func sampleResults() []Result {
	return []Result{
		Done{}, Volume{Volume: samples()[2].(CreateVolume).Volume, Created: true},
		Snapshot{Snapshot: volume.Snapshot{ID: "s", Holders: []volume.Replica{{ID: "r", Node: "n", Pool: "p"}}}},
		Group{Group: volume.Group{ID: "g", Snapshots: []volume.SnapshotID{"s"}, Volumes: []volume.ID{"v"}}, Snapshots: []volume.Snapshot{{ID: "s"}}, Created: true},
		JoinToken{Record: samples()[slices.IndexFunc(samples(), func(c Command) bool { return kindOf(c) == "create-join-token" })].(CreateJoinToken).Record},
		Refused{Reason: "busy", Message: "why"},
	}
}

func TestEveryResultSurvivesItsEncoding(t *testing.T) {
	named := map[string]bool{}
	for _, r := range sampleResults() {
		b, err := EncodeResult(r)
		if err != nil {
			t.Fatalf("%T: %v", r, err)
		}
		got, err := DecodeResult(b)
		if err != nil {
			t.Fatalf("%T: %v", r, err)
		}
		if d := cmp.Diff(r, got); d != "" {
			t.Errorf("%T: %s", r, d)
		}
		named[reflect.TypeOf(r).Name()] = true
	}
	if len(results) != len(named) {
		t.Errorf("%d types have an encoding, %d samples", len(results), len(named))
	}
	// Every type with a method result() must be among them.
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range tree.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil || fn.Name.Name != "result" {
				continue
			}
			if id, ok := fn.Recv.List[0].Type.(*ast.Ident); !ok || !named[id.Name] {
				t.Errorf("result type %v has no sample and perhaps no encoding", fn.Recv.List[0].Type)
			}
		}
	}
}

func TestDecodeResultRefuses(t *testing.T) {
	for _, in := range []string{``, `[]`, `{"v":2,"t":"done","r":{}}`, `{"v":1,"t":"none","r":{}}`, `{"v":1,"t":"done"}`,
		`{"v":1,"t":"done","r":{"x":1}}`, `{"v":1,"t":"done","r":{}} {}`} {
		if r, err := DecodeResult([]byte(in)); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%s: %v, %v", in, r, err)
		}
	}
}

func FuzzDecodeResult(f *testing.F) {
	for _, r := range sampleResults() {
		b, err := EncodeResult(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeResult(b)
		if err != nil {
			return
		}
		b2, err := EncodeResult(r)
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := DecodeResult(b2); err != nil || cmp.Diff(r, r2) != "" {
			t.Fatalf("%v: %s", err, cmp.Diff(r, r2))
		}
	})
}
