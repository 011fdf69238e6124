package replicanet

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	magic = "BALLASTR"
	// minVersion and maxVersion are the versions of the protocol that are spoken.
	minVersion, maxVersion = 1, 1

	// maxHello bounds what is sent before both sides have proved themselves, in bytes.
	maxHello = 2 << 10
	// handshakeTimeout bounds the handshake, TLS included.
	handshakeTimeout = 5 * time.Second

	// deadAfter is how long a peer's host may leave what was sent unacknowledged, or a probe of an idle connection
	// unanswered, before the connection breaks.
	deadAfter      = 4 * time.Second
	probeAfterIdle = 2 * time.Second
	probeEvery     = time.Second
)

// transport is a connection after its handshake.
type transport struct {
	peer pki.Peer // without TLS it is what the node says of itself: it has no Cluster
	out  output
	in   *bufio.Reader
	sink *sink // nil without TLS
}

// hello is the first thing that each side says, after TLS. The server's answers the client's: Min and Max are then the
// version chosen, and Refusal says why there is to be no connection.
type hello struct {
	Min, Max uint16
	Cluster  string
	From, To volume.NodeID
	Refusal  string
}

func (h hello) encode() []byte {
	b := []byte(magic)
	b = binary.LittleEndian.AppendUint16(b, h.Min)
	b = binary.LittleEndian.AppendUint16(b, h.Max)
	var rest []byte
	for _, s := range []string{h.Cluster, string(h.From), string(h.To), h.Refusal} {
		rest = appendString(rest, s)
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(len(rest)))
	return append(b, rest...)
}

func readHello(r io.Reader) (hello, error) {
	var fixed [len(magic) + 6]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return hello{}, err
	}
	if string(fixed[:len(magic)]) != magic {
		return hello{}, errors.New("the peer does not speak the replica protocol (or one side uses TLS and the other does not)")
	}
	le := binary.LittleEndian
	n := le.Uint16(fixed[len(magic)+4:])
	if n > maxHello {
		return hello{}, fmt.Errorf("greeting of %d bytes: %w", n, errWire)
	}
	rest := make([]byte, n)
	if _, err := io.ReadFull(r, rest); err != nil {
		return hello{}, err
	}
	d := reader{b: rest}
	h := hello{
		Min: le.Uint16(fixed[len(magic):]), Max: le.Uint16(fixed[len(magic)+2:]),
		Cluster: d.text(64), From: volume.NodeID(d.text(volume.MaxNodeIDLen)), To: volume.NodeID(d.text(volume.MaxNodeIDLen)),
		Refusal: d.text(maxRefusal),
	}
	if d.bad || len(d.b) > 0 {
		return hello{}, fmt.Errorf("greeting: %w", errWire)
	}
	return h, nil
}

// maxRefusal bounds a message for people, in bytes.
const maxRefusal = 512

func bounded(s string) string {
	if len(s) > maxRefusal {
		s = s[:maxRefusal]
	}
	return s
}

// secure does the TLS handshake, or none, and returns what the protocol is spoken over. cfg nil is no TLS.
func secure(ctx context.Context, tcp *net.TCPConn, cfg *tls.Config, server bool) (*transport, io.ReadWriter, *sealed, error) {
	if err := tune(tcp); err != nil {
		return nil, nil, nil, err
	}
	sock, err := newSocket(tcp)
	if err != nil {
		return nil, nil, nil, err
	}
	in := bufio.NewReaderSize(tcp, readAhead)
	if cfg == nil {
		return &transport{out: sock, in: in}, struct {
			io.Reader
			io.Writer
		}{in, tcp}, nil, nil
	}
	cfg = cfg.Clone()
	// Small records at first serve browsers.
	cfg.DynamicRecordSizingDisabled = true
	s := &sink{TCPConn: tcp, sock: sock, in: in}
	var t *tls.Conn
	if server {
		t = tls.Server(s, cfg)
	} else {
		t = tls.Client(s, cfg)
	}
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, nil, nil, err
	}
	out := &sealed{tls: t, out: s}
	return &transport{out: out, in: bufio.NewReaderSize(t, maxRecord), sink: s}, t, out, nil
}

// begin ends the handshake: from now on what TLS writes is gathered.
func (s *sealed) begin() {
	if s != nil {
		s.out.mu.Lock()
		s.out.gather = true
		s.out.mu.Unlock()
	}
}

