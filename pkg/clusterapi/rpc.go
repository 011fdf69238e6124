package clusterapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/rpcerr"
	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// codecName is the content subtype of the messages.
	codecName = "ballast-json"
	// maxMessage bounds a message, in bytes.
	maxMessage = 8 << 20
	// errorKey is the trailer that names an error's sentinel.
	errorKey = "ballast-error"
)

type codec struct{}

func (codec) Name() string                       { return codecName }
func (codec) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (codec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

func init() { encoding.RegisterCodec(codec{}) }

// none is a message without content.
type none struct{}

// unary describes a method of a service whose server is an S.
func unary[S, Req, Resp any](service, name string, call func(S, context.Context, *Req) (Resp, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, decode func(any) error, in grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := decode(req); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, req any) (any, error) {
			resp, err := call(srv.(S), ctx, req.(*Req))
			if err != nil {
				return nil, fail(func(md metadata.MD) { _ = grpc.SetTrailer(ctx, md) }, err)
			}
			return &resp, nil
		}
		if in == nil {
			return handle(ctx, req)
		}
		return in(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + service + "/" + name}, handle)
	}}
}

// fail is the gRPC error of err, whose kind goes into the trailer.
func fail(trailer func(metadata.MD), err error) error {
	if name := rpcerr.Name(err); name != "" {
		trailer(metadata.Pairs(errorKey, name))
	}
	return rpcerr.Error(err)
}

// invoke calls a method. What did not reach the other side, or came back without an answer, is volume.ErrUnavailable: its
// outcome is unknown.
func invoke[Resp, Req any](ctx context.Context, cc grpc.ClientConnInterface, service, name string, req *Req) (Resp, error) {
	var resp Resp
	var trailer metadata.MD
	err := cc.Invoke(ctx, "/"+service+"/"+name, req, &resp, grpc.CallContentSubtype(codecName), grpc.Trailer(&trailer))
	return resp, received(ctx, trailer, err)
}

// received turns a gRPC error back into what it was on the other side.
func received(ctx context.Context, trailer metadata.MD, err error) error {
	if err == nil {
		return nil
	}
	message := status.Convert(err).Message()
	if names := trailer.Get(errorKey); len(names) > 0 {
		err := rpcerr.Named(names[0], message)
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			// It was the other side's, or ours that it learned of.
			return fmt.Errorf("%w: %w", err, volume.ErrUnavailable)
		}
		return err
	}
	switch c := status.Code(err); c {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		if ctxErr := ctx.Err(); ctxErr != nil {
			return fmt.Errorf("%s: %w: %w", message, ctxErr, volume.ErrUnavailable)
		}
		return fmt.Errorf("%s: %w", message, volume.ErrUnavailable)
	case codes.PermissionDenied, codes.Unauthenticated:
		return fmt.Errorf("%s: %w", message, errRefused)
	case codes.Unimplemented:
		return fmt.Errorf("the other side is of an older version: %s: %w", message, volume.ErrUnavailable)
	}
	return errors.New(message)
}

// errRefused: the other side does not take calls from this node.
var errRefused = errors.New("refused by the other side")
