package faultdisk

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// node is a file or directory that asks its disk first.
type node struct {
	*fs.LoopbackNode
	disk *Disk
}

// WrapChild implements fs.NodeWrapChilder.
func (n *node) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{LoopbackNode: ops.(*fs.LoopbackNode), disk: n.disk}
}

// direct I/O ends here: the buffers of this process have no alignment. Syncs are passed on.
func beneath(flags uint32) uint32 { return flags &^ syscall.O_DIRECT }

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.disk.pass(flags&syscall.O_TRUNC != 0); errno != 0 {
		return nil, 0, errno
	}
	h, f, errno := n.LoopbackNode.Open(ctx, beneath(flags))
	return n.wrap(h), f, errno
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.disk.pass(true); errno != 0 {
		return nil, nil, 0, errno
	}
	in, h, f, errno := n.LoopbackNode.Create(ctx, name, beneath(flags), mode, out)
	return in, n.wrap(h), f, errno
}

func (n *node) wrap(h fs.FileHandle) fs.FileHandle {
	if l, ok := h.(*fs.LoopbackFile); ok {
		return &file{LoopbackFile: l, disk: n.disk}
	}
	return h
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.disk.pass(true); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Mkdir(ctx, name, mode, out)
}

func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	if errno := n.disk.pass(true); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Rmdir(ctx, name)
}

func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	if errno := n.disk.pass(true); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Unlink(ctx, name)
}

func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if errno := n.disk.pass(true); errno != 0 {
		return errno
	}
	if w, ok := to.(*node); ok {
		to = w.LoopbackNode
	}
	return n.LoopbackNode.Rename(ctx, name, to, newName, flags)
}

func (n *node) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if errno := n.disk.pass(true); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Setattr(ctx, h, in, out)
}

func (n *node) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	h, f, errno := n.LoopbackNode.OpendirHandle(ctx, flags)
	if l, ok := h.(listing); ok {
		h = &dir{listing: l, disk: n.disk}
	}
	return h, f, errno
}

// listing is what a directory that is open can do.
type listing interface {
	fs.FileReaddirenter
	fs.FileSeekdirer
	fs.FileReleasedirer
	fs.FileFsyncdirer
}

// dir is an open directory that asks its disk before it syncs.
type dir struct {
	listing
	disk *Disk
}

func (d *dir) Fsyncdir(ctx context.Context, flags uint32) syscall.Errno {
	if errno := d.disk.pass(true); errno != 0 {
		return errno
	}
	return d.listing.Fsyncdir(ctx, flags)
}

// file is an open file that asks its disk first.
type file struct {
	*fs.LoopbackFile
	disk *Disk
}

// PassthroughFd implements fs.FilePassthroughFder: the kernel shall not pass us by.
func (f *file) PassthroughFd() (int, bool) { return 0, false }

func (f *file) Read(ctx context.Context, b []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if errno := f.disk.pass(false); errno != 0 {
		return nil, errno
	}
	return f.LoopbackFile.Read(ctx, b, off)
}

func (f *file) Write(ctx context.Context, b []byte, off int64) (uint32, syscall.Errno) {
	if errno := f.disk.pass(true); errno != 0 {
		return 0, errno
	}
	return f.LoopbackFile.Write(ctx, b, off)
}

func (f *file) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	if errno := f.disk.pass(true); errno != 0 {
		return errno
	}
	return f.LoopbackFile.Fsync(ctx, flags)
}

func (f *file) Allocate(ctx context.Context, off, size uint64, mode uint32) syscall.Errno {
	if errno := f.disk.pass(true); errno != 0 {
		return errno
	}
	return f.LoopbackFile.Allocate(ctx, off, size, mode)
}
