package nbd

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/ballast-csi/ballast/pkg/block"
)

// verdict is what follows an option.
type verdict int

const (
	goOn     verdict = iota
	hangUp           // after the answer
	startTLS         // after the answer; negotiation begins anew
	transmit         // after the answer, on handshake.chosen
)

// handshake is the state of one connection's negotiation.
type handshake struct {
	exports []Export
	// offerTLS: there is a certificate. Then nothing else is answered before secure is set.
	offerTLS, secure bool
	noZeroes         bool

	structured bool
	// allocation is the export of which the client selected base:allocation.
	allocation *Export
	chosen     *Export
}

// secured begins anew within TLS: what was negotiated in the clear is forgotten.
func (h *handshake) secured() {
	*h = handshake{exports: h.exports, offerTLS: h.offerTLS, secure: true, noZeroes: h.noZeroes}
}

// contexts tells whether the client may ask for the chosen export's block status.
func (h *handshake) contexts() bool { return h.structured && h.allocation == h.chosen }

func (h *handshake) find(name string) *Export {
	for i := range h.exports {
		if h.exports[i].Name == name {
			return &h.exports[i]
		}
	}
	return nil
}

// option answers one option with what it appends to out.
func (h *handshake) option(o option, data, out []byte) ([]byte, verdict, error) {
	reply := func(typ uint32, text string) ([]byte, verdict, error) {
		return appendOptionReply(out, o, typ, []byte(text)), goOn, nil
	}
	if h.offerTLS && !h.secure && o != optStartTLS && o != optAbort {
		if o == optExportName {
			return out, hangUp, fmt.Errorf("export %.64q without TLS: %w", data, errProtocol) // it knows no other answer
		}
		return reply(repErrTLSReqd, "this server wants TLS")
	}
	switch o {
	case optAbort:
		return appendOptionReply(out, o, repAck), hangUp, nil
	case optExportName:
		return h.exportName(data, out)
	case optGo, optInfo:
		return h.export(o, data, out)
	case optListMetaContext, optSetMetaContext:
		return h.metaContext(o, data, out)
	case optList, optStartTLS, optStructuredReply:
		if len(data) > 0 {
			return reply(repErrInvalid, "this option has no data")
		}
	default:
		return reply(repErrUnsup, "")
	}
	switch {
	case o == optList:
		for _, e := range h.exports {
			out = appendOptionReply(out, o, repServer, binary.BigEndian.AppendUint32(nil, uint32(len(e.Name))), []byte(e.Name), []byte(e.Description))
		}
	case o == optStructuredReply:
		h.structured = true
	case !h.offerTLS:
		return reply(repErrPolicy, "this server has no certificate")
	case h.secure:
		return reply(repErrInvalid, "TLS is on already")
	default:
		return appendOptionReply(out, o, repAck), startTLS, nil
	}
	return appendOptionReply(out, o, repAck), goOn, nil
}

// exportName is the old way to begin; it has no answer for an error but the end of the connection.
func (h *handshake) exportName(data, out []byte) ([]byte, verdict, error) {
	e := h.find(string(data))
	if e == nil {
		return out, hangUp, fmt.Errorf("there is no export %.64q", data)
	}
	h.chosen = e
	out = binary.BigEndian.AppendUint64(out, uint64(e.Device.Size()))
	out = binary.BigEndian.AppendUint16(out, h.flags(e))
	if !h.noZeroes {
		out = append(out, make([]byte, exportZeroes)...)
	}
	return out, transmit, nil
}

func (h *handshake) export(o option, data, out []byte) ([]byte, verdict, error) {
	q, ok := parseExportQuery(data)
	if !ok {
		return appendOptionReply(out, o, repErrInvalid), goOn, nil
	}
	e := h.find(q.name)
	if e == nil {
		return appendOptionReply(out, o, repErrUnknown, []byte("there is no such export")), goOn, nil
	}
	info := func(typ uint16, data []byte) {
		out = appendOptionReply(out, o, repInfo, binary.BigEndian.AppendUint16(nil, typ), data)
	}
	size := binary.BigEndian.AppendUint64(nil, uint64(e.Device.Size()))
	info(infoExport, binary.BigEndian.AppendUint16(size, h.flags(e)))
	given := map[uint16]bool{}
	for _, i := range append(q.infos, infoBlockSize) { // block sizes also go to those who do not ask, once
		if given[i] {
			continue
		}
		given[i] = true
		switch i {
		case infoName:
			info(i, []byte(e.Name))
		case infoDescription:
			if e.Description != "" {
				info(i, []byte(e.Description))
			}
		case infoBlockSize:
			sizes := binary.BigEndian.AppendUint32(nil, 1)
			sizes = binary.BigEndian.AppendUint32(sizes, block.Size)
			info(i, binary.BigEndian.AppendUint32(sizes, block.MaxIO))
		}
	}
	out = appendOptionReply(out, o, repAck)
	if o == optInfo {
		return out, goOn, nil
	}
	h.chosen = e
	return out, transmit, nil
}

// flags of an export. Fast zeroes: Zero changes the map of what is stored, no bytes. Several connections share the
// device, and so its flushes.
func (h *handshake) flags(e *Export) uint16 {
	f := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn)
	if h.structured {
		f |= flagSendDF
	}
	if e.ReadOnly {
		return f | flagReadOnly
	}
	return f | flagSendTrim | flagSendZeroes | flagSendFastZero
}

func (h *handshake) metaContext(o option, data, out []byte) ([]byte, verdict, error) {
	if o == optSetMetaContext {
		h.allocation = nil // also where this one fails
	}
	q, ok := parseContextQuery(data)
	if !ok || !h.structured {
		return appendOptionReply(out, o, repErrInvalid), goOn, nil
	}
	e := h.find(q.name)
	if e == nil {
		return appendOptionReply(out, o, repErrUnknown, []byte("there is no such export")), goOn, nil
	}
	wanted := o == optListMetaContext && len(q.queries) == 0
	for _, s := range q.queries {
		if s == contextAllocation || o == optListMetaContext && s == "base:" {
			wanted = true
		}
		if !strings.Contains(s, ":") {
			return appendOptionReply(out, o, repErrInvalid, []byte("a context begins with its namespace")), goOn, nil
		}
	}
	if wanted && e.Extents != nil {
		id := uint32(0)
		if o == optSetMetaContext {
			id, h.allocation = contextID, e
		}
		out = appendOptionReply(out, o, repMetaContext, binary.BigEndian.AppendUint32(nil, id), []byte(contextAllocation))
	}
	return appendOptionReply(out, o, repAck), goOn, nil
}
