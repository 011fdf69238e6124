package fuseloop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ballast-csi/ballast/pkg/block/blocktest"
	"github.com/ballast-csi/ballast/pkg/frontend"
)

// TestMain is also the child process: a server of devices in memory that its parent kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("FUSELOOP_CHILD"); dir != "" {
		if err := serve(dir); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serve obeys lines on standard input: "attach NAME MIB" answers with the path; "hang NAME" makes its writes hang; "go
// NAME" lets them go on; "write NAME" makes this process write to the device itself; "detach NAME" detaches it.
func serve(dir string) error {
	f, err := New(context.Background(), Options{RunDir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	type device struct {
		*blocktest.Faulty
		path string
	}
	devices := map[string]device{}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var verb, name string
		var size int64
		fmt.Sscan(lines.Text(), &verb, &name, &size)
		switch verb {
		case "attach":
			dev := blocktest.NewFaulty(blocktest.NewMem(size << 20))
			path, err := f.Attach(context.Background(), name, dev, frontend.Options{BlockSize: 4096})
			if err != nil {
				return err
			}
			devices[name] = device{dev, path}
			fmt.Println(path)
		case "hang":
			devices[name].Set(blocktest.Write, blocktest.Fault{Hang: true})
			fmt.Println("hangs")
		case "write": // to its own device, in a thread of its own
			go func() {
				file, err := os.OpenFile(devices[name].path, os.O_RDWR|unix.O_DSYNC, 0)
				if err == nil {
					fmt.Println("writes")
					_, err = file.Write(make([]byte, 4096))
				}
				fmt.Println("wrote", err)
			}()
		case "detach":
			go func() { fmt.Println("detached", f.Detach(context.Background(), name)) }()
			fmt.Println("detaches")
		case "go":
			devices[name].Set(blocktest.Write, blocktest.Fault{})
			fmt.Println("goes")
		}
	}
	return f.Close()
}

// process is a child that serves.
type process struct {
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func startProcess(t *testing.T, dir string) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FUSELOOP_CHILD="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		p.kill()
		f, err := New(context.Background(), Options{RunDir: dir, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Errorf("take the run directory after the child: %v", err)
			return
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	if line := p.read(t); line != "ready" {
		t.Fatalf("the child says %q", line)
	}
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *process) read(t *testing.T) string {
	t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatalf("the child is gone: %v", err)
	}
	return strings.TrimSpace(line)
}

func (p *process) do(t *testing.T, format string, args ...any) string {
	t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
	return p.read(t)
}
