package netlab

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

// receive names the variable that makes this program wait for one packet at an address.
const receive = "NETLAB_RECEIVE"

func TestMain(m *testing.M) {
	if addr := os.Getenv(receive); addr != "" {
		c, err := net.ListenPacket("udp", addr)
		if err == nil {
			fmt.Print("r")
			if _, _, err = c.ReadFrom(make([]byte, 1)); err == nil {
				fmt.Print("x")
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// Two nodes: what is cut is dropped in that direction only, and nothing is left behind.
func TestCut(t *testing.T) {
	l, err := New(250, 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		for _, left := range []string{"/sys/class/net/blst250br", "/sys/class/net/blst250v1", "/run/netns/blst250-n1"} {
			if _, err := os.Stat(left); err == nil {
				t.Errorf("%s is left", left)
			}
		}
	})
	// UDP: what passes one way needs no way back.
	passes := func(from, to int) bool {
		t.Helper()
		addr := l.Nodes()[to].Addr.String()
		server := l.Command(to, os.Args[0])
		server.Env = append(os.Environ(), receive+"="+addr+":9000")
		server.Stderr = os.Stderr
		out, err := server.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		read := make(chan bool)
		go func() { // ends with the process
			one := make([]byte, 1)
			for {
				if n, err := out.Read(one); n != 1 || err != nil {
					close(read)
					return
				}
				read <- true
			}
		}()
		defer func() {
			server.Process.Kill()
			for range read {
			}
			server.Wait()
		}()
		if !<-read {
			t.Fatal("the receiver does not start")
		}
		for range 10 {
			if out, err := l.Command(from, "bash", "-c", "echo x > /dev/udp/"+addr+"/9000").CombinedOutput(); err != nil {
				if _, left := err.(*exec.ExitError); !left {
					t.Fatalf("%v: %s", err, out)
				}
			}
			select {
			case ok := <-read:
				return ok
			case <-time.After(50 * time.Millisecond):
			}
		}
		return false
	}
	check := func(from, to int, want bool) {
		t.Helper()
		if got := passes(from, to); got != want {
			t.Errorf("a packet from %d to %d passes: %v, want %v", from, to, got, want)
		}
	}
	check(0, 1, true)
	if err := l.Cut(0, 1); err != nil {
		t.Fatal(err)
	}
	check(0, 1, false)
	check(1, 0, true)
	if err := l.Heal(0, 1); err != nil {
		t.Fatal(err)
	}
	check(0, 1, true)
	if err := l.Isolate(0); err != nil {
		t.Fatal(err)
	}
	check(1, 0, false)
	if err := l.HealAll(); err != nil {
		t.Fatal(err)
	}
	check(1, 0, true)
}
