package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// acceptPause is the wait after an Accept that failed for lack of something, like file descriptors.
const acceptPause = 100 * time.Millisecond

// server is one call of Serve.
type server struct {
	o       Options
	exports []Export

	// requests is what requests run in; it ends when the grace of a stop is over.
	requests context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[*conn]struct{}
}

// Serve answers on l until ctx ends, or accepting fails for good. It closes l. On return nothing of it runs any more:
// requests in flight when ctx ended were answered, or cancelled when Options.Grace was over. The devices stay open.
func Serve(ctx context.Context, l net.Listener, exports []Export, o Options) error {
	if err := checkExports(exports); err != nil {
		return errors.Join(err, l.Close())
	}
	s := &server{o: o.withDefaults(), exports: exports, conns: map[*conn]struct{}{}}
	s.requests, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer s.cancel()
	unhook := context.AfterFunc(ctx, func() { _ = l.Close() })
	err := s.accept(ctx, l)
	if unhook() {
		err = errors.Join(err, l.Close())
	}
	s.stop()
	return err
}

func (s *server) accept(ctx context.Context, l net.Listener) error {
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			s.admit(nc)
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: the listener was closed: %w", err)
		default:
			s.o.Logger.Warn("nbd: accept", "error", err)
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
		}
	}
}

// admit serves a connection, or closes it where there are too many.
func (s *server) admit(nc net.Conn) {
	c := newConn(s, nc)
	s.mu.Lock()
	full := len(s.conns) >= s.o.MaxConns
	if !full {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if full {
		s.o.Logger.Warn("nbd: too many connections", "limit", s.o.MaxConns)
		_ = nc.Close()
		return
	}
	s.wg.Go(func() {
		defer func() {
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		}()
		if err := c.serve(); err != nil {
			s.o.Logger.Warn("nbd: connection ended", "client", nc.RemoteAddr(), "error", err)
		}
	})
}

// stop ends the connections: no request is read any more, those in flight are answered.
func (s *server) stop() {
	s.mu.Lock()
	for c := range s.conns {
		c.shut()
	}
	s.mu.Unlock()
	timer := time.AfterFunc(s.o.Grace, func() {
		s.cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.cut()
		}
	})
	defer timer.Stop()
	s.wg.Wait()
}
