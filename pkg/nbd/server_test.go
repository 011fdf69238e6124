package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const mib = 1 << 20

// testServer is a Serve that the test stops.
type testServer struct {
	network, addr string
	stop          context.CancelFunc
	done          chan error
}

// start serves on a Unix socket, or with TLS on TCP.
func start(t *testing.T, o Options, exports ...Export) *testServer {
	t.Helper()
	s := &testServer{network: "unix", addr: filepath.Join(t.TempDir(), "nbd.sock"), done: make(chan error, 1)}
	if o.TLS != nil {
		s.network, s.addr = "tcp", "127.0.0.1:0"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	l, err := net.Listen(s.network, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	go func() { s.done <- Serve(ctx, l, exports, o); close(s.done) }()
	t.Cleanup(func() {
		s.stop()
		if err := <-s.done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	})
	return s
}

func (s *testServer) dial(t *testing.T, name string, structured bool) *client {
	t.Helper()
	return mustDial(t, s.network, s.addr, name, structured, nil)
}

// authority makes a CA, and a certificate of it for 127.0.0.1, in a directory as QEMU and libnbd want it.
func authority(t *testing.T) (dir string, server, client *tls.Config) {
	t.Helper()
	dir = t.TempDir()
	write := func(name, typ string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	issue := func(serial int64, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if ca == nil {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
			ca, caKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return parsed, key
	}
	ca, caKey := issue(1, nil, nil)
	cert, key := issue(2, ca, caKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write("ca-cert.pem", "CERTIFICATE", ca.Raw)
	write("client-cert.pem", "CERTIFICATE", cert.Raw)
	write("client-key.pem", "PRIVATE KEY", pkcs8)
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	certs := []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}
	return dir, &tls.Config{Certificates: certs, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert},
		&tls.Config{Certificates: certs, RootCAs: pool, ServerName: "127.0.0.1"}
}

func TestConformance(t *testing.T) {
	_, serverTLS, clientTLS := authority(t)
	for name, c := range map[string]struct {
		structured     bool
		server, client *tls.Config
	}{"simple": {}, "structured": {structured: true}, "TLS": {true, serverTLS, clientTLS}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				s := start(t, Options{TLS: c.server}, Export{Name: "a", Device: blocktest.NewMem(size)})
				return mustDial(t, s.network, s.addr, "a", c.structured, c.client)
			})
		})
	}
}

// TestFlushCoversOtherConnections is what MULTI_CONN promises: a flush on one connection makes durable what was
// answered on another.
func TestFlushCoversOtherConnections(t *testing.T) {
	dev := blocktest.NewCrashable(mib)
	s := start(t, Options{}, Export{Device: dev})
	a, b := s.dial(t, "", true), s.dial(t, "", true)
	if a.flags&flagMultiConn == 0 {
		t.Fatal("MULTI_CONN is not advertised")
	}
	ok(t, a.WriteAt(t.Context(), []byte("hello"), 0))
	ok(t, b.Flush(t.Context()))
	got := make([]byte, 5)
	ok(t, dev.Crash(blocktest.Lose, nil).ReadAt(t.Context(), got, 0))
	if string(got) != "hello" {
		t.Errorf("after the crash: %q", got)
	}
}

// TestDurable checks that FUA makes a change durable before it is answered, and that nothing is flushed without.
func TestDurable(t *testing.T) {
	one := []byte{1}
	for name, r := range map[string]request{
		"write": {cmd: cmdWrite, length: 1}, "trim": {cmd: cmdTrim, length: 4096}, "write zeroes": {cmd: cmdWriteZeroes, length: 4096},
		"write zeroes without a hole": {cmd: cmdWriteZeroes, flags: cmdFlagNoHole, length: 4096},
	} {
		for _, fua := range []uint16{0, cmdFlagFUA} {
			dev := blocktest.NewFaulty(blocktest.NewMem(mib))
			s := start(t, Options{}, Export{Device: dev})
			r := r
			r.flags |= fua
			_, err := s.dial(t, "", false).do(t.Context(), r, one[:min(r.length, 1)*b2i(r.cmd == cmdWrite)], nil)
			ok(t, err)
			if n, _ := dev.Calls(blocktest.Flush); n != int(fua) {
				t.Errorf("%s with flags %x: %d flushes", name, r.flags, n)
			}
			if n, _ := dev.Calls(blocktest.Zero); r.flags&cmdFlagNoHole != 0 && n != 0 {
				t.Errorf("%s made a hole", name)
			}
		}
	}
}

