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

// What is delayed arrives late, in order, in that direction only; connections that are open go on.
func TestDelay(t *testing.T) {
	l, err := New(251, 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	socket := func(i int) net.PacketConn {
		t.Helper()
		var c net.PacketConn
		err := inside(l.nodes[i].Namespace, func() (err error) {
			c, err = net.ListenPacket("udp4", l.nodes[i].Addr.String()+":9000")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	socks := []net.PacketConn{socket(0), socket(1)}
	const packets = 20
	// send returns the time that passed until the first packet was there.
	send := func(from, to int) time.Duration {
		t.Helper()
		begin := time.Now()
		for i := range packets {
			if _, err := socks[from].WriteTo([]byte{byte(i)}, socks[to].LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
		var first time.Duration
		b := make([]byte, 1)
		for i := range packets {
			socks[to].SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, _, err := socks[to].ReadFrom(b); err != nil {
				t.Fatalf("packet %d: %v", i, err)
			}
			if int(b[0]) != i {
				t.Fatalf("packet %d came in place of %d", b[0], i)
			}
			if i == 0 {
				first = time.Since(begin)
			}
		}
		return first
	}
	const delay = 300 * time.Millisecond
	send(0, 1)
	if err := l.Delay(0, 1, delay, 2*delay); err != nil {
		t.Fatal(err)
	}
	if took := send(0, 1); took < delay {
		t.Errorf("a packet that is held back for %s took %s", delay, took)
	}
	if took := send(1, 0); took >= delay {
		t.Errorf("the other way took %s", took)
	}
	if err := l.Cut(0, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := socks[0].WriteTo([]byte{99}, socks[1].LocalAddr()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2*delay + 100*time.Millisecond) // it arrives, and is dropped
	if err := l.HealAll(); err != nil {
		t.Fatal(err)
	}
	if took := send(0, 1); took >= delay {
		t.Errorf("after it was healed a packet took %s", took)
	}
}
