package e2e

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/test/harness"
)

// exported is a `ballastctl volume export` that runs.
type exported struct {
	cmd *exec.Cmd
	uri string
}

func (b *bed) export(t *testing.T, what ...string) *exported {
	t.Helper()
	cmd := exec.CommandContext(b.ctx, bin.Ballastctl, append([]string{"--socket", b.AdminSocket(), "volume", "export"}, what...)...)
	out, err := cmd.StdoutPipe()
	b.must(t, err)
	cmd.Stderr = t.Output()
	b.must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("export %v: %v, %v", what, err, cmd.Wait())
	}
	return &exported{cmd, strings.TrimSpace(line)}
}

// end interrupts it, like a person.
func (x *exported) end(t *testing.T) {
	t.Helper()
	if err := x.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := x.cmd.Wait(); err != nil {
		t.Errorf("an interrupted export: %v", err)
	}
}

// image is what nbdcopy makes of an export.
func (x *exported) image(ctx context.Context, t *testing.T) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if out, err := exec.CommandContext(ctx, "nbdcopy", x.uri, name).CombinedOutput(); err != nil {
		t.Fatalf("nbdcopy: %v\n%s", err, out)
	}
	img, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestExport copies a snapshot, and a volume in use, out of a running daemon; a killed daemon leaves nothing of it.
func TestExport(t *testing.T) {
	b := newBed(t, time.Minute)
	c := &harness.Claim{Name: "disk", Size: 64 * mib}
	b.must(t, b.o.Up(b.ctx, c))
	dev := b.o.TargetPath(c)
	write := func(seed byte) {
		f, err := os.OpenFile(dev, os.O_WRONLY|os.O_SYNC, 0)
		b.must(t, err)
		for at := int64(0); at < 64*mib; at += 8 * mib {
			_, err := f.WriteAt(bytes.Repeat([]byte{seed + byte(at/mib)}, 3*mib), at)
			b.must(t, err)
		}
		b.must(t, f.Close())
	}
	read := func() []byte {
		f, err := os.Open(dev)
		b.must(t, err)
		defer f.Close()
		all, err := io.ReadAll(f)
		b.must(t, err)
		return all
	}
	write(1)
	then := read()
	snap, err := b.o.Snapshot(b.ctx, c, "then")
	b.must(t, err)
	write(100)
	x := b.export(t, c.Name+"@then")
	if !bytes.Equal(x.image(b.ctx, t), then) {
		t.Error("the snapshot's image is not what was there when it was cut")
	}
	x.end(t)
	x = b.export(t, c.Name)
	if !bytes.Equal(x.image(b.ctx, t), read()) {
		t.Error("the volume's image is not what its user reads")
	}
	b.must(t, b.Kill())
	if err := x.cmd.Wait(); err == nil {
		t.Error("an export ended well whose daemon was killed")
	}
	b.must(t, b.Start(b.ctx))
	if left, _ := filepath.Glob(filepath.Join(b.RunDir(), "exports", "*")); len(left) > 0 {
		t.Errorf("left by the killed daemon: %v", left)
	}
	b.must(t, b.o.Again(b.ctx, c))
	x = b.export(t, c.Name)
	b.must(t, b.o.Down(b.ctx, c))
	if err := x.cmd.Wait(); err == nil {
		t.Error("an export ended well whose volume was taken away")
	}
	b.must(t, b.o.Delete(b.ctx, c))
	x = b.export(t, "@"+snap)
	b.must(t, b.o.DeleteSnapshot(b.ctx, snap))
	if !bytes.Equal(x.image(b.ctx, t), then) {
		t.Error("the image of a snapshot that was deleted meanwhile is another")
	}
	x.end(t)
	b.nothingLeft(t, c.ID())
}
