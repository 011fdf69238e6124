package cutdisk

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// The parts of the NBD protocol that QEMU's client uses; the names are those of the protocol's document.
const (
	nbdMagic       = 0x4e42444d41474943
	optionMagic    = 0x49484156454F5054
	optReplyMagic  = 0x0003e889045565a9
	requestMagic   = 0x25609513
	replyMagic     = 0x67446698
	flagNewstyle   = 1 << 0
	flagNoZeroes   = 1 << 1
	optExportName  = 1
	optAbort       = 2
	optInfo        = 6
	optGo          = 7
	repAck         = 1
	repInfo        = 3
	repErrUnsup    = 1<<31 | 1
	infoExport     = 0
	exportFlags    = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdFlagFUA     = 1 << 0
	errIO          = 5
	errInvalid     = 22

	maxPayload = 32 << 20
	maxOption  = 64 << 10
)

// Serve answers one client on l, until the client goes away or l is closed. It returns nil then.
func (d *Disk) Serve(l net.Listener) error {
	c, err := l.Accept()
	if err != nil {
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		return err
	}
	defer c.Close()
	r := bufio.NewReaderSize(c, 1<<20)
	ready, err := d.negotiate(c, r)
	if err != nil || !ready {
		return gone(err)
	}
	return gone(d.transmit(c, r))
}

// gone drops the errors of a client that was killed, which is what this disk is for.
func gone(err error) error {
	var op *net.OpError
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op) {
		return nil
	}
	return err
}

func (d *Disk) negotiate(w io.Writer, r io.Reader) (ready bool, err error) {
	be := binary.BigEndian
	hello := be.AppendUint64(nil, nbdMagic)
	hello = be.AppendUint64(hello, optionMagic)
	hello = be.AppendUint16(hello, flagNewstyle|flagNoZeroes)
	if _, err := w.Write(hello); err != nil {
		return false, err
	}
	var clientFlags [4]byte
	if _, err := io.ReadFull(r, clientFlags[:]); err != nil {
		return false, err
	}
	for {
		var head [16]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return false, err
		}
		option, length := be.Uint32(head[8:]), be.Uint32(head[12:])
		if be.Uint64(head[:]) != optionMagic || length > maxOption {
			return false, fmt.Errorf("NBD option %d of %d bytes is malformed", option, length)
		}
		if _, err := io.CopyN(io.Discard, r, int64(length)); err != nil {
			return false, err
		}
		export := be.AppendUint64(nil, uint64(d.size))
		export = be.AppendUint16(export, exportFlags)
		answer := func(kind uint32, data []byte) error {
			p := be.AppendUint64(nil, optReplyMagic)
			p = be.AppendUint32(p, option)
			p = be.AppendUint32(p, kind)
			p = be.AppendUint32(p, uint32(len(data)))
			_, err := w.Write(append(p, data...))
			return err
		}
		switch option {
		case optExportName:
			_, err := w.Write(export)
			return true, err
		case optAbort:
			return false, answer(repAck, nil)
		case optInfo, optGo:
			if err := answer(repInfo, append(be.AppendUint16(nil, infoExport), export...)); err != nil {
				return false, err
			}
			if err := answer(repAck, nil); err != nil {
				return false, err
			}
			if option == optGo {
				return true, nil
			}
		default:
			if err := answer(repErrUnsup, nil); err != nil {
				return false, err
			}
		}
	}
}

type request struct {
	flags, command uint16
	handle         [8]byte
	off            int64
	length         int64
	data           []byte
	covers         int // writes answered when the request arrived
}

// transmit reads requests ahead of answering them, so that a flush is held only to the writes that the client knew to
// be done when it asked: a driver or a filesystem that flushes too early is found out.
func (d *Disk) transmit(w io.Writer, r io.Reader) error {
	var answered atomic.Int64
	d.mu.Lock()
	answered.Store(int64(d.writes))
	d.mu.Unlock()
	requests := make(chan request, 256)
	var g errgroup.Group
	g.Go(func() error {
		defer close(requests)
		for {
			q, err := readRequest(r, d.size)
			if err != nil || q.command == cmdDisconnect {
				return err
			}
			q.covers = int(answered.Load())
			requests <- q
		}
	})
	g.Go(func() error {
		var failed error
		for q := range requests {
			if failed != nil || d.halted() {
				continue // the reader ends when the client goes
			}
			failed = d.answer(w, q, &answered)
		}
		return failed
	})
	return g.Wait()
}

func readRequest(r io.Reader, size int64) (request, error) {
	be := binary.BigEndian
	var head [28]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return request{}, err
	}
	q := request{
		flags: be.Uint16(head[4:]), command: be.Uint16(head[6:]), handle: [8]byte(head[8:16]),
		off: int64(be.Uint64(head[16:])), length: int64(be.Uint32(head[24:])),
	}
	if be.Uint32(head[:]) != requestMagic || q.off < 0 || q.off > size || q.length > size-q.off {
		return q, fmt.Errorf("NBD request %x is malformed or beyond the disk's %d bytes", head, size)
	}
	if q.command == cmdWrite {
		if q.length > maxPayload {
			return q, fmt.Errorf("NBD write of %d bytes", q.length)
		}
		q.data = make([]byte, q.length)
		if _, err := io.ReadFull(r, q.data); err != nil {
			return q, err
		}
	}
	return q, nil
}

func (d *Disk) answer(w io.Writer, q request, answered *atomic.Int64) error {
	var err error
	var data []byte
	fua := q.flags&cmdFlagFUA != 0
	code := uint32(errIO)
	switch q.command {
	case cmdRead:
		if q.length > maxPayload {
			return fmt.Errorf("NBD read of %d bytes", q.length)
		}
		data = make([]byte, q.length)
		err = d.readAt(data, q.off)
	case cmdWrite:
		err = d.writeAt(q.data, q.off, fua)
	case cmdTrim, cmdWriteZeroes:
		err = d.zeroAt(q.off, q.length, fua)
	case cmdFlush:
		err = d.flush(q.covers)
	default:
		err, code = errors.ErrUnsupported, errInvalid
	}
	if err == io.ErrClosedPipe {
		return nil // no power: no answer
	}
	reply := binary.BigEndian.AppendUint32(nil, replyMagic)
	if err != nil {
		reply, data = binary.BigEndian.AppendUint32(reply, code), nil
	} else {
		reply = binary.BigEndian.AppendUint32(reply, 0)
	}
	reply = append(reply, q.handle[:]...)
	// Counted before it is sent: the client may ask for a flush as soon as it has the answer.
	if q.command == cmdWrite || q.command == cmdTrim || q.command == cmdWriteZeroes {
		answered.Add(1)
	}
	_, err = w.Write(append(reply, data...))
	return err
}
