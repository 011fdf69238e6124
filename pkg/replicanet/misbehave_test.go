package replicanet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// fake is a server that greets with an answer, and sends what it likes when a link is opened.
func fake(t *testing.T, answer hello, then func(num byte) []byte) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				if _, err := readHello(nc); err != nil {
					return
				}
				if _, err := nc.Write(answer.encode()); err != nil {
					return
				}
				var h [headLen]byte
				if _, err := io.ReadFull(nc, h[:]); err != nil || then == nil {
					return
				}
				if _, err := nc.Write(then(h[8])); err != nil {
					return
				}
				io.Copy(io.Discard, nc)
			}()
		}
	}()
	return l.Addr().String()
}

// TestServerMisbehaves: a client is as careful as a server.
func TestServerMisbehaves(t *testing.T) {
	good := hello{Min: 1, Max: 1, Cluster: "test", From: "server", To: "client"}
	with := func(change func(*hello)) hello {
		h := good
		change(&h)
		return h
	}
	control := func(kind byte, rest []byte) func(byte) []byte {
		return func(num byte) []byte {
			var h [headLen]byte
			putControl(&h, kind, uint32(num), rest)
			return append(h[:], rest...)
		}
	}
	for name, tt := range map[string]struct {
		answer hello
		then   func(byte) []byte
		want   string
	}{
		"refuses":            {with(func(h *hello) { h.Refusal = "go away" }), nil, "go away"},
		"another node":       {with(func(h *hello) { h.From = "n9" }), nil, "n9"},
		"another cluster":    {with(func(h *hello) { h.Cluster = "c9" }), nil, "c9"},
		"for another":        {with(func(h *hello) { h.To = "n9" }), nil, "not"},
		"a future version":   {with(func(h *hello) { h.Min, h.Max = 9, 9 }), nil, "version 9"},
		"no version":         {with(func(h *hello) { h.Min = 0 }), nil, "version"},
		"hangs up":           {good, nil, ""},
		"opens a link":       {good, control(kindOpen, nil), "opens a link"},
		"a malformed answer": {good, control(kindOpened, []byte{1}), "answer to the opening"},
		"no frame":           {good, func(byte) []byte { return make([]byte, headLen) }, "checksum"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dial(t, false).Dial(t.Context(), target(fake(t, tt.answer, tt.then), 1), newEngine())
			if !errors.Is(err, volume.ErrUnavailable) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
		})
	}

	// What is no answer to anything, and messages for links that are not there, are passed over.
	addr := fake(t, good, func(num byte) []byte {
		ok := appendString(appendString(nil, ""), "")
		var stray [headLen]byte
		m := replication.Message{Kind: replication.KindRead, Reply: true, Data: []byte("stray")}
		putHead(&stray, &m, 77, nil, m.Data, checksum(m.Data))
		return bytes.Join([][]byte{control(kindOpened, ok)(99), control(kindClose, nil)(98), stray[:], m.Data, control(kindOpened, ok)(num)}, nil)
	})
	e := newEngine()
	open(t, dial(t, false), target(addr, 1), e).Close()
	if len(e.answers) > 0 {
		t.Error("a stray message was delivered")
	}
}

// TestEndlessQueue: what a peer does not read is not gathered without bound, in number or in time.
func TestEndlessQueue(t *testing.T) {
	block := make(chan bool)
	defer close(block)
	rep := newReplica(t)
	_, addr := serve(t, acceptor(func(context.Context, *Link, volume.ID, volume.ReplicaID) (Handler, error) {
		return &sleeper{rep, block}, nil
	}), false)
	e := newEngine()
	l := open(t, dial(t, false), target(addr, 1), e)
	defer l.Close()
	for i := 0; len(e.closed) == 0; i++ {
		if i > 10*maxQueuedFrames {
			t.Fatal("it goes on for ever")
		}
		l.Send(&replication.Message{Kind: replication.KindPing, Seq: uint64(i)})
		if i%1000 == 0 {
			l.Flush()
		}
	}
	if err := <-e.closed; !errors.Is(err, errStuck) && !errors.Is(err, unix.ETIMEDOUT) {
		t.Error(err)
	}
}
