package fuseloop

import (
	"context"
	"log/slog"
	"testing"

	"github.com/ballast-csi/ballast/pkg/frontend"
	"github.com/ballast-csi/ballast/pkg/frontend/frontendtest"
)

func TestConformance(t *testing.T) {
	frontendtest.Run(t, func(t *testing.T) frontend.Frontend { return newFrontend(t, t.TempDir()) })
}

func newFrontend(t *testing.T, dir string) *Frontend {
	t.Helper()
	f, err := New(t.Context(), Options{RunDir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		// What was in use at Close is removed by the next one.
		next, err := New(context.Background(), Options{RunDir: dir, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Error(err)
			return
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}
