package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/ballast-csi/ballast/pkg/keylock"
	"github.com/ballast-csi/ballast/pkg/repeat"
	"github.com/ballast-csi/ballast/pkg/rpcerr"
)

// changing are the calls after whose failure something may exist. Orchestrators read Internal as final, "nothing exists
// and nothing runs", which an unforeseen failure of these cannot promise.
var changing = map[string]bool{
	"CreateVolume":            true,
	"ControllerPublishVolume": true,
	"ControllerExpandVolume":  true,
	"ControllerModifyVolume":  true,
	"CreateSnapshot":          true,
	"NodeStageVolume":         true,
	"NodePublishVolume":       true,
	"NodeExpandVolume":        true,
}

// interceptor is what is done around every call: bounds, deadline, panics, codes and the log.
type interceptor struct {
	log     *slog.Logger
	timeout time.Duration
	// unhealthy is a plugin that says so: it is probed every few seconds.
	unhealthy *repeat.Trouble
}

func (i interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			err = &keylock.PanicError{Value: p, Stack: debug.Stack()}
		}
		if err = i.finish(ctx, info.FullMethod, req, start, err); err != nil {
			resp = nil
		}
	}()
	if m, ok := req.(proto.Message); ok {
		if err := checkLimits(m); err != nil {
			return nil, err
		}
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, i.timeout)
		defer cancel()
	}
	return handler(ctx, req)
}

// stream has no deadline of its own: a stream is as long as its snapshot.
func (i interceptor) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	start := time.Now()
	s := &limitedStream{ServerStream: ss}
	defer func() {
		if p := recover(); p != nil {
			err = &keylock.PanicError{Value: p, Stack: debug.Stack()}
		}
		err = i.finish(ss.Context(), info.FullMethod, s.req, start, err)
	}()
	return handler(srv, s)
}

// limitedStream checks and keeps the request of a stream.
type limitedStream struct {
	grpc.ServerStream
	req any
}

func (s *limitedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	s.req = m
	if m, ok := m.(proto.Message); ok {
		return checkLimits(m)
	}
	return nil
}

// finish maps a call's error and logs it.
func (i interceptor) finish(ctx context.Context, method string, req any, start time.Time, err error) error {
	code := rpcerr.Code(err)
	if code == codes.Internal && changing[path.Base(method)] {
		code = codes.Unavailable
		err = fmt.Errorf("unforeseen failure, repeat the call to learn the outcome: %w", err)
	}
	level := slog.LevelDebug
	switch code {
	case codes.OK:
	case codes.Internal, codes.Unavailable, codes.DataLoss:
		level = slog.LevelError
	default:
		level = slog.LevelInfo
	}
	if path.Base(method) == "Probe" {
		if code == codes.OK && i.unhealthy.Over() {
			i.log.Info("CSI probes are answered well again")
		}
		if code != codes.OK && !i.unhealthy.Again() {
			level = slog.LevelDebug
		}
	}
	if i.log.Enabled(ctx, level) {
		attrs := []slog.Attr{
			slog.String("method", method), slog.String("code", code.String()), slog.Duration("took", time.Since(start)),
			slog.String("request", sanitize(req)),
		}
		if err != nil {
			attrs = append(attrs, slog.String("error", err.Error()))
		}
		if p := (*keylock.PanicError)(nil); errors.As(err, &p) {
			attrs = append(attrs, slog.String("stack", string(p.Stack)))
		}
		i.log.LogAttrs(ctx, level, "CSI call", attrs...)
	}
	return rpcerr.WithCode(code, err)
}
