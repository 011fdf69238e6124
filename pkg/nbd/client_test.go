package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/ballast-csi/ballast/pkg/block"
)

// client is a plain NBD client, and a block.Device.
type client struct {
	conn       net.Conn
	structured bool
	size       int64
	flags      uint16

	mu      sync.Mutex
	cookie  uint64
	pending map[uint64]*call
	err     error // of the connection
	done    chan struct{}
}

// call is a request that waits for its answer.
type call struct {
	read    []byte
	off     uint64
	extents []extent
	reply   chan error
}

var _ block.Device = (*client)(nil)

func (e errno) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// option sends one option and returns the replies up to the last one.
func sendOption(conn net.Conn, o option, data []byte) (types []uint32, datas [][]byte, err error) {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := conn.Write(append(b, data...)); err != nil {
		return nil, nil, err
	}
	for {
		var head [20]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return types, datas, err
		}
		if binary.BigEndian.Uint64(head[:]) != magicReply || option(binary.BigEndian.Uint32(head[8:])) != o {
			return nil, nil, fmt.Errorf("bad reply %x", head)
		}
		typ := binary.BigEndian.Uint32(head[12:])
		d := make([]byte, binary.BigEndian.Uint32(head[16:]))
		if _, err := io.ReadFull(conn, d); err != nil {
			return nil, nil, err
		}
		types, datas = append(types, typ), append(datas, d)
		if typ == repAck || typ>>31 == 1 {
			return types, datas, nil
		}
	}
}

func greet(conn net.Conn) error {
	var b [greetingSize]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return err
	}
	if !bytes.Equal(b[:], appendGreeting(nil)) {
		return fmt.Errorf("greeting %x", b)
	}
	_, err := conn.Write([]byte{0, 0, 0, flagFixedNewstyle | flagNoZeroes})
	return err
}

func nameData(name string, more ...byte) []byte {
	return append(append(binary.BigEndian.AppendUint32(nil, uint32(len(name))), name...), more...)
}

func last(types []uint32) uint32 {
	if len(types) == 0 {
		return 0
	}
	return types[len(types)-1]
}

// dial opens an export. With a config it asks for TLS first.
func dial(network, addr, name string, structured bool, config *tls.Config) (*client, error) {
	conn, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	c, err := open(conn, name, structured, config)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func open(conn net.Conn, name string, structured bool, config *tls.Config) (*client, error) {
	if err := greet(conn); err != nil {
		return nil, err
	}
	must := func(o option, data []byte) ([][]byte, error) {
		types, datas, err := sendOption(conn, o, data)
		if err == nil && last(types) != repAck {
			err = fmt.Errorf("option %d was answered with %x %q", o, types, datas)
		}
		return datas, err
	}
	if config != nil {
		if _, err := must(optStartTLS, nil); err != nil {
			return nil, err
		}
		t := tls.Client(conn, config)
		if err := t.Handshake(); err != nil {
			return nil, err
		}
		conn = t
	}
	if structured {
		if _, err := must(optStructuredReply, nil); err != nil {
			return nil, err
		}
		query := append(nameData(name, 0, 0, 0, 1), nameData(contextAllocation)...)
		if _, err := must(optSetMetaContext, query); err != nil {
			return nil, err
		}
	}
	datas, err := must(optGo, nameData(name, 0, 0))
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn, structured: structured, pending: map[uint64]*call{}, done: make(chan struct{})}
	c.size, c.flags = int64(binary.BigEndian.Uint64(datas[0][2:])), binary.BigEndian.Uint16(datas[0][10:])
	go c.receive()
	return c, nil
}

