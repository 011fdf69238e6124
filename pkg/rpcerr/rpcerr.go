// Package rpcerr maps errors to gRPC codes. It is the only place that does.
package rpcerr

import (
	"context"
	"errors"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// maxMessage bounds status.message, in bytes: it travels in an HTTP/2 header, whose list gRPC peers bound too.
const maxMessage = 4 << 10

// table is searched from the top. Codes that a caller reads as "it may still be running" come first: of an error that
// wraps two sentinels the cautious one counts.
var table = []struct {
	is   error
	code codes.Code
	name string // Name
}{
	{context.Canceled, codes.Canceled, "canceled"},
	{context.DeadlineExceeded, codes.DeadlineExceeded, "deadline-exceeded"},
	{volume.ErrUnavailable, codes.Unavailable, "unavailable"},
	{block.ErrClosed, codes.Unavailable, "closed"},
	{volume.ErrBusy, codes.Aborted, "busy"},
	{volume.ErrStale, codes.Aborted, "stale"},

	{volume.ErrInvalid, codes.InvalidArgument, "invalid"},
	{volume.ErrDenied, codes.PermissionDenied, "denied"},
	{volume.ErrNotFound, codes.NotFound, "not-found"},
	{volume.ErrExists, codes.AlreadyExists, "exists"},
	{volume.ErrInUse, codes.FailedPrecondition, "in-use"},
	{volume.ErrOutOfRange, codes.OutOfRange, "out-of-range"},
	{block.ErrRange, codes.OutOfRange, "range"},
	{volume.ErrNoSpace, codes.ResourceExhausted, "no-space"},
	{volume.ErrQuota, codes.ResourceExhausted, "quota"},
	{volume.ErrDataLoss, codes.DataLoss, "data-loss"},
}

// Name is a stable name for the sentinel that an error wraps, "" for none: what passes between parts of one cluster, where
// a code would say too little.
func Name(err error) string {
	for _, row := range table {
		if errors.Is(err, row.is) {
			return row.name
		}
	}
	return ""
}

// remote is an error that another process told of.
type remote struct {
	message string
	is      error
}

func (r remote) Error() string { return r.message }
func (r remote) Unwrap() error { return r.is }

// Named is an error of another process: its message, wrapping the sentinel of that name, if there is one.
func Named(name, message string) error {
	for _, row := range table {
		if row.name == name {
			return remote{message, row.is}
		}
	}
	return errors.New(message)
}

// Code is the gRPC code of an error: OK for nil, Internal for one that wraps no sentinel. An error that is a gRPC
// status already keeps its code.
func Code(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	for _, row := range table {
		if errors.Is(err, row.is) {
			return row.code
		}
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) && s.GRPCStatus().Code() != codes.Unknown {
		return s.GRPCStatus().Code()
	}
	return codes.Internal
}

// Error is the gRPC error of err: its code, its message, and no details. Nil stays nil.
func Error(err error) error {
	return WithCode(Code(err), err)
}

// WithCode is the gRPC error of err under another code.
func WithCode(c codes.Code, err error) error {
	if c == codes.OK {
		return nil
	}
	return status.Error(c, message(err))
}

// message is the text of an error, valid UTF-8 and bounded.
func message(err error) string {
	m := err.Error()
	if s, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		m = s.GRPCStatus().Message()
	}
	m = strings.ToValidUTF8(m, string(utf8.RuneError))
	if m == "" {
		m = "internal error without a message"
	}
	if len(m) > maxMessage {
		n := maxMessage
		for n > 0 && !utf8.RuneStart(m[n]) {
			n--
		}
		m = m[:n] + " ..."
	}
	return m
}
