// Package nbd serves block devices over the Network Block Device protocol: codec, negotiation and server.
//
// The protocol is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle negotiation with
// STARTTLS, INFO, GO, structured replies and the context base:allocation; then reads, writes, flushes, trims, zeroes and
// block status, many at once and answered in any order. docs/nbd.md has what is offered and how much a client may use.
//
// Safety: a write is answered after the device took it, one with FUA and a flush after the device's Flush. All
// connections to an export share one device, so a flush on one of them covers what was answered on the others.
//
// Codec (proto.go) and negotiation (handshake.go) are pure: bytes in, bytes out.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ballast-csi/ballast/pkg/block"
)

// Export is a device that clients may open by name.
type Export struct {
	// Name of at most MaxName bytes; "" is what a client gets that asks for no name.
	Name string
	// Description is for people, at most MaxName bytes.
	Description string
	Device      block.Device
	// ReadOnly refuses whatever changes bytes.
	ReadOnly bool
	// Extents is nil where it is not known what holds data; base:allocation is not offered then.
	//
	// It calls fn with the runs of [off, off+n) that may hold something else than zeros, in bytes, in order and not
	// overlapping, and stops at fn's first error and returns it.
	Extents func(ctx context.Context, off, n int64, fn func(off, n int64) error) error
}

// Options bound what clients may use. Zero values are the defaults.
type Options struct {
	Logger *slog.Logger
	// TLS, where it is set, is demanded of every client by STARTTLS, before it learns anything.
	TLS *tls.Config
	// MaxConns bounds the connections; more are closed at once. Each holds at most Window bytes of requests.
	MaxConns int
	// NegotiationTime bounds a connection's life before it has opened an export.
	NegotiationTime time.Duration
	// StallTime bounds the wait for the next MiB of a client that is in the middle of a request's payload, or takes no
	// answers.
	StallTime time.Duration
	// Grace is how long a stop waits for requests in flight before it cancels them.
	Grace time.Duration
}

const (
	// MaxName bounds the name of an export, in bytes: the protocol's own limit.
	MaxName = 4096
	// Window bounds the bytes of one connection's requests in flight; each counts for at least minCharge.
	Window = block.MaxIO
	// minCharge also bounds their number, to Window/minCharge.
	minCharge = 256 << 10
	// stallPiece is how many bytes a client must give or take within Options.StallTime.
	stallPiece = 1 << 20

	// DefaultMaxConns and the following are what zero Options mean.
	DefaultMaxConns        = 16
	DefaultNegotiationTime = 10 * time.Second
	DefaultStallTime       = 30 * time.Second
	DefaultGrace           = 5 * time.Second
)

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxConns == 0 {
		o.MaxConns = DefaultMaxConns
	}
	if o.NegotiationTime == 0 {
		o.NegotiationTime = DefaultNegotiationTime
	}
	if o.StallTime == 0 {
		o.StallTime = DefaultStallTime
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	return o
}

// checkExports refuses what clients could not tell apart or be told of.
func checkExports(exports []Export) error {
	seen := map[string]bool{}
	for _, e := range exports {
		switch {
		case e.Device == nil:
			return fmt.Errorf("export %q has no device", e.Name)
		case len(e.Name) > MaxName || len(e.Description) > MaxName:
			return errors.New("the name or the description of an export is too long")
		case seen[e.Name]:
			return fmt.Errorf("two exports have the name %q", e.Name)
		}
		seen[e.Name] = true
	}
	return nil
}
