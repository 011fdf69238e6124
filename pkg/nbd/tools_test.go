package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
)

// The tests of this file use other implementations: libnbd (nbdinfo, nbdcopy, fio's engine) and QEMU.

// tool runs a program to its end and returns what it prints.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Stderr = t.TempDir(), &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

// sparse is a device in memory that knows what it holds, in chunks.
type sparse struct {
	*blocktest.Mem
	chunk int64
}

func (d sparse) extents(ctx context.Context, off, n int64, fn func(off, n int64) error) error {
	p := make([]byte, d.chunk)
	for at := off - off%d.chunk; at < off+n; at += d.chunk {
		b := p[:min(d.chunk, d.Size()-at)]
		if err := d.ReadAt(ctx, b, at); err != nil {
			return err
		}
		if len(bytes.Trim(b, "\x00")) == 0 {
			continue
		}
		from, to := max(at, off), min(at+int64(len(b)), off+n)
		if err := fn(from, to-from); err != nil {
			return err
		}
	}
	return nil
}

// filled is a device of size bytes with random data at every fourth 64 KiB, and that data.
func filled(t *testing.T, size int64) (sparse, []byte) {
	t.Helper()
	d := sparse{blocktest.NewMem(size), 64 << 10}
	img := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	for at := int64(0); at < size; at += 4 * d.chunk {
		_, _ = rng.Read(img[at : at+d.chunk])
	}
	ok(t, d.WriteAt(t.Context(), img[:min(size, block.MaxIO)], 0))
	return d, img
}

func contents(t *testing.T, d block.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	for at := 0; at < len(b); at += block.MaxIO {
		ok(t, d.ReadAt(t.Context(), b[at:min(len(b), at+block.MaxIO)], int64(at)))
	}
	return b
}

// peer is a server and how other implementations are told of it.
type peer struct {
	*testServer
	tlsDir string
}

// uri is what libnbd takes.
func (p peer) uri(name string) string {
	if p.tlsDir != "" {
		return "nbds://" + p.addr + "/" + name + "?tls-certificates=" + p.tlsDir
	}
	return "nbd+unix:///" + name + "?socket=" + p.addr
}

// qemu is the options of QEMU's tools for an export.
func (p peer) qemu(name string) []string {
	if p.tlsDir == "" {
		return []string{"--image-opts", "driver=nbd,server.type=unix,server.path=" + p.addr + ",export=" + name}
	}
	host, port, _ := strings.Cut(p.addr, ":")
	return []string{
		"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + p.tlsDir,
		"--image-opts", "driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + port + ",tls-creds=tls0,export=" + name,
	}
}

// peers runs a test on a Unix socket, and with TLS over TCP.
func peers(t *testing.T, o Options, exports func(t *testing.T) []Export, run func(t *testing.T, p peer)) {
	t.Run("unix", func(t *testing.T) { run(t, peer{testServer: start(t, o, exports(t)...)}) })
	t.Run("tls", func(t *testing.T) {
		dir, server, _ := authority(t)
		o := o
		o.TLS = server
		run(t, peer{start(t, o, exports(t)...), dir})
	})
}

