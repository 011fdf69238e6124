package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// tun is the device of a node through which delayed packets leave and arrive.
	tun = "slow0"
	// maxPacket is what a packet of the device is at most, in bytes.
	maxPacket = 64 << 10
	// maxQueued bounds the packets that are on their way from one node to another; more are dropped, as routers do.
	maxQueued = 2048
)

// Delay holds back every packet from one node to another for a time between least and most; their order is kept. The
// other direction is left. A most of 0 ends it, as HealAll does; what is on its way still arrives.
//
// The packets go by a device of which this process is the other end: not every kernel has netem.
func (l *Lab) Delay(from, to int, least, most time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.delay(from, to, least, most)
}

func (l *Lab) delay(from, to int, least, most time.Duration) error {
	key := [2]int{from, to}
	if most <= 0 {
		if l.slow[key] == nil {
			return nil
		}
		l.slow[key].set(0, 0)
		return run("ip", "-n", l.nodes[from].Namespace, "route", "flush", l.nodes[to].Addr.String()+"/32", "dev", tun)
	}
	for _, i := range key {
		if err := l.openTun(i); err != nil {
			return err
		}
	}
	if l.slow[key] == nil {
		p := &path{to: l.tuns[to], queue: make(chan packet, maxQueued)}
		l.slow[key] = p
		l.forward.Go(p.deliver)
	}
	l.slow[key].set(least, most)
	return run("ip", "-n", l.nodes[from].Namespace, "route", "replace", l.nodes[to].Addr.String()+"/32", "dev", tun,
		"src", l.nodes[from].Addr.String())
}

// path is the slow way from one node to another.
type path struct {
	to    *os.File
	queue chan packet

	mu          sync.Mutex
	least, most time.Duration
}

type packet struct {
	due   time.Time
	bytes []byte
}

func (p *path) set(least, most time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.least, p.most = least, most
}

// take puts a packet on its way.
func (p *path) take(b []byte) {
	p.mu.Lock()
	wait := p.least
	if p.most > p.least {
		wait += rand.N(p.most - p.least)
	}
	p.mu.Unlock()
	select {
	case p.queue <- packet{time.Now().Add(wait), append([]byte(nil), b...)}:
	default:
	}
}

// deliver ends when the queue is closed.
func (p *path) deliver() {
	for k := range p.queue {
		time.Sleep(time.Until(k.due))
		_, _ = p.to.Write(k.bytes) // a node that is being taken down takes none
	}
}

// openTun makes the device of a node, once.
func (l *Lab) openTun(i int) error {
	if l.tuns[i] != nil {
		return nil
	}
	n := l.nodes[i]
	var f *os.File
	err := inside(n.Namespace, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(tun)
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		f = os.NewFile(uintptr(fd), tun)
		// Packets come in by another device than answers leave by.
		for _, dev := range []string{"all", tun} {
			if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", dev, "rp_filter"), []byte("0"), 0); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("device %s in %s: %w", tun, n.Namespace, err)
	}
	if err := run("ip", "-n", n.Namespace, "link", "set", tun, "up"); err != nil {
		return errors.Join(err, f.Close())
	}
	l.tuns[i] = f
	l.forward.Go(func() { l.read(i, f) })
	return nil
}

// read takes the packets that a node sends by its device; it ends when the device is closed.
func (l *Lab) read(from int, f *os.File) {
	b := make([]byte, maxPacket)
	for {
		n, err := f.Read(b)
		if err != nil {
			return
		}
		if n < 20 || b[0]>>4 != 4 {
			continue
		}
		dst := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(b[16:20]))))
		for to, node := range l.nodes {
			if node.Addr != dst {
				continue
			}
			l.mu.Lock()
			if p := l.slow[[2]int{from, to}]; p != nil && !l.closed {
				p.take(b[:n])
			}
			l.mu.Unlock()
		}
	}
}

// closeTuns ends the forwarding.
func (l *Lab) closeTuns() error {
	l.mu.Lock()
	l.closed = true
	var errs []error
	for _, p := range l.slow {
		close(p.queue)
	}
	for _, f := range l.tuns {
		errs = append(errs, f.Close())
	}
	clear(l.slow)
	clear(l.tuns)
	l.mu.Unlock()
	l.forward.Wait()
	return errors.Join(errs...)
}

// inside runs fn with its thread in a network namespace. The thread comes back: were it to end, the kernel would end the
// children that were started on it.
func inside(namespace string, fn func() error) error {
	runtime.LockOSThread()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer here.Close()
	there, err := os.Open("/run/netns/" + namespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = fn()
	if e := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); e != nil {
		return errors.Join(err, e) // the thread stays locked: nobody else may run on it
	}
	runtime.UnlockOSThread()
	return err
}
