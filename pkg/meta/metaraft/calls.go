package metaraft

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

var (
	// errNotLeader: the controller that was asked does not lead; nothing was done.
	errNotLeader = errors.New("this controller does not lead")
	// errUnsent: the call did not leave this controller.
	errUnsent = errors.New("the controller cannot be reached")
	// errLost: whether the call was carried out is not known.
	errLost = errors.New("the connection to the controller was lost")
)

// callers keeps a connection for calls to each address.
type callers struct {
	mux *mux

	mu sync.Mutex
	to map[string]*caller
}

// maxCallers bounds the addresses: there are few controllers.
const maxCallers = 64

type caller struct {
	dialling chan struct{} // held by the one who dials

	mu      sync.Mutex
	conn    net.Conn // nil while there is none
	next    uint64
	waiting map[uint64]chan frame
}

// call asks a controller. errNotLeader, errUnsent: nothing was done. errLost, or ctx's error: unknown. Any other error is
// the controller's answer.
func (c *callers) call(ctx context.Context, address string, kind callKind, payload []byte) ([]byte, error) {
	c.mu.Lock()
	to := c.to[address]
	if to == nil {
		if len(c.to) >= maxCallers {
			c.to = nil // addresses of long ago; their connections end when they are closed at the other end or with the mux
		}
		if c.to == nil {
			c.to = map[string]*caller{}
		}
		to = &caller{dialling: make(chan struct{}, 1), waiting: map[uint64]chan frame{}}
		c.to[address] = to
	}
	c.mu.Unlock()
	f, err := to.call(ctx, c.mux, address, frame{kind: uint8(kind), payload: payload})
	if err != nil {
		return nil, err
	}
	switch f.kind {
	case answerOK:
		return f.payload, nil
	case answerNotLeader:
		return nil, errNotLeader
	}
	var r command.Refused
	if err := json.Unmarshal(f.payload, &r); err != nil {
		return nil, fmt.Errorf("answer of controller at %s: %v: %w", address, err, errLost)
	}
	return nil, r.Err()
}

func (c *caller) call(ctx context.Context, m *mux, address string, f frame) (frame, error) {
	if deadline, ok := ctx.Deadline(); ok {
		f.wait = time.Until(deadline)
	} else {
		f.wait = longestCall
	}
	if f.wait <= 0 {
		return f, context.DeadlineExceeded
	}
	answer := make(chan frame, 1)
	conn, err := c.connect(ctx, m, address)
	if err != nil {
		return f, fmt.Errorf("%w: %v", errUnsent, err)
	}
	c.mu.Lock()
	if c.conn != conn {
		c.mu.Unlock()
		return f, errUnsent
	}
	c.next++
	f.id = c.next
	c.waiting[f.id] = answer
	_ = conn.SetWriteDeadline(time.Now().Add(handshakeTime))
	if _, err := conn.Write(appendFrame(nil, f)); err != nil {
		c.drop(conn)
	}
	c.mu.Unlock()
	select {
	case a, ok := <-answer:
		if !ok {
			return f, errLost
		}
		return a, nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, f.id)
		c.mu.Unlock()
		return f, ctx.Err()
	}
}

func (c *caller) connect(ctx context.Context, m *mux, address string) (net.Conn, error) {
	select {
	case c.dialling <- struct{}{}:
		defer func() { <-c.dialling }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	conn, err := m.dial(ctx, address, forCalls)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	m.wg.Go(func() { c.receive(conn) })
	return conn, nil
}

// receive hands answers to those who wait, until the connection ends.
func (c *caller) receive(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		f, err := readFrame(in)
		c.mu.Lock()
		if err != nil {
			c.drop(conn)
			c.mu.Unlock()
			return
		}
		if answer := c.waiting[f.id]; answer != nil {
			delete(c.waiting, f.id)
			answer <- f
		}
		c.mu.Unlock()
	}
}

// drop ends a connection and tells all who wait. The caller holds mu.
func (c *caller) drop(conn net.Conn) {
	_ = conn.Close()
	if c.conn != conn {
		return
	}
	c.conn = nil
	for id, answer := range c.waiting {
		close(answer)
		delete(c.waiting, id)
	}
}

// refusal makes the answer of an error.
func refusal(err error) (uint8, []byte) {
	if errors.Is(err, errNotLeader) {
		return answerNotLeader, nil
	}
	r := command.Refuse(err)
	if errors.Is(err, errLost) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		r = command.Refuse(fmt.Errorf("%v: %w", err, volume.ErrUnavailable))
	}
	b, err := json.Marshal(r)
	if err != nil {
		return answerError, nil
	}
	return answerError, b
}