// tune sets what makes a dead peer noticed.
func tune(tcp *net.TCPConn) error {
	if err := tcp.SetNoDelay(true); err != nil {
		return err
	}
	if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: probeAfterIdle, Interval: probeEvery, Count: 3}); err != nil {
		return err
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter/time.Millisecond))
	})
	return errors.Join(err, set)
}

// identity is the node that the TLS peer proved to be.
func identity(t *sealed) (pki.Peer, error) {
	p, err := pki.PeerIn(t.tls.ConnectionState())
	if err == nil && p.Kind != pki.KindNode {
		err = fmt.Errorf("%s is no node: %w", p, pki.ErrRefused)
	}
	return p, err
}

// greet is the client's side of the handshake. It takes over tcp, which it closes when it fails.
func greet(ctx context.Context, tcp *net.TCPConn, cfg *tls.Config, cluster string, self, want volume.NodeID) (_ *transport, err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { tcp.Close() })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			tcp.Close()
		}
	}()
	t, rw, sealed, err := secure(ctx, tcp, cfg, false)
	if err != nil {
		return nil, err
	}
	if _, err := rw.Write(hello{Min: minVersion, Max: maxVersion, Cluster: cluster, From: self, To: want}.encode()); err != nil {
		return nil, err
	}
	h, err := readHello(t.in)
	switch {
	case err != nil:
		return nil, err
	case h.Refusal != "":
		return nil, fmt.Errorf("node %s: %s: %w", want, h.Refusal, pki.ErrRefused)
	case h.From != want || h.To != self || h.Cluster != cluster:
		return nil, fmt.Errorf("this is node %q of cluster %q, not %q of %q: %w", h.From, h.Cluster, want, cluster, pki.ErrRefused)
	case h.Min != h.Max || h.Max < minVersion || h.Max > maxVersion:
		return nil, fmt.Errorf("node %s chose version %d of the protocol, known are %d to %d: %w", want, h.Max, minVersion, maxVersion, errWire)
	}
	t.peer.Identity = pki.Node(want)
	if sealed != nil {
		if t.peer, err = identity(sealed); err != nil {
			return nil, err
		}
		if t.peer.Name != string(want) {
			return nil, fmt.Errorf("this is node %q, not %q: %w", t.peer.Name, want, pki.ErrRefused)
		}
	}
	sealed.begin()
	return t, nil
}

// welcome is the server's side. It takes over tcp, which it closes when it fails.
func welcome(ctx context.Context, tcp *net.TCPConn, cfg *tls.Config, cluster string, self volume.NodeID) (_ *transport, err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { tcp.Close() })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			tcp.Close()
		}
	}()
	t, rw, sealed, err := secure(ctx, tcp, cfg, true)
	if err != nil {
		return nil, err
	}
	h, err := readHello(t.in)
	if err != nil {
		return nil, err
	}
	answer := hello{Cluster: cluster, From: self, To: h.From, Min: min(h.Max, maxVersion)}
	answer.Max = answer.Min
	err = refusal(h, cluster, self)
	t.peer.Identity = pki.Node(h.From)
	if err == nil && sealed != nil {
		if t.peer, err = identity(sealed); err == nil && t.peer.Name != string(h.From) {
			err = fmt.Errorf("the certificate is of node %q, not %q: %w", t.peer.Name, h.From, pki.ErrRefused)
		}
	}
	if err != nil {
		answer.Refusal = bounded(err.Error())
	}
	if _, werr := rw.Write(answer.encode()); err != nil || werr != nil {
		return nil, errors.Join(err, werr)
	}
	sealed.begin()
	return t, nil
}

func refusal(h hello, cluster string, self volume.NodeID) error {
	switch {
	case h.Max < minVersion || h.Min > maxVersion || h.Min > h.Max:
		return fmt.Errorf("versions %d to %d of the protocol are asked for, known are %d to %d: %w", h.Min, h.Max, minVersion, maxVersion, errWire)
	case h.Cluster != cluster:
		return fmt.Errorf("this is cluster %q, not %q: %w", cluster, h.Cluster, pki.ErrRefused)
	case h.To != self:
		return fmt.Errorf("this is node %q, not %q: %w", self, h.To, pki.ErrRefused)
	case h.From == "":
		return fmt.Errorf("a node without a name: %w", pki.ErrRefused)
	}
	return nil
}