func b2i(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestErrors goes through what requests are refused with.
func TestErrors(t *testing.T) {
	full := blocktest.NewFaulty(blocktest.NewMem(mib))
	full.Set(blocktest.Write, blocktest.Fault{Err: volume.ErrNoSpace})
	full.Set(blocktest.Read, blocktest.Fault{Err: errors.New("broken")})
	closed := blocktest.NewMem(mib)
	ok(t, closed.Close())
	all := func(_ context.Context, off, n int64, fn func(off, n int64) error) error { return fn(off, n) }
	s := start(t, Options{},
		Export{Name: "rw", Device: blocktest.NewMem(mib), Extents: all}, Export{Name: "ro", Device: blocktest.NewMem(mib), ReadOnly: true},
		Export{Name: "full", Device: full}, Export{Name: "closed", Device: closed})
	big := uint64(1) << 63
	for name, c := range map[string]struct {
		export string
		r      request
		want   errno
	}{
		"read":                               {"rw", request{cmd: cmdRead, length: 512}, 0},
		"read nothing":                       {"rw", request{cmd: cmdRead}, 0},
		"read, unfragmented":                 {"rw", request{cmd: cmdRead, length: 512, flags: cmdFlagDF}, 0},
		"read with FUA":                      {"rw", request{cmd: cmdRead, length: 512, flags: cmdFlagFUA}, 0},
		"read too much":                      {"rw", request{cmd: cmdRead, length: block.MaxIO + 1}, eInval},
		"read behind the end":                {"rw", request{cmd: cmdRead, offset: mib - 1, length: 2}, eInval},
		"read at a wild offset":              {"rw", request{cmd: cmdRead, offset: big, length: 1}, eInval},
		"read with a wild flag":              {"rw", request{cmd: cmdRead, length: 1, flags: cmdFlagNoHole}, eInval},
		"read fails":                         {"full", request{cmd: cmdRead, length: 1}, eIO},
		"read when closed":                   {"closed", request{cmd: cmdRead, length: 1}, eShutdown},
		"write behind the end":               {"rw", request{cmd: cmdWrite, offset: mib, length: 1}, eNoSpc},
		"write nothing":                      {"rw", request{cmd: cmdWrite}, 0},
		"write at a wild offset":             {"rw", request{cmd: cmdWrite, offset: big, length: 1}, eNoSpc},
		"write with a wild flag":             {"rw", request{cmd: cmdWrite, length: 1, flags: 1 << 9}, eInval},
		"write to read-only":                 {"ro", request{cmd: cmdWrite, length: 1}, ePerm},
		"write when full":                    {"full", request{cmd: cmdWrite, length: 1}, eNoSpc},
		"trim of read-only":                  {"ro", request{cmd: cmdTrim, length: 1}, ePerm},
		"trim behind the end":                {"rw", request{cmd: cmdTrim, offset: mib, length: 1}, eInval},
		"zeroes behind the end":              {"rw", request{cmd: cmdWriteZeroes, offset: mib, length: 1}, eNoSpc},
		"zeroes without hole behind the end": {"rw", request{cmd: cmdWriteZeroes, flags: cmdFlagNoHole, offset: mib, length: 1}, eNoSpc},
		"zeroes, fast":                       {"rw", request{cmd: cmdWriteZeroes, flags: cmdFlagFastZero, length: mib}, 0},
		"zeroes, fast, without a hole":       {"rw", request{cmd: cmdWriteZeroes, flags: cmdFlagFastZero | cmdFlagNoHole, length: mib}, eNotSup},
		"zeroes to read-only":                {"ro", request{cmd: cmdWriteZeroes, length: 1}, ePerm},
		"flush":                              {"rw", request{cmd: cmdFlush}, 0},
		"flush of read-only":                 {"ro", request{cmd: cmdFlush}, 0},
		"cache":                              {"rw", request{cmd: cmdCache, length: 1}, 0},
		"cache behind the end":               {"rw", request{cmd: cmdCache, offset: mib, length: 1}, eInval},
		"status":                             {"rw", request{cmd: cmdBlockStatus, length: mib}, 0},
		"status of nothing":                  {"rw", request{cmd: cmdBlockStatus}, eInval},
		"status behind the end":              {"rw", request{cmd: cmdBlockStatus, length: mib + 1}, eInval},
		"status where it is not known":       {"ro", request{cmd: cmdBlockStatus, length: mib}, eInval},
		"unknown":                            {"rw", request{cmd: 99}, eInval},
	} {
		t.Run(name, func(t *testing.T) {
			for _, structured := range []bool{true, false} {
				conn := s.dial(t, c.export, structured)
				want := c.want
				if c.r.cmd == cmdBlockStatus && !structured {
					want = eInval
				}
				var payload, read []byte
				switch c.r.cmd {
				case cmdWrite:
					payload = make([]byte, c.r.length)
				case cmdRead:
					read = make([]byte, c.r.length)
				}
				_, err := conn.do(t.Context(), c.r, payload, read)
				var got errno
				if errors.As(err, &got); got != want || err != nil && got == 0 {
					t.Errorf("structured %v: answer %v, want %v", structured, err, want)
				}
				if _, err := conn.do(t.Context(), request{cmd: cmdFlush}, nil, nil); err != nil && c.export != "closed" {
					t.Errorf("the connection is of no use afterwards: %v", err)
				}
			}
		})
	}
}

func TestBlockStatus(t *testing.T) {
	runs := [][2]int64{{0, 4096}, {8192, 4096}, {12288, 4096}, {65536, 1 << 40}}
	walk := func(_ context.Context, off, n int64, fn func(off, n int64) error) error {
		for _, r := range runs {
			from, to := max(r[0], off), min(r[0]+r[1], off+n)
			if from < to {
				if err := fn(from, to-from); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for _, c := range []struct {
		off, n int64
		limit  int
		want   []extent
	}{
		{0, 4096, 9, []extent{{4096, stateData}}},
		{0, 65536, 9, []extent{{4096, stateData}, {4096, stateHole}, {8192, stateData}, {49152, stateHole}}},
		{0, 65536, 3, []extent{{4096, stateData}, {4096, stateHole}, {8192, stateData}}},
		{0, 65536, 1, []extent{{4096, stateData}}},
		{4096, 8, 9, []extent{{8, stateHole}}},
		{4000, 200, 9, []extent{{96, stateData}, {104, stateHole}}},
		{1 << 20, 1<<32 - 1, 9, []extent{{1<<32 - 1, stateData}}},
	} {
		got, err := statusOf(t.Context(), walk, c.off, c.n, c.limit)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("statusOf(%d, %d, limit %d) = %v, %v; want %v", c.off, c.n, c.limit, got, err, c.want)
		}
	}
	broken := errors.New("broken")
	_, err := statusOf(t.Context(), func(context.Context, int64, int64, func(off, n int64) error) error { return broken }, 0, 1, 1)
	if !errors.Is(err, broken) {
		t.Errorf("statusOf = %v, want the walk's error", err)
	}
}

// TestStopWaits: a request in flight is answered when the server is stopped.
func TestStopWaits(t *testing.T) {
	dev := blocktest.NewFaulty(blocktest.NewMem(mib))
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	s := start(t, Options{Grace: time.Minute}, Export{Device: dev})
	c := s.dial(t, "", false)
	answer := make(chan error, 1)
	go func() { answer <- c.WriteAt(t.Context(), []byte{1}, 0) }()
	wait(t, func() bool { return dev.Hanging(blocktest.Write) == 1 })
	s.stop()
	wait(t, func() bool { // it accepts nobody any more
		conn, err := net.Dial(s.network, s.addr)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	select {
	case err := <-s.done:
		t.Fatalf("Serve = %v with a request in flight", err)
	case err := <-answer:
		t.Fatalf("answered too early: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	dev.Set(blocktest.Write, blocktest.Fault{})
	ok(t, <-answer)
	ok(t, <-s.done)
	<-c.done
}

// TestStopCancels: a request that does not end is cancelled once the grace is over.
func TestStopCancels(t *testing.T) {
	dev := blocktest.NewFaulty(blocktest.NewMem(mib))
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	s := start(t, Options{Grace: time.Millisecond}, Export{Device: dev})
	c := s.dial(t, "", false)
	answer := make(chan error, 1)
	go func() { answer <- c.WriteAt(t.Context(), []byte{1}, 0) }()
	wait(t, func() bool { return dev.Hanging(blocktest.Write) == 1 })
	s.stop()
	ok(t, <-s.done)
	if err := <-answer; err == nil {
		t.Error("a write that never ended was acknowledged")
	}
}

func wait(t *testing.T, what func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !what(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}

// settled waits until nothing of this package runs but what the test needs.
func settled(t *testing.T, running int) {
	t.Helper()
	wait(t, func() bool { return serving() <= running })
}

// serving counts goroutines that serve connections.
func serving() int {
	b := make([]byte, 4<<20)
	b = b[:runtime.Stack(b, true)]
	return strings.Count(string(b), "nbd.(*conn).")
}

// TestClientGoesAway: what a client that is gone had in flight is cancelled, and nothing of it is left.
func TestClientGoesAway(t *testing.T) {
	dev := blocktest.NewFaulty(blocktest.NewMem(mib))
	s := start(t, Options{}, Export{Device: dev})
	before := serving()
	dev.Set(blocktest.Write, blocktest.Fault{Hang: true})
	c := s.dial(t, "", true)
	for range 10 {
		go func() { _ = c.WriteAt(context.Background(), []byte{1}, 0) }()
	}
	wait(t, func() bool { return dev.Hanging(blocktest.Write) == 10 })
	c.close()
	wait(t, func() bool { return dev.Hanging(blocktest.Write) == 0 })
	settled(t, before)
}

// TestDisconnect: what was sent before a DISC is carried out and answered.
func TestDisconnect(t *testing.T) {
	dev := blocktest.NewMem(mib)
	s := start(t, Options{}, Export{Device: dev})
	c := s.dial(t, "", true)
	b := append(encodeRequest(request{cmd: cmdWrite, length: 1, cookie: 7}), 'x')
	c.mu.Lock()
	w := &call{reply: make(chan error, 1)}
	c.pending[7] = w
	_, err := c.conn.Write(append(b, encodeRequest(request{cmd: cmdDisc})...))
	c.mu.Unlock()
	ok(t, err)
	ok(t, <-w.reply)
	<-c.done
	if !errors.Is(c.err, io.EOF) {
		t.Errorf("after DISC: %v", c.err)
	}
}

// TestHostile: whatever a client does, it costs its own connection only.
func TestHostile(t *testing.T) {
	s := start(t, Options{NegotiationTime: 300 * time.Millisecond, StallTime: 300 * time.Millisecond, MaxConns: 4}, Export{Device: blocktest.NewMem(64 * mib)})
	before := serving()
	header := func(o option, n uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, magicOption)
		b = binary.BigEndian.AppendUint32(b, uint32(o))
		return binary.BigEndian.AppendUint32(b, n)
	}
	flags := []byte{0, 0, 0, 3}
	enter := append(append(flags, header(optGo, 6)...), 0, 0, 0, 0, 0, 0)
	for name, data := range map[string][]byte{
		"nothing":                nil,
		"a byte":                 {0},
		"no flags":               {0, 0, 0, 0},
		"wild flags":             {0xff, 0xff, 0xff, 0xff},
		"HTTP":                   []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"option with bad magic":  append(flags, make([]byte, 16)...),
		"option that is huge":    append(flags, header(optInfo, 1<<31)...),
		"option that never ends": append(flags, header(optInfo, 100)...),
		"unknown export":         append(append(flags, header(optExportName, 3)...), "abc"...),
		"request with bad magic": append(enter, make([]byte, requestSize)...),
		"write that is huge":     append(enter, encodeRequest(request{cmd: cmdWrite, length: block.MaxIO + 1})...),
		"write that never ends":  append(append(enter, encodeRequest(request{cmd: cmdWrite, length: 8192})...), 1, 2, 3),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial(s.network, s.addr)
			ok(t, err)
			defer conn.Close()
			_, err = conn.Write(data)
			ok(t, err)
			_, err = io.Copy(io.Discard, conn) // until the server ends it
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
		})
	}
	t.Run("takes no answers", func(t *testing.T) {
		conn, err := net.Dial(s.network, s.addr)
		ok(t, err)
		defer conn.Close()
		_, err = conn.Write(enter)
		ok(t, err)
		read := encodeRequest(request{cmd: cmdRead, length: mib})
		for err == nil { // until the server ends it
			_, err = conn.Write(read)
		}
	})
	t.Run("too many", func(t *testing.T) {
		settled(t, before)
		for range 4 {
			s.dial(t, "", false)
		}
		if _, err := dial(s.network, s.addr, "", false, nil); err == nil {
			t.Error("a connection too many was served")
		}
	})
	settled(t, before)
	ok(t, s.dial(t, "", true).Flush(t.Context()))
}

// TestSlowClient: who goes on is not taken for one that has stalled.
func TestSlowClient(t *testing.T) {
	t.Parallel()
	s := start(t, Options{StallTime: 2 * time.Second}, Export{Device: blocktest.NewMem(64 * mib)})
	conn, err := net.Dial(s.network, s.addr)
	ok(t, err)
	defer conn.Close()
	ok(t, greet(conn))
	_, _, err = sendOption(conn, optGo, make([]byte, 6))
	ok(t, err)
	slowly := func(b []byte, fn func([]byte) error) { // 3 s in all
		for p := range slices.Chunk(b, len(b)/12) {
			time.Sleep(250 * time.Millisecond)
			ok(t, fn(p))
		}
	}
	request := func(cmd command) []byte { return encodeRequest(request{cmd: cmd, length: 6 * mib}) }
	slowly(append(request(cmdWrite), make([]byte, 6*mib)...), func(p []byte) error { _, err := conn.Write(p); return err })
	answer := make([]byte, simpleReplySize)
	_, err = io.ReadFull(conn, answer)
	ok(t, err)
	if !bytes.Equal(answer, appendSimple(nil, 0, 0)) {
		t.Errorf("answer %x", answer)
	}
	_, err = conn.Write(append(request(cmdRead), request(cmdRead)...))
	ok(t, err)
	slowly(make([]byte, 2*(6*mib+simpleReplySize)), func(p []byte) error { _, err := io.ReadFull(conn, p); return err })
}

// TestWindow: a connection's requests in flight are bounded, also where it takes no answers.
func TestWindow(t *testing.T) {
	dev := blocktest.NewFaulty(blocktest.NewMem(mib))
	dev.Set(blocktest.Read, blocktest.Fault{Hang: true})
	s := start(t, Options{}, Export{Device: dev})
	c := s.dial(t, "", true)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 3 * Window / minCharge {
		go func() { _ = c.ReadAt(ctx, make([]byte, 512), 0) }()
	}
	wait(t, func() bool { return dev.Hanging(blocktest.Read) == Window/minCharge })
	time.Sleep(20 * time.Millisecond)
	if n := dev.Hanging(blocktest.Read); n != Window/minCharge {
		t.Errorf("%d requests in flight, the limit is %d", n, Window/minCharge)
	}
	dev.Set(blocktest.Read, blocktest.Fault{})
	ok(t, c.Flush(t.Context()))
}

func TestExports(t *testing.T) {
	dev := blocktest.NewMem(mib)
	for name, exports := range map[string][]Export{
		"no device": {{Name: "a"}}, "twice": {{Name: "a", Device: dev}, {Name: "a", Device: dev}},
		"long name": {{Name: strings.Repeat("x", MaxName+1), Device: dev}},
	} {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		ok(t, err)
		if err := Serve(t.Context(), l, exports, Options{}); err == nil {
			t.Errorf("%s: Serve = nil", name)
		}
	}
}
