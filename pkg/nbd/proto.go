package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Magic numbers.
const (
	magicGreeting   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicReply      = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake flags, the server's and the client's.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendFlush    = 1 << 2
	flagSendFUA      = 1 << 3
	flagSendTrim     = 1 << 5
	flagSendZeroes   = 1 << 6
	flagSendDF       = 1 << 7
	flagMultiConn    = 1 << 8
	flagSendFastZero = 1 << 11
)

// option is what a client asks in negotiation.
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
)

// Types of replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup   = 1<<31 + 1
	repErrPolicy  = 1<<31 + 2
	repErrInvalid = 1<<31 + 3
	repErrTLSReqd = 1<<31 + 5
	repErrUnknown = 1<<31 + 6
)

// Types of information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// command is what a client asks in transmission.
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

// Flags of commands.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured replies.
const (
	replyFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// States of base:allocation.
const (
	stateData = 0
	stateHole = 1<<0 | 1<<1 // nothing is stored, and it reads as zeros
)

const (
	contextAllocation = "base:allocation"
	contextID         = 1 // the one context's
)

// errno is the protocol's idea of an error.
type errno uint32

const (
	ePerm     errno = 1
	eIO       errno = 5
	eInval    errno = 22
	eNoSpc    errno = 28
	eNotSup   errno = 95
	eShutdown errno = 108
)

const (
	greetingSize       = 18
	clientFlagsSize    = 4
	optionHeaderSize   = 16
	requestSize        = 28
	simpleReplySize    = 16
	structuredHeadSize = 20
	exportZeroes       = 124 // after the answer to optExportName
	// maxOption bounds the data of one option, in bytes.
	maxOption = 32 << 10
)

// errProtocol is wrapped by whatever a client may not send; the connection ends with it.
var errProtocol = errors.New("protocol violation")

// appendGreeting is what the server says first.
func appendGreeting(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicGreeting)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	return binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
}

// parseClientFlags reads a client's answer to the greeting.
func parseClientFlags(b [clientFlagsSize]byte) (noZeroes bool, err error) {
	f := binary.BigEndian.Uint32(b[:])
	if f&flagFixedNewstyle == 0 || f&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return false, fmt.Errorf("client flags %#x: %w", f, errProtocol)
	}
	return f&flagNoZeroes != 0, nil
}

// parseOptionHeader returns an option and the length of its data, which is not more than maxOption.
func parseOptionHeader(b [optionHeaderSize]byte) (o option, n int, err error) {
	if m := binary.BigEndian.Uint64(b[:]); m != magicOption {
		return 0, 0, fmt.Errorf("option with magic %#x: %w", m, errProtocol)
	}
	length := binary.BigEndian.Uint32(b[12:])
	if length > maxOption {
		return 0, 0, fmt.Errorf("option with %d bytes of data: %w", length, errProtocol)
	}
	return option(binary.BigEndian.Uint32(b[8:])), int(length), nil
}

// appendOptionReply answers an option.
func appendOptionReply(b []byte, o option, typ uint32, data ...[]byte) []byte {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	b = binary.BigEndian.AppendUint64(b, magicReply)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	for _, d := range data {
		b = append(b, d...)
	}
	return b
}

// cutString takes a string that follows its length, of at most MaxName bytes.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if b = b[4:]; n > MaxName || int(n) > len(b) {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// exportQuery is the data of INFO and GO.
type exportQuery struct {
	name  string
	infos []uint16
}

func parseExportQuery(b []byte) (q exportQuery, ok bool) {
	q.name, b, ok = cutString(b)
	if !ok || len(b) < 2 {
		return q, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; len(b) != 2*n {
		return q, false
	}
	for ; len(b) > 0; b = b[2:] {
		q.infos = append(q.infos, binary.BigEndian.Uint16(b))
	}
	return q, true
}

// contextQuery is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
type contextQuery struct {
	name    string
	queries []string
}

func parseContextQuery(b []byte) (q contextQuery, ok bool) {
	q.name, b, ok = cutString(b)
	if !ok || len(b) < 4 {
		return q, false
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	for range n { // bounded by the data: each takes some
		var s string
		if s, b, ok = cutString(b); !ok {
			return q, false
		}
		q.queries = append(q.queries, s)
	}
	return q, len(b) == 0
}

// request of the transmission phase, without its payload.
type request struct {
	flags  uint16
	cmd    command
	cookie uint64
	offset uint64
	length uint32
}

func parseRequest(b []byte) (request, error) {
	if m := binary.BigEndian.Uint32(b); m != magicRequest {
		return request{}, fmt.Errorf("request with magic %#x: %w", m, errProtocol)
	}
	return request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    command(binary.BigEndian.Uint16(b[6:])),
		cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// allowedFlags are those documented for a command. FUA is valid with every one.
func allowedFlags(c command) uint16 {
	switch c {
	case cmdRead:
		return cmdFlagFUA | cmdFlagDF
	case cmdWriteZeroes:
		return cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero
	case cmdBlockStatus:
		return cmdFlagFUA | cmdFlagReqOne
	}
	return cmdFlagFUA
}

// appendSimple is a reply without structure; e is 0 for success.
func appendSimple(b []byte, cookie uint64, e errno) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk is the head of the only chunk of a structured reply; n bytes follow.
func appendChunk(b []byte, cookie uint64, typ uint16, n int) []byte {
	b = binary.BigEndian.AppendUint32(b, magicStructured)
	b = binary.BigEndian.AppendUint16(b, replyFlagDone)
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// appendDataHead is followed by the n bytes that were read at offset; none are no content.
func appendDataHead(b []byte, cookie, offset uint64, n int) []byte {
	if n == 0 {
		return appendChunk(b, cookie, chunkNone, 0)
	}
	b = appendChunk(b, cookie, chunkOffsetData, 8+n)
	return binary.BigEndian.AppendUint64(b, offset)
}

// appendError is a structured error, without a text: it would tell a client about the host.
func appendError(b []byte, cookie uint64, e errno) []byte {
	b = appendChunk(b, cookie, chunkError, 6)
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	return binary.BigEndian.AppendUint16(b, 0)
}

// extent is a run of blocks in one state.
type extent struct{ length, state uint32 }

func appendBlockStatus(b []byte, cookie uint64, extents []extent) []byte {
	b = appendChunk(b, cookie, chunkBlockStatus, 4+8*len(extents))
	b = binary.BigEndian.AppendUint32(b, contextID)
	for _, e := range extents {
		b = binary.BigEndian.AppendUint32(b, e.length)
		b = binary.BigEndian.AppendUint32(b, e.state)
	}
	return b
}
