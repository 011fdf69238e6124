package replication

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/volume"
)

var rewrite = flag.Bool("rewrite", false, "write what happens into the scripts of testdata")

// TestScripts runs the scripts in testdata: lines that say what happens, then, after "----", what the machines do. Blank
// lines separate the steps. The commands are those of script.do.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := runScript(t, string(want))
			if *rewrite {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(want) {
				t.Errorf("%s differs; run with -rewrite and look at the difference:\n%s", name, got)
			}
		})
	}
}

// runScript returns the script with its outputs replaced by what happened.
func runScript(t *testing.T, text string) string {
	var out strings.Builder
	s := &script{t: t}
	for _, step := range strings.Split(strings.TrimRight(text, "\n"), "\n\n") {
		if out.Len() > 0 {
			out.WriteString("\n")
		}
		commands, _, has := strings.Cut(step+"\n", "----\n")
		out.WriteString(commands)
		for _, line := range strings.Split(strings.TrimSpace(commands), "\n") {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				s.do(strings.Fields(line))
			}
		}
		if s.w == nil || !has && len(s.w.log) == 0 {
			continue
		}
		out.WriteString("----\n")
		for _, l := range s.w.log {
			out.WriteString(strings.TrimRight(l, " ") + "\n")
		}
		s.w.log = nil
	}
	return out.String()
}

type script struct {
	t *testing.T
	w *world
}

func (s *script) number(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *script) change(c Change) {
	if err := s.w.change(c); err != nil {
		s.w.printf("refused: %v", err)
	}
}

