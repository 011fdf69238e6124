package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

func TestCode(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{volume.ErrInvalid, codes.InvalidArgument},
		{volume.ErrNotFound, codes.NotFound},
		{volume.ErrExists, codes.AlreadyExists},
		{volume.ErrInUse, codes.FailedPrecondition},
		{volume.ErrOutOfRange, codes.OutOfRange},
		{volume.ErrNoSpace, codes.ResourceExhausted},
		{volume.ErrQuota, codes.ResourceExhausted},
		{volume.ErrBusy, codes.Aborted},
		{volume.ErrStale, codes.Aborted},
		{volume.ErrUnavailable, codes.Unavailable},
		{volume.ErrDataLoss, codes.DataLoss},
		{block.ErrClosed, codes.Unavailable},
		{block.ErrRange, codes.OutOfRange},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.New("disk on fire"), codes.Internal},
		{status.Error(codes.Unimplemented, "no such method"), codes.Unimplemented},
		{status.Error(codes.Unknown, "?"), codes.Internal},
		{fmt.Errorf("%w, then %w", volume.ErrNotFound, context.Canceled), codes.Canceled},
		{fmt.Errorf("%w, then %w", volume.ErrNoSpace, volume.ErrUnavailable), codes.Unavailable},
	} {
		if got := Code(tt.err); got != tt.want {
			t.Errorf("Code(%v) = %s, want %s", tt.err, got, tt.want)
		}
		if tt.err == nil {
			continue
		}
		if got := Code(fmt.Errorf("volume v: %w", tt.err)); got != tt.want {
			t.Errorf("Code of wrapped %v = %s, want %s", tt.err, got, tt.want)
		}
	}
}

func TestError(t *testing.T) {
	if err := Error(nil); err != nil {
		t.Fatalf("Error(nil) = %v", err)
	}
	s, err := status.New(codes.NotFound, "gone").WithDetails(durationpb.New(1))
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range []error{
		fmt.Errorf("volume v is attached to node n1: %w", volume.ErrInUse),
		errors.New("disk on fire"),
		s.Err(),
	} {
		got := status.Convert(Error(in))
		if len(got.Details()) != 0 {
			t.Errorf("%v: status has details", in)
		}
		if got.Code() == codes.OK || got.Message() == "" {
			t.Errorf("%v: got %v", in, got)
		}
	}
	if got := status.Convert(Error(errors.New(""))).Message(); got == "" {
		t.Error("an internal error has no message")
	}
	if got := status.Convert(Error(errors.New("path a\xff"))).Message(); !utf8.ValidString(got) {
		t.Errorf("message %q is not UTF-8", got)
	}
	long := status.Convert(Error(errors.New(strings.Repeat("ü", maxMessage)))).Message()
	if len(long) > maxMessage+4 || !utf8.ValidString(long) {
		t.Errorf("message of %d bytes, valid %v", len(long), utf8.ValidString(long))
	}
}

// What goes to another process by name comes back as an error of the same kind.
func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for _, row := range table {
		if row.name == "" || seen[row.name] {
			t.Errorf("%v has no name of its own: %q", row.is, row.name)
		}
		seen[row.name] = true
		err := fmt.Errorf("what happened: %w", row.is)
		back := Named(Name(err), err.Error())
		if !errors.Is(back, row.is) || back.Error() != err.Error() {
			t.Errorf("%v came back as %v", err, back)
		}
	}
	if err := errors.New("other"); Name(err) != "" || Named("", "other").Error() != "other" {
		t.Error("an error of no kind is not kept")
	}
}
