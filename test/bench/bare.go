package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block"
)

// bareCommand is the first argument of the processes that bareUp starts.
const bareCommand = "bare-copy"

// bareLanes bounds the requests at once: each has connections of its own.
const bareLanes = 32

// bareHead is what is sent of a request: offset and length, which is 0 for a flush. A copy answers with the same.
const bareHead = 16

// bare keeps three copies by the least that it takes: of a write two sends, a pwrite and two receives, on sockets that block.
// It knows no failure, order, lease, checksum or snapshot: whatever replicates synchronously here does at least its system
// calls, unless it batches them.
type bare struct {
	fileDevice
	lanes chan *lane
}

type lane struct{ copies []int }

func (b *bare) WriteAt(ctx context.Context, p []byte, off int64) error {
	return b.everywhere(p, off, func() error { return b.fileDevice.WriteAt(ctx, p, off) })
}

func (b *bare) Flush(ctx context.Context) error {
	return b.everywhere(nil, 0, func() error { return b.fileDevice.Flush(ctx) })
}

func (b *bare) Zero(context.Context, int64, int64) error { return errors.ErrUnsupported }

func (b *bare) everywhere(p []byte, off int64, here func() error) error {
	l := <-b.lanes
	defer func() { b.lanes <- l }()
	var head [bareHead]byte
	binary.LittleEndian.PutUint64(head[:], uint64(off))
	binary.LittleEndian.PutUint64(head[8:], uint64(len(p)))
	for _, c := range l.copies {
		if err := sendAll(c, head[:], p); err != nil {
			return err
		}
	}
	if err := here(); err != nil {
		return err
	}
	for _, c := range l.copies {
		if err := recvAll(c, head[:]); err != nil {
			return err
		}
	}
	return nil
}

func sendAll(fd int, head, p []byte) error {
	n, err := unix.SendmsgBuffers(fd, [][]byte{head, p}, nil, nil, unix.MSG_NOSIGNAL)
	for at := n - len(head); err == nil && at < len(p); at += n {
		n, err = unix.SendmsgN(fd, p[at:], nil, nil, unix.MSG_NOSIGNAL)
	}
	return err
}

func recvAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Read(fd, p)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// openDirect opens a file as replicas do.
func openDirect(path string) (fileDevice, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fileDevice{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fileDevice{fd}, nil
}

// blockingSocket takes a connection's descriptor away from the runtime's poller.
func blockingSocket(nc net.Conn) (int, error) {
	defer nc.Close()
	file, err := nc.(*net.TCPConn).File()
	if err != nil {
		return 0, err
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0) // Fd makes it block
	return fd, err
}

// bareCopy is what a process of its own does: it serves a copy in a file until its standard input ends.
func bareCopy(ctx context.Context, path string) error {
	file, err := openDirect(path)
	if err != nil {
		return err
	}
	defer unix.Close(file.fd)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if err := serveBare(ctx, nc, file); err != nil && !errors.Is(err, io.EOF) {
					fmt.Fprintln(os.Stderr, "bench: bare copy:", err)
				}
			}()
		}
	}()
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, l.Close())
}

func serveBare(ctx context.Context, nc net.Conn, file fileDevice) error {
	fd, err := blockingSocket(nc)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// A request is read with one system call where it has come whole. Its data, behind the head, is where direct I/O wants it.
	memory, err := unix.Mmap(-1, 0, block.Size+block.MaxIO, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(memory) }()
	request := memory[block.Size-bareHead:]
	for size := block.Size; ; {
		n, err := unix.Read(fd, request[:bareHead+size])
		switch {
		case err != nil:
			return err
		case n == 0:
			return io.EOF
		case n < bareHead:
			if err := recvAll(fd, request[n:bareHead]); err != nil {
				return err
			}
			n = bareHead
		}
		off, length := binary.LittleEndian.Uint64(request), binary.LittleEndian.Uint64(request[8:])
		if length > block.MaxIO {
			return fmt.Errorf("request of %d bytes", length)
		}
		if length == 0 {
			err = file.Flush(ctx)
		} else {
			size = int(length)
			if err = recvAll(fd, request[min(n, bareHead+size):bareHead+size]); err == nil {
				err = file.WriteAt(ctx, request[bareHead:bareHead+size], int64(off))
			}
		}
		if err == nil {
			err = sendAll(fd, request[:bareHead], nil)
		}
		if err != nil {
			return err
		}
	}
}

// bareUp serves three bare copies over NBD.
func bareUp(ctx context.Context, dir string) (_ *service, err error) {
	var downs teardown
	defer func() {
		if err != nil {
			err = errors.Join(err, downs.all())
		}
	}()
	b := &bare{lanes: make(chan *lane, bareLanes)}
	for range bareLanes {
		b.lanes <- &lane{}
	}
	pids := []int{os.Getpid()}
	for i := range 3 {
		path, err := backingFile(ctx, dir, "copy"+strconv.Itoa(i))
		if err != nil {
			return nil, err
		}
		if i == 0 {
			if b.fileDevice, err = openDirect(path); err != nil {
				return nil, err
			}
			downs = append(downs, func() error { return unix.Close(b.fd) })
			continue
		}
		address, pid, stop, err := startSelf(bareCommand, path)
		if err != nil {
			return nil, err
		}
		downs, pids = append(downs, stop), append(pids, pid)
		for range bareLanes {
			nc, err := net.Dial("tcp", address)
			if err != nil {
				return nil, err
			}
			fd, err := blockingSocket(nc)
			if err != nil {
				return nil, err
			}
			downs = append(downs, func() error { return unix.Close(fd) })
			l := <-b.lanes
			l.copies = append(l.copies, fd)
			b.lanes <- l
		}
	}
	socket := filepath.Join(dir, "nbd.sock")
	stop, err := serveNBD(ctx, socket, b)
	if err != nil {
		return nil, err
	}
	downs = append(downs, stop)
	return &service{nbdURI(socket), pids, downs.all}, nil
}