func mustDial(t *testing.T, network, addr, name string, structured bool, config *tls.Config) *client {
	t.Helper()
	c, err := dial(network, addr, name, structured, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

func (c *client) close() {
	_ = c.conn.Close()
	<-c.done
}

// request of the transmission phase as bytes.
func encodeRequest(r request) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, uint16(r.cmd))
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

// do sends a request and waits for the answer.
func (c *client) do(ctx context.Context, r request, payload, read []byte) ([]extent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w := &call{read: read, off: r.offset, reply: make(chan error, 1)}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	c.cookie++
	r.cookie = c.cookie
	c.pending[r.cookie] = w
	_, err := c.conn.Write(append(encodeRequest(r), payload...))
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case err := <-w.reply:
		return w.extents, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *client) receive() {
	defer close(c.done)
	var err error
	for err == nil {
		err = c.receiveOne()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, w := range c.pending {
		w.reply <- err
	}
}

func (c *client) receiveOne() error {
	var head [structuredHeadSize]byte
	if _, err := io.ReadFull(c.conn, head[:4]); err != nil {
		return err
	}
	switch m := binary.BigEndian.Uint32(head[:]); m {
	case magicSimple:
		if _, err := io.ReadFull(c.conn, head[4:simpleReplySize]); err != nil {
			return err
		}
		e := errno(binary.BigEndian.Uint32(head[4:]))
		w, err := c.take(binary.BigEndian.Uint64(head[8:]))
		if err != nil {
			return err
		}
		if e != 0 {
			w.reply <- e
			return nil
		}
		if len(w.read) > 0 && c.structured {
			return errors.New("a simple reply to a read")
		}
		_, err = io.ReadFull(c.conn, w.read)
		w.reply <- err
		return err
	case magicStructured:
		if _, err := io.ReadFull(c.conn, head[4:]); err != nil {
			return err
		}
		w, err := c.take(binary.BigEndian.Uint64(head[8:]))
		if err != nil {
			return err
		}
		if flags := binary.BigEndian.Uint16(head[4:]); flags != replyFlagDone || !c.structured {
			return fmt.Errorf("structured reply with flags %x", flags)
		}
		data := make([]byte, binary.BigEndian.Uint32(head[16:]))
		if _, err := io.ReadFull(c.conn, data); err != nil {
			return err
		}
		w.reply <- w.chunk(binary.BigEndian.Uint16(head[6:]), data)
		return nil
	default:
		return fmt.Errorf("reply with magic %x", m)
	}
}

func (c *client) take(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.pending[cookie]
	if w == nil {
		return nil, fmt.Errorf("nothing waits for cookie %d", cookie)
	}
	delete(c.pending, cookie)
	return w, nil
}

func (w *call) chunk(typ uint16, data []byte) error {
	switch typ {
	case chunkNone:
		if len(w.read) > 0 {
			return errors.New("no content")
		}
	case chunkOffsetData:
		if len(data) != 8+len(w.read) || binary.BigEndian.Uint64(data) != w.off {
			return fmt.Errorf("content of %d bytes, want %d", len(data)-8, len(w.read))
		}
		copy(w.read, data[8:])
	case chunkBlockStatus:
		for data = data[4:]; len(data) > 0; data = data[8:] {
			w.extents = append(w.extents, extent{binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:])})
		}
	case chunkError:
		return errno(binary.BigEndian.Uint32(data))
	default:
		return fmt.Errorf("chunk type %d", typ)
	}
	return nil
}

// asDevice turns a refusal of what is outside into what a device says.
func (c *client) asDevice(off, n int64, err error) error {
	var e errno
	if errors.As(err, &e) && (e == eInval || e == eNoSpc) && block.CheckRange(off, n, c.size) != nil {
		return block.ErrRange
	}
	return err
}

func (c *client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.split(off, int64(len(p)), block.MaxIO, func(at, n int64) error {
		_, err := c.do(ctx, request{cmd: cmdRead, offset: uint64(off + at), length: uint32(n)}, nil, p[at:at+n])
		return err
	})
}

func (c *client) WriteAt(ctx context.Context, p []byte, off int64) error {
	return c.split(off, int64(len(p)), block.MaxIO, func(at, n int64) error {
		_, err := c.do(ctx, request{cmd: cmdWrite, offset: uint64(off + at), length: uint32(n)}, p[at:at+n], nil)
		return err
	})
}

func (c *client) Zero(ctx context.Context, off, n int64) error {
	if n < 0 {
		return block.ErrRange
	}
	return c.split(off, n, 1<<31, func(at, n int64) error {
		_, err := c.do(ctx, request{cmd: cmdWriteZeroes, offset: uint64(off + at), length: uint32(n)}, nil, nil)
		return err
	})
}

// split keeps requests within what one may have.
func (c *client) split(off, n, most int64, fn func(at, n int64) error) error {
	for at := int64(0); ; at += most {
		if err := fn(at, min(most, n-at)); err != nil || n-at <= most {
			return c.asDevice(off, n, err)
		}
	}
}

func (c *client) Flush(ctx context.Context) error {
	_, err := c.do(ctx, request{cmd: cmdFlush}, nil, nil)
	return err
}

func (c *client) Size() int64 { return c.size }
