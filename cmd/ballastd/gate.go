package main

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/rpcerr"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// gate lets calls through once the daemon is put together. The sockets are open before that, so that whoever asks gets
// an answer: identity and readiness always, anything else volume.ErrUnavailable.
type gate struct {
	// ready is asked once the gate is open.
	ready atomic.Pointer[func(context.Context) error]
	// doing says what is waited for.
	doing atomic.Pointer[string]
	// nodeOnly: this process is no controller, and never lets through what is for one.
	nodeOnly atomic.Bool
}

func newGate() *gate {
	g := &gate{}
	g.set("starting")
	return g
}

func (g *gate) set(doing string) { g.doing.Store(&doing) }

func (g *gate) open(ready func(context.Context) error) { g.ready.Store(&ready) }

// openNode opens the gate of a node that is no controller.
func (g *gate) openNode(ready func(context.Context) error) {
	g.nodeOnly.Store(true)
	g.open(ready)
}

// shut refuses calls from now on.
func (g *gate) shut() {
	g.set("stopping")
	g.ready.Store(nil)
}

// Ready is nil when calls are served and what was in use before the start has been brought back.
func (g *gate) Ready(ctx context.Context) error {
	if fn := g.ready.Load(); fn != nil {
		return (*fn)(ctx)
	}
	return g.closed()
}

// alive is nil while the process answers: what it waits for does not get better by starting it again.
func (g *gate) alive(context.Context) error { return nil }

func (g *gate) closed() error {
	if g.nodeOnly.Load() && g.ready.Load() != nil {
		return fmt.Errorf("this node is no controller of its cluster; ask on a node that is one: %w", volume.ErrUnavailable)
	}
	return fmt.Errorf("ballastd is %s: %w", *g.doing.Load(), volume.ErrUnavailable)
}

func (g *gate) admits(method string) bool {
	switch method {
	case adminpb.Admin_Version_FullMethodName, adminpb.Admin_Health_FullMethodName:
		return true
	}
	if strings.HasPrefix(method, "/csi.v1.Identity/") {
		return true
	}
	return g.ready.Load() != nil && (!g.nodeOnly.Load() || strings.HasPrefix(method, "/csi.v1.Node/"))
}

// unary puts the gate behind an interceptor. What orchestrators ask for is recorded as theirs; callers of the admin API
// are named there.
func (g *gate) unary(outer grpc.UnaryServerInterceptor) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		return outer(ctx, req, info, func(ctx context.Context, req any) (any, error) {
			if !g.admits(info.FullMethod) {
				return nil, rpcerr.Error(g.closed())
			}
			if strings.HasPrefix(info.FullMethod, "/csi.") {
				ctx = audit.WithActor(ctx, "csi")
			}
			return handler(ctx, req)
		})
	}
}

func (g *gate) stream(outer grpc.StreamServerInterceptor) grpc.StreamServerInterceptor {
	return func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return outer(srv, s, info, func(srv any, s grpc.ServerStream) error {
			if !g.admits(info.FullMethod) {
				return rpcerr.Error(g.closed())
			}
			return handler(srv, s)
		})
	}
}