// do carries out one command and lets everything happen that follows from it at once.
func (s *script) do(f []string) {
	w := s.w
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	has := func(flag string) bool {
		for _, a := range f[1:] {
			if a == flag {
				return true
			}
		}
		return false
	}
	switch f[0] {
	case "volume": // volume REPLICAS SIZE: a volume whose replicas are r1, r2 … on n1, n2 …
		s.w = newWorld(int(s.number(f[1])), s.number(f[2]))
		return
	case "trace": // shows the messages, until "trace off"
		w.trace = arg(1) != "off"
	case "attach": // attach NODE [kept] [fence-only]
		if err := w.attach(volume.NodeID(f[1]), EngineConfig{DeviceKept: has("kept"), FenceOnly: has("fence-only")}); err != nil {
			w.printf("refused: %v", err)
		}
	case "kill": // the engine's process ends
		w.e = nil
		for _, h := range w.hosts {
			h.conn++
		}
	case "detach": // detach [force|silent]
		if has("force") || has("silent") {
			s.change(Change{Detach: &Detach{Silent: has("silent")}})
			break
		}
		w.e.Detach(w.now)
		w.effects()
		w.run()
		s.change(Change{Detach: &Detach{Clean: true}})
	case "write": // write OFFSET TEXT [fua]
		w.tag++
		w.e.Write(w.now, w.tag, s.number(f[1]), []byte(f[2]), has("fua"))
	case "zero": // zero OFFSET LENGTH
		w.tag++
		w.e.Zero(w.now, w.tag, s.number(f[1]), s.number(f[2]), false)
	case "read": // read OFFSET LENGTH
		w.tag++
		w.e.Read(w.now, w.tag, s.number(f[1]), s.number(f[2]), nil)
	case "flush":
		w.tag++
		w.e.Flush(w.now, w.tag)
	case "cancel": // cancel TAG
		w.e.Cancel(w.now, uint64(s.number(f[1])))
	case "cut": // cut REPLICA: nothing comes through, and the engine is told
		w.host(f[1]).cut = true
		w.disconnect(w.host(f[1]))
	case "join": // join REPLICA: the network is back
		w.host(f[1]).cut = false
		w.connect(w.e, w.host(f[1]))
	case "power": // power REPLICA: its host loses power and starts again; what was not synced is lost
		h := w.host(f[1])
		h.store.power()
		w.boot(h)
		w.disconnect(h)
		w.connect(w.e, h)
	case "restart": // restart REPLICA: its process starts again
		h := w.host(f[1])
		w.boot(h)
		w.disconnect(h)
		w.connect(w.e, h)
	case "down": // down REPLICA: its host loses power and stays away
		h := w.host(f[1])
		h.store.power()
		h.up = false
		w.disconnect(h)
	case "up": // up REPLICA
		w.boot(w.host(f[1]))
		w.connect(w.e, w.host(f[1]))
	case "disk": // disk REPLICA [SIZE]: it comes back on a new, empty disk
		h := w.host(f[1])
		size := h.store.size
		if len(f) > 2 {
			size = s.number(f[2])
		}
		h.store = newMemStore(size)
		h.incarnation += 1000
		w.boot(h)
		w.disconnect(h)
		w.connect(w.e, h)
	case "hang": // hang REPLICA: its disk does not answer
		w.host(f[1]).hang = true
	case "resume": // resume REPLICA: the disk goes on with what it was given
		h := w.host(f[1])
		h.hang = false
		for _, op := range h.pending {
			w.queue = append(w.queue, func() { w.store(w.e, h, op) })
		}
		h.pending = nil
	case "failsync": // failsync REPLICA [off]: its syncs fail
		w.host(f[1]).store.failSync = !has("off")
	case "failio": // failio REPLICA [off]: everything on its disk fails
		w.host(f[1]).store.failIO = !has("off")
	case "failread": // failread REPLICA [off]: its reads fail
		w.host(f[1]).store.failRead = !has("off")
	case "rot": // rot REPLICA OFFSET: what is there, in snapshots also, cannot be read any more
		off := uint32(s.number(f[2]))
		w.host(f[1]).store.rot.AddRange(off, off+1)
	case "full": // full REPLICA [off]: it has no room to grow
		w.host(f[1]).store.full = !has("off")
	case "controllers": // controllers down|up|late (late: they apply, and the answer is lost)
		w.down, w.late = f[1] == "down", f[1] == "late"
	case "advance": // advance MILLISECONDS
		w.advance(Now(s.number(f[1])) * Millisecond)
	case "add": // add REPLICA SIZE: a new, empty one
		h := w.addHost(f[1], s.number(f[2]))
		s.change(Change{AddReplica: &Member{ID: h.id, Node: h.node, Pool: "p"}})
		w.connect(w.e, h)
	case "drop": // drop REPLICA: out of the record
		s.change(Change{DropReplica: &DropReplica{ID: volume.ReplicaID(f[1])}})
	case "evict": // evict REPLICA: out of the in-sync set
		w.e.Evict(w.now, volume.ReplicaID(f[1]))
	case "snapshot": // snapshot NAME [group]
		s.change(Change{Prepare: &Prepare{Snapshot: volume.SnapshotID(f[1])}})
		w.e.Barrier(w.now, *w.m.Barrier, has("group"))
	case "abort": // the pending snapshot is given up
		s.change(Change{AbortBarrier: &AbortBarrier{Number: w.m.Barrier.Number}})
	case "cut-group":
		w.e.Cut(w.now, w.m.Barrier.Number)
	case "release-group":
		w.e.Release(w.now, w.m.Barrier.Number)
	case "expand": // expand SIZE
		s.change(Change{ExpandIntent: &ExpandIntent{Target: s.number(f[1])}})
	case "minInSync":
		s.change(Change{SetMinInSync: &SetMinInSync{MinInSync: int(s.number(f[1]))}})
	case "tombstone":
		s.change(Change{Tombstone: &Tombstone{}})
	case "salvage": // salvage REPLICA
		s.change(Change{Salvage: &Salvage{ID: volume.ReplicaID(f[1]), Seen: w.m.ConfigVersion}})
	case "status":
		for _, c := range w.e.Status().Conditions {
			w.printf("%s %s: %s", c.Severity, c.Reason, c.Message)
		}
	case "show": // the record, and what each replica has: * marks what a power cut would lose
		s.show()
	default:
		s.t.Fatalf("no command %q", f[0])
	}
	if w.e != nil {
		w.effects()
	}
	w.run()
}

func (s *script) show() {
	w := s.w
	w.printf("epoch %d version %d isr %v", w.m.Epoch, w.m.ConfigVersion, w.m.ISR())
	for _, h := range w.hosts {
		st, err := ReadState(h.store.state)
		if err != nil {
			s.t.Fatal(err)
		}
		line := fmt.Sprintf("%s %-5s v%d ", h.id, st.Role, st.ConfigVersion)
		for off := int64(0); off < h.store.size; off += w.g.Block {
			c := h.store.data[off]
			if c == 0 {
				c = '.'
			}
			line += string(c)
			if string(h.store.data[off:off+w.g.Block]) != string(h.store.disk[off:off+w.g.Block]) {
				line += "*"
			}
		}
		if !h.store.wil.Empty() {
			line += fmt.Sprintf(" wil=%v", runsOf(&h.store.wil))
		}
		for _, t := range h.store.tags {
			line += fmt.Sprintf(" missed[%s since %d]=%v", t.Peer, t.Since, runsOf(h.store.missed[t.Peer]))
		}
		for _, l := range h.store.snaps {
			line += fmt.Sprintf(" %s#%d", l.ID, l.Number)
		}
		w.printf("%s", line)
	}
}