func TestNbdinfo(t *testing.T) {
	var dev sparse
	peers(t, Options{}, func(t *testing.T) []Export {
		dev, _ = filled(t, 8*mib)
		return []Export{
			{Name: "disk", Description: "a disk", Device: dev, Extents: dev.extents},
			{Name: "snap shot", Device: dev, ReadOnly: true, Extents: dev.extents}, {Name: "plain", Device: dev},
		}
	}, func(t *testing.T, p peer) {
		var info struct {
			Protocol   string
			TLS        bool
			Structured bool
			Exports    []map[string]any
		}
		ok(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", p.uri("disk"))), &info))
		want := map[string]any{
			"export-name": "disk", "description": "a disk", "export-size": float64(8 * mib), "is_read_only": false, "can_flush": true, "can_fua": true,
			"can_trim": true, "can_zero": true, "can_fast_zero": true, "can_multi_conn": true, "can_df": true, "can_cache": false, "is_rotational": false,
			"block_size_minimum": float64(1), "block_size_preferred": float64(block.Size), "block_size_maximum": float64(block.MaxIO),
		}
		if len(info.Exports) != 1 || info.Protocol != "newstyle-fixed" || !info.Structured || info.TLS != (p.tlsDir != "") {
			t.Fatalf("nbdinfo: %+v", info)
		}
		for k, v := range want {
			if got := info.Exports[0][k]; got != v {
				t.Errorf("nbdinfo: %s is %v, want %v", k, got, v)
			}
		}
		tool(t, "nbdinfo", "--is", "read-only", p.uri("snap%20shot")) // the exit code tells
		list := tool(t, "nbdinfo", "--list", p.uri(""))
		for _, name := range []string{"disk", "snap shot", "plain"} {
			if !strings.Contains(list, `export="`+name+`"`) {
				t.Errorf("nbdinfo --list does not show %q:\n%s", name, list)
			}
		}
		var runs []struct {
			Offset, Length int64
			Type           int
		}
		ok(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--map", "--json", p.uri("disk"))), &runs))
		for i, r := range runs {
			if want := int64(64<<10 + 128<<10*(i%2)); r.Length != want || r.Type != 3*(i%2) {
				t.Errorf("run %d: %+v", i, r)
			}
		}
		if len(runs) != 64 {
			t.Errorf("nbdinfo --map shows %d runs, want 64", len(runs))
		}
	})
}

func TestNbdcopy(t *testing.T) {
	var from, to sparse
	var img []byte
	peers(t, Options{}, func(t *testing.T) []Export {
		from, img = filled(t, 16*mib)
		to = sparse{blocktest.NewMem(16 * mib), 64 << 10}
		return []Export{{Name: "from", Device: from, ReadOnly: true, Extents: from.extents}, {Name: "to", Device: to, Extents: to.extents}}
	}, func(t *testing.T, p peer) {
		file := filepath.Join(t.TempDir(), "image")
		tool(t, "nbdcopy", p.uri("from"), file)
		got, err := os.ReadFile(file)
		ok(t, err)
		if !bytes.Equal(got, img) {
			t.Error("nbdcopy to a file made something else")
		}
		tool(t, "nbdcopy", "--flush", "--destination-is-zero", file, p.uri("to"))
		if !bytes.Equal(contents(t, to), img) {
			t.Error("nbdcopy from a file made something else")
		}
		if n := to.Allocated(); n > 16*mib/4 {
			t.Errorf("the copy occupies %d bytes: holes were filled", n)
		}
		ok(t, to.Zero(t.Context(), 0, to.Size()))
		tool(t, "nbdcopy", "--connections=4", p.uri("from"), p.uri("to"))
		if !bytes.Equal(contents(t, to), img) {
			t.Error("nbdcopy between exports made something else")
		}
	})
}

func TestQEMU(t *testing.T) {
	var dev sparse
	peers(t, Options{}, func(t *testing.T) []Export {
		dev = sparse{blocktest.NewMem(16 * mib), 64 << 10}
		return []Export{{Name: "disk", Device: dev, Extents: dev.extents}, {Name: "ro", Device: dev, ReadOnly: true}}
	}, func(t *testing.T, p peer) {
		io := func(export string, commands ...string) string {
			var args []string
			if export == "ro" {
				args = append(args, "-r")
			}
			for _, c := range commands {
				args = append(args, "-c", c)
			}
			return tool(t, "qemu-io", append(args, p.qemu(export)...)...)
		}
		out := io("disk", "write -P 0x11 0 1M", "write -P 0x22 -f 1M 64k", "write -z 64k 64k", "write -z -u 128k 64k", "discard 192k 64k", "flush",
			"read -P 0x11 0 64k", "read -P 0 64k 192k", "read -P 0x11 256k 768k", "read -P 0x22 1M 64k", "aio_write -P 0x33 3M 1M", "aio_write -P 0x44 4M 1M",
			"aio_flush", "read -P 0x33 3M 1M", "read -P 0x44 4M 1M", "write -P 0x55 5000001 777", "read -P 0x55 5000001 777")
		if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("qemu-io:\n%s", out)
		}
		if out := io("ro", "read -P 0x11 0 64k"); strings.Contains(out, "failed") {
			t.Errorf("qemu-io on a read-only export:\n%s", out)
		}
		var runs []struct {
			Start, Length int64
			Data, Zero    bool
		}
		ok(t, json.Unmarshal([]byte(tool(t, "qemu-img", append([]string{"map", "--output=json"}, p.qemu("disk")...)...)), &runs))
		at, img := int64(0), contents(t, dev)
		for _, r := range runs {
			zero := len(bytes.Trim(img[r.Start:r.Start+r.Length], "\x00")) == 0
			if r.Start != at || r.Zero && !zero || r.Data == r.Zero {
				t.Errorf("qemu-img map: %+v; reads as zeros: %v", r, zero)
			}
			at += r.Length
		}
		if at != dev.Size() || len(runs) < 5 {
			t.Errorf("qemu-img map shows %d bytes in %d runs", at, len(runs))
		}
		file := filepath.Join(t.TempDir(), "image")
		convert := append([]string{"convert", "-O", "raw"}, p.qemu("disk")...)
		tool(t, "qemu-img", append(convert, file)...)
		got, err := os.ReadFile(file)
		ok(t, err)
		if !bytes.Equal(got, img) {
			t.Error("qemu-img convert made something else")
		}
	})
}

// TestFioVerify writes blocks that fio recognises, at depth, and has it read them. Its engine refuses certificates.
func TestFioVerify(t *testing.T) {
	p := peer{testServer: start(t, Options{}, Export{Name: "disk", Device: blocktest.NewMem(32 * mib)})}
	for _, args := range [][]string{
		{"--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=32", "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--fsync=64"},
		{"--rw=randtrim", "--bs=4k", "--iodepth=8", "--size=4M"},
	} {
		tool(t, "fio", append([]string{"--name=job", "--ioengine=nbd", "--uri=" + p.uri("disk")}, args...)...)
	}
}

// TestKilledClient kills a client that has many requests in flight: nothing of it is left, and others are served.
func TestKilledClient(t *testing.T) {
	var dev *blocktest.Faulty
	peers(t, Options{}, func(*testing.T) []Export {
		dev = blocktest.NewFaulty(blocktest.NewMem(64 * mib))
		return []Export{{Name: "disk", Device: dev}}
	}, func(t *testing.T, p peer) {
		image := filepath.Join(t.TempDir(), "image")
		ok(t, os.WriteFile(image, bytes.Repeat([]byte{1}, 64*mib), 0o600))
		before := serving()
		for op, args := range map[blocktest.Op][]string{blocktest.Read: {p.uri("disk"), "null:"}, blocktest.Write: {image, p.uri("disk")}} {
			dev.Set(op, blocktest.Fault{Hang: true, Skip: 3})
			cmd := exec.CommandContext(t.Context(), "nbdcopy", args...)
			ok(t, cmd.Start())
			wait(t, func() bool { return dev.Hanging(op) > 8 })
			ok(t, cmd.Process.Kill())
			_ = cmd.Wait()
			wait(t, func() bool { return dev.Hanging(op) == 0 })
			settled(t, before)
			dev.Set(op, blocktest.Fault{})
			tool(t, "nbdinfo", p.uri("disk"))
		}
	})
}
