package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Exit codes, documented in the root command's help.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitUnreachable = 4
	exitRefused     = 5
	exitInterrupted = 130
)

type usageError struct{ error }

func usage(err error) error { return usageError{err} }

func (e usageError) Unwrap() error { return e.error }

type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", path)
}

// probeSocket says in plain words why a daemon cannot be reached. gRPC's own error says it in none.
func probeSocket(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := dialUnix(ctx, path)
	if err == nil {
		return conn.Close()
	}
	const start = "start it with `systemctl start ballastd`, or `ballastd` as root"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("there is no socket %s: ballastd does not run here, or its socket is elsewhere; %s, or name the socket with --socket or %s", path, start, socketEnv)
	case errors.Is(err, syscall.ECONNREFUSED):
		err = fmt.Errorf("nobody listens on %s: ballastd has stopped or was killed; %s", path, start)
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("no permission to open %s: the admin socket is for root; try again with sudo", path)
	default:
		err = fmt.Errorf("cannot connect to %s: %w", path, err)
	}
	return unreachableError{err}
}

// explain returns the message and the exit code of an error.
func explain(err error) (string, int) {
	var u usageError
	var un unreachableError
	var r refusal
	switch {
	case errors.As(err, &u):
		return err.Error(), exitUsage
	case errors.As(err, &un):
		return err.Error(), exitUnreachable
	case errors.As(err, &r):
		return err.Error(), exitRefused
	case errors.Is(err, volume.ErrNotFound):
		return err.Error(), exitNotFound
	}
	// A wrapped status would be shown with gRPC's own prefix.
	var g interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &g) {
		return err.Error(), exitFailed
	}
	s := g.GRPCStatus()
	switch s.Code() {
	case codes.NotFound:
		return s.Message(), exitNotFound
	case codes.PermissionDenied, codes.FailedPrecondition, codes.AlreadyExists, codes.ResourceExhausted, codes.Aborted:
		return s.Message(), exitRefused
	case codes.InvalidArgument, codes.OutOfRange:
		return s.Message(), exitUsage
	case codes.Unavailable:
		return s.Message() + "; try again; `ballastctl cluster status` and the daemon's log say more", exitUnreachable
	case codes.DeadlineExceeded:
		return "no answer in time; `ballastctl cluster status` says whether a majority of the controllers answers; a change may still go on: look at the state before you try again, or wait longer with --timeout", exitUnreachable
	case codes.Canceled:
		return context.Canceled.Error(), exitInterrupted
	case codes.Unimplemented:
		return "this daemon does not know the call: it is older than ballastctl (compare `ballastctl version`), or --server names another of its ports (the admin API has the third after that of --listen)", exitFailed
	}
	return s.Message(), exitFailed
}
