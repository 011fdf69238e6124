package meta

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/disk"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// small is a filesystem of its own, and fill takes the last byte of it.
func small(t *testing.T, size int) (dir string, fill, free func()) {
	dir = t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	hog := filepath.Join(dir, "hog")
	fill = func() {
		f, err := os.OpenFile(hog, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		f.Close()
	}
	free = func() {
		if err := os.Remove(hog); err != nil {
			t.Fatal(err)
		}
	}
	return dir, fill, free
}

// The state on a filesystem that is full to the last byte: it goes on as far as it has space, then it refuses changes and is
// read; it is closed and opened, or says what to do; and nothing that was answered is lost.
func TestFullFilesystem(t *testing.T) {
	root, fill, free := small(t, 96<<20)
	dir := filepath.Join(root, "meta")
	s := open(t, dir)
	propose(t, s, node("n1", "p1"))
	made := 0
	create := func() error {
		v := newVolume(made, "p1")
		v.Size = 1 << 20
		v.Capabilities[0].MountFlags = []string{strings.Repeat("x", 4000)}
		_, err := s.Propose(t.Context(), command.CreateVolume{Volume: v})
		if err == nil {
			made++
		}
		return err
	}
	readable := func() {
		t.Helper()
		if vs, err := s.Volumes(context.Background(), "", 0); err != nil || len(vs) != made {
			t.Errorf("%d volumes of %d: %v", len(vs), made, err)
		}
	}
	for range 3 {
		if err := create(); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	var err error
	for err == nil {
		err = create()
	}
	if made < 1000 || !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), "full") {
		t.Fatalf("after %d volumes on a full filesystem: %v", made, err)
	}
	readable()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	fill()
	if _, err := Open(dir, Options{}); !errors.Is(err, disk.ErrNoSpace) || !strings.Contains(err.Error(), "delete something else") {
		t.Fatalf("open without room: %v", err)
	}
	free()
	s = open(t, dir)
	readable()
	if err := create(); err != nil {
		t.Fatal(err)
	}

	// What was kept when it was closed is enough to read it, and for nothing else.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	fill()
	s = open(t, dir)
	readable()
	if err := create(); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a change on a full filesystem: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	free()
	s = open(t, dir)
	readable()
	verify(t, s)
	var stream bytes.Buffer
	c, err := s.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Write(&stream); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	// A copy that comes in has no room either, and a new state is not begun.
	m, err := OpenMachine(filepath.Join(root, "other"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	fill()
	if err := m.Restore(bytes.NewReader(stream.Bytes())); !errors.Is(err, volume.ErrNoSpace) {
		t.Errorf("restore on a full filesystem: %v", err)
	}
	if m.Applied() != 0 || m.Failed() != nil {
		t.Errorf("a restore without room has left %d, %v", m.Applied(), m.Failed())
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	fill()
	if m, err := OpenMachine(filepath.Join(root, "new"), Options{}); !errors.Is(err, disk.ErrNoSpace) && !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a new state on a full filesystem: %v %v", m, err)
	}
}

// A log that waits for room ends its wait with the process, and nothing is applied behind the gap.
func TestWaitRoomEnds(t *testing.T) {
	root, fill, free := small(t, 64<<20)
	m, err := OpenMachine(filepath.Join(root, "meta"), Options{memTable: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	fill()
	entry := func(i uint64) Entry {
		v := newVolume(int(i), "p1")
		v.Size = 1 << 20
		v.Capabilities[0].MountFlags = []string{strings.Repeat("x", 4000)}
		var c command.Command = command.CreateVolume{Volume: v}
		if i == 1 {
			c = node("n1", "p1")
		}
		body, err := command.Encode(c)
		if err != nil {
			t.Fatal(err)
		}
		return Entry{Index: i, Kind: KindCommand, Body: body}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var i uint64
	for i = 1; m.Full() == nil; i++ {
		if err := m.WaitRoom(ctx, i); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Apply(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.WaitRoom(ctx, i-1); err != nil {
		t.Errorf("what is applied already waits: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- m.WaitRoom(ctx, i) }()
	cancel()
	if err := <-done; !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a wait that ended: %v", err)
	}
	free()
	if _, err := m.Apply(entry(i + 1)); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("the entry behind the one that waited: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
