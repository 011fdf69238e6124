// Package harness runs the real ballastd as a child process in a directory of its own, for tests, benchmarks and the
// demo: build, start, kill, restart; clients over its sockets; an orchestrator's way of calling it; and checks that
// nothing is left behind on the machine.
//
// Everything needs root. Nothing here ends processes or detaches devices that are not its own.
package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// Binaries are the paths of what Build made.
type Binaries struct {
	Ballastd, Ballastctl string
}

// Build builds both commands into dir. With race they carry the race detector, which makes them several times slower.
func Build(ctx context.Context, dir string, race bool) (Binaries, error) {
	root, err := moduleRoot()
	if err != nil {
		return Binaries{}, err
	}
	args := []string{"build", "-o", dir + "/"}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/ballastd", "./cmd/ballastctl")...)
	cmd.Dir = root
	if !race {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return Binaries{}, fmt.Errorf("go build: %w\n%s", err, out)
	}
	return In(dir), nil
}

// In names the commands in a directory that holds them already.
func In(dir string) Binaries {
	return Binaries{Ballastd: filepath.Join(dir, "ballastd"), Ballastctl: filepath.Join(dir, "ballastctl")}
}

func moduleRoot() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", fmt.Errorf("cannot tell where the sources are")
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(file)))
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		return "", fmt.Errorf("sources are not at %s: %w", root, err)
	}
	return root, nil
}
