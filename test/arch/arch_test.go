// Package arch fails where the code leaves the architecture: the import rules of ARCHITECTURE.md, each with its reason,
// package docs, and file length.
package arch

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	root   = "../.."
	module = "github.com/ballast-csi/ballast/"
)

var (
	core     = []string{"pkg/volume", "pkg/region", "pkg/replication", "pkg/command", "pkg/layer", "pkg/placement", "pkg/quota", "pkg/pki/jointoken"}
	ports    = []string{"pkg/block", "pkg/disk", "pkg/frontend"}
	adapters = []string{"pkg/extentstore", "pkg/engine", "pkg/nbd", "pkg/meta", "pkg/meta/metaraft", "pkg/mount", "pkg/frontend/fuseloop", "pkg/replicanet"}
	services = []string{"pkg/control", "pkg/reconcile", "pkg/agent", "pkg/clusterapi", "pkg/driver", "pkg/admin"}
	// tools are small and know nothing of volumes' lives; anything but core and ports may use them.
	tools = []string{"pkg/apart", "pkg/repeat", "pkg/ioflusher", "pkg/keylock", "pkg/rpcerr", "pkg/audit", "pkg/metrics", "pkg/block/throttle", "pkg/pki"}
	// suites are for tests; only tests import them.
	suites = []string{"pkg/block/blocktest", "pkg/frontend/frontendtest"}
)

// rule says what the packages in from may not import.
type rule struct {
	name   string
	from   func(pkg string) bool
	forbid func(pkg, imported string) bool
	reason string
}

func own(list []string) func(string) bool {
	return func(pkg string) bool { return slices.Contains(list, pkg) }
}

// local is the imported package's path within the module, or "".
func local(imported string) string {
	rest, ok := strings.CutPrefix(imported, module)
	if !ok {
		return ""
	}
	return rest
}

var rules = []rule{
	{
		name: "core does no I/O", from: own(core),
		forbid: func(_, imported string) bool {
			return slices.Contains([]string{"os", "net", "time", "sync", "sync/atomic", "context", "io/fs", "os/exec", "syscall"},
				imported) || strings.HasPrefix(imported, "net/")
		},
		reason: "the core is stepped: files, sockets, clocks and goroutines are the business of those who call it",
	},
	{
		name: "core imports only core and the standard library", from: own(core),
		forbid: func(_, imported string) bool {
			if l := local(imported); l != "" {
				return !slices.Contains(core, l)
			}
			return strings.Contains(strings.SplitN(imported, "/", 2)[0], ".")
		},
		reason: "the vocabulary must not depend on how it is stored or sent",
	},
	{
		name: "ports import core and ports", from: own(ports),
		forbid: func(_, imported string) bool {
			l := local(imported)
			return l != "" && !slices.Contains(core, l) && !slices.Contains(ports, l)
		},
		reason: "a port that knows an adapter is no port",
	},
	{
		name: "adapters import core, ports and tools, not each other", from: own(adapters),
		forbid: func(pkg, imported string) bool {
			l := local(imported)
			return l != "" && l != pkg && l != path.Dir(pkg) && !slices.Contains(core, l) && !slices.Contains(ports, l) && !slices.Contains(tools, l)
		},
		reason: "adapters are exchanged one by one; services put them together. (meta implements control's port by structure)",
	},
	{
		name: "nothing imports commands", from: func(string) bool { return true },
		forbid: func(_, imported string) bool { return strings.HasPrefix(local(imported), "cmd/") },
		reason: "commands are wiring",
	},
	{
		name: "only driver speaks CSI",
		from: func(pkg string) bool {
			return strings.HasPrefix(pkg, "pkg/") && pkg != "pkg/driver" || strings.HasPrefix(pkg, "cmd/")
		},
		forbid: func(_, imported string) bool {
			return strings.HasPrefix(imported, "github.com/container-storage-interface/")
		},
		reason: "the specification changes; what we keep and do must not change with it",
	},
	{
		name: "only metrics knows Prometheus", from: func(pkg string) bool { return pkg != "pkg/metrics" },
		forbid: func(_, imported string) bool { return strings.HasPrefix(imported, "github.com/prometheus/") },
		reason: "measuring is injected where it is wanted",
	},
	{
		name: "gRPC stays at the edge",
		from: func(pkg string) bool {
			return !slices.Contains([]string{"pkg/driver", "pkg/admin", "pkg/admin/adminpb", "pkg/clusterapi", "pkg/rpcerr", "pkg/metrics"}, pkg) &&
				strings.HasPrefix(pkg, "pkg/")
		},
		forbid: func(_, imported string) bool {
			return strings.HasPrefix(imported, "google.golang.org/grpc") || strings.HasPrefix(imported, "google.golang.org/protobuf")
		},
		reason: "transport types in inner layers tie the use cases to one transport",
	},
	{
		name: "no process exits from a library", from: func(pkg string) bool { return strings.HasPrefix(pkg, "pkg/") },
		forbid: func(_, imported string) bool { return imported == "log" },
		reason: "log.Fatal ends the process; libraries return errors and log with slog",
	},
	{
		name: "suites are for tests", from: func(pkg string) bool { return !slices.Contains(suites, pkg) },
		forbid: func(_, imported string) bool { return slices.Contains(suites, local(imported)) },
		reason: "a suite in the product drags package testing into it",
	},
}

