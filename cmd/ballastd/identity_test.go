package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func identityConfig(t *testing.T) config {
	return config{dataDir: t.TempDir(), node: "n1", cluster: &clusterConfig{}}
}

func TestIdentityOfFounder(t *testing.T) {
	cfg := identityConfig(t)
	for try, learn := range []bool{false, true, false} {
		i, err := openIdentity(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if want := try < 2; i.founded != want || !i.controller() {
			t.Errorf("start %d: founded %t, controller %t", try, i.founded, i.controller())
		}
		if learn {
			if err := i.setControllers([]string{"10.0.0.2:9820"}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// What is left of a member never becomes a second cluster.
func TestIdentityLost(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, cfg *config, dir string)
		want  string
	}{
		"the join was cut off before the certificate": {func(t *testing.T, _ *config, dir string) {
			if err := os.Remove(filepath.Join(dir, nodeFile)); err != nil {
				t.Fatal(err)
			}
		}, "cut off"},
		"a wiped disk": {func(t *testing.T, cfg *config, _ string) {
			cfg.dataDir = t.TempDir()
			cfg.cluster.controllers = []string{"10.0.0.2:9820"}
		}, "--controllers"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := identityConfig(t)
			i, err := openIdentity(t.Context(), cfg, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			if err := i.setControllers([]string{"10.0.0.2:9820"}); err != nil {
				t.Fatal(err)
			}
			test.spoil(t, &cfg, i.dir)
			if _, err := openIdentity(t.Context(), cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("it became something else: %v", err)
			}
		})
	}
	t.Run("a list of controllers that power took", func(t *testing.T) {
		cfg := identityConfig(t)
		i, err := openIdentity(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(i.dir, peersFile), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if i, err = openIdentity(t.Context(), cfg, slog.New(slog.DiscardHandler)); err != nil || i.founded {
			t.Errorf("it begins a cluster again: founded %t, %v", i.founded, err)
		}
	})
}
