package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/block/blocktest"
)

// FuzzOptions negotiates whatever comes: the answers are well-formed, and no longer than the exports and the question
// explain.
func FuzzOptions(f *testing.F) {
	f.Add(uint32(optGo), append(nameData("a", 0, 1), 0, infoName), true, false)
	f.Add(uint32(optInfo), nameData("a", 0, 0), false, true)
	f.Add(uint32(optExportName), []byte("a"), false, false)
	f.Add(uint32(optSetMetaContext), append(nameData("a", 0, 0, 0, 1), nameData(contextAllocation)...), true, false)
	f.Add(uint32(optListMetaContext), nameData("b", 0, 0, 0, 0), true, false)
	f.Add(uint32(optList), []byte{}, false, false)
	f.Add(uint32(optStartTLS), []byte{}, false, true)
	all := func(_ context.Context, off, n int64, fn func(off, n int64) error) error { return fn(off, n) }
	exports := []Export{{Name: "a", Device: blocktest.NewMem(4096), Extents: all, Description: "d"}, {Name: "b", Device: blocktest.NewMem(8192), ReadOnly: true}}
	f.Fuzz(func(t *testing.T, o uint32, data []byte, structured, offerTLS bool) {
		h := handshake{exports: exports, structured: structured, offerTLS: offerTLS}
		out, v, err := h.option(option(o), data, nil)
		if v == transmit && (h.chosen == nil || offerTLS) {
			t.Fatal("transmission without an export, or without TLS")
		}
		if err != nil && v != hangUp {
			t.Fatalf("goes on after %v", err)
		}
		if len(out) > 1024+len(data) {
			t.Fatalf("%d bytes are answered to %d", len(out), len(data))
		}
		if option(o) == optExportName {
			return
		}
		for len(out) > 0 {
			if len(out) < 20 || binary.BigEndian.Uint64(out) != magicReply || binary.BigEndian.Uint32(out[8:]) != o {
				t.Fatalf("answer %x", out)
			}
			n := binary.BigEndian.Uint32(out[16:])
			out = out[20+n:]
		}
	})
}

// FuzzConn feeds a connection whatever comes, in negotiation or after it: it ends, and what it answers is parsed by a
// client.
func FuzzConn(f *testing.F) {
	enter := append([]byte{0, 0, 0, 3}, binary.BigEndian.AppendUint64(nil, magicOption)...)
	enter = append(enter, 0, 0, 0, byte(optGo), 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
	f.Add(enter)
	for _, r := range []request{
		{cmd: cmdRead, length: 4096}, {cmd: cmdWrite, length: 3, offset: 5, flags: cmdFlagFUA}, {cmd: cmdTrim, length: 1 << 31}, {cmd: cmdFlush},
		{cmd: cmdWriteZeroes, flags: cmdFlagNoHole, length: 9}, {cmd: cmdBlockStatus, length: 9}, {cmd: cmdDisc},
	} {
		f.Add(append(append(bytes.Clone(enter), encodeRequest(r)...), 1, 2, 3))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		s := &server{o: Options{StallTime: 5 * time.Second}.withDefaults(), exports: []Export{{Device: blocktest.NewMem(mib)}}}
		s.requests, s.cancel = context.WithCancel(t.Context())
		defer s.cancel()
		ours, theirs := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- newConn(s, theirs).serve() }()
		received := make(chan []byte, 1)
		go func() { b, _ := io.ReadAll(ours); received <- b }()
		_, _ = ours.Write(in)
		_ = ours.Close()
		<-done
		if b := <-received; len(b) > 0 && !bytes.HasPrefix(appendGreeting(nil), b[:min(len(b), greetingSize)]) {
			t.Errorf("greeting %x", b)
		}
	})
}

// FuzzRequest parses any header, and gets back what was encoded.
func FuzzRequest(f *testing.F) {
	f.Add(encodeRequest(request{cmd: cmdWrite, flags: 3, cookie: 1 << 60, offset: block.Size, length: 9}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < requestSize {
			return
		}
		r, err := parseRequest(b)
		if err == nil && !bytes.Equal(encodeRequest(r), b[:requestSize]) {
			t.Errorf("%x is encoded as %x", b, encodeRequest(r))
		}
	})
}

// TestSecured: what was sent in the clear counts for nothing within TLS, and what was sent along with STARTTLS is not
// taken for what came within.
func TestSecured(t *testing.T) {
	_, serverTLS, clientTLS := authority(t)
	s := start(t, Options{TLS: serverTLS}, Export{Name: "a", Device: blocktest.NewMem(mib)})
	conn, err := net.Dial(s.network, s.addr)
	ok(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	ok(t, greet(conn))
	for _, o := range []option{optList, optInfo, optGo, optStructuredReply, optListMetaContext, 99} {
		if types, _, err := sendOption(conn, o, nameData("a", 0, 0)); err != nil || last(types) != repErrTLSReqd {
			t.Errorf("option %d without TLS: %x, %v", o, types, err)
		}
	}
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = append(b, 0, 0, 0, byte(optStartTLS), 0, 0, 0, 0)
	_, err = conn.Write(append(b, b...)) // the second one is injected
	ok(t, err)
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Log(err)
	}
	for name, c := range map[string]*tls.Config{"no certificate": {RootCAs: clientTLS.RootCAs, ServerName: "127.0.0.1"}} {
		if _, err := dial(s.network, s.addr, "a", true, c); err == nil {
			t.Errorf("client with %s was served", name)
		}
	}
	if _, err := dial(s.network, s.addr, "a", true, nil); err == nil {
		t.Error("a client without TLS was served")
	}
	plain := start(t, Options{}, Export{Name: "a", Device: blocktest.NewMem(mib)})
	if _, err := dial(plain.network, plain.addr, "a", true, clientTLS); err == nil {
		t.Error("a server without a certificate agreed to TLS")
	}
}