type file struct {
	pkg, path string
	ast       *ast.File
	lines     int
	test      bool
	generated bool
}

func sources(t *testing.T) []file {
	t.Helper()
	var files []file
	fset := token.NewFileSet()
	for _, top := range []string{"cmd", "pkg", "test", "sanity", "deploy"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(p, ".go") {
				return err
			}
			tree, err := parser.ParseFile(fset, p, nil, parser.ParseComments)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, p)
			if err != nil {
				return err
			}
			rel = filepath.ToSlash(rel)
			files = append(files, file{
				pkg: path.Dir(rel), path: rel, ast: tree, lines: countLines(t, p),
				test: strings.HasSuffix(rel, "_test.go"), generated: ast.IsGenerated(tree),
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func countLines(t *testing.T, name string) int {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		n++
	}
	return n
}

func TestImports(t *testing.T) {
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		for _, spec := range f.ast.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rules {
				if r.from(f.pkg) && r.forbid(f.pkg, imported) {
					t.Errorf("%s imports %s: %s\n\tbecause %s", f.path, imported, r.name, r.reason)
				}
			}
		}
	}
}

// TestRulesBite makes sure that each rule forbids what it is there for.
func TestRulesBite(t *testing.T) {
	wrong := map[string][2]string{
		"core does no I/O": {"pkg/layer", "time"},
		"core imports only core and the standard library":       {"pkg/volume", "google.golang.org/grpc"},
		"ports import core and ports":                           {"pkg/block", module + "pkg/extentstore"},
		"adapters import core, ports and tools, not each other": {"pkg/mount", module + "pkg/extentstore"},
		"nothing imports commands":                              {"pkg/admin", module + "cmd/ballastd"},
		"only driver speaks CSI":                                {"pkg/control", "github.com/container-storage-interface/spec/lib/go/csi"},
		"only metrics knows Prometheus":                         {"pkg/agent", "github.com/prometheus/client_golang/prometheus"},
		"gRPC stays at the edge":                                {"pkg/control", "google.golang.org/grpc/codes"},
		"no process exits from a library":                       {"pkg/meta", "log"},
		"suites are for tests":                                  {"pkg/agent", module + "pkg/block/blocktest"},
	}
	for _, r := range rules {
		w, ok := wrong[r.name]
		if !ok {
			t.Errorf("rule %q has no example of what it forbids", r.name)
			continue
		}
		if !r.from(w[0]) || !r.forbid(w[0], w[1]) {
			t.Errorf("rule %q lets %s import %s", r.name, w[0], w[1])
		}
	}
}

// TestEveryPackageIsPlaced makes sure that a new package is given its place in the architecture.
func TestEveryPackageIsPlaced(t *testing.T) {
	placed := slices.Concat(core, ports, adapters, services, tools, suites, []string{"pkg/admin/adminpb"})
	seen := map[string]bool{}
	for _, f := range sources(t) {
		if strings.HasPrefix(f.pkg, "pkg/") && !seen[f.pkg] {
			seen[f.pkg] = true
			if !slices.Contains(placed, f.pkg) {
				t.Errorf("%s is in none of core, ports, adapters, services, tools: give it a place in ARCHITECTURE.md and here", f.pkg)
			}
		}
	}
	for _, p := range placed {
		if !seen[p] {
			t.Errorf("%s is placed but does not exist", p)
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	docs := map[string]bool{}
	for _, f := range sources(t) {
		if !f.test || f.ast.Doc != nil {
			docs[f.pkg] = docs[f.pkg] || f.ast.Doc != nil || f.generated
		}
	}
	for pkg, ok := range docs {
		if !ok {
			t.Errorf("%s has no package comment", pkg)
		}
	}
}

func TestFilesAreShort(t *testing.T) {
	const most = 650 // "about 600"
	for _, f := range sources(t) {
		if !f.test && !f.generated && f.lines > most {
			t.Errorf("%s has %d lines; a room that holds two things is split", f.path, f.lines)
		}
	}
}
