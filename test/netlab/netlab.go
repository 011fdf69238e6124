// Package netlab makes a small network of namespaces on one machine: nodes on a bridge, whose packets can be dropped
// or held back from one to another in one direction. It needs root and Debian's iproute2 and nftables.
//
// Only the network is a namespace's own: processes in it share mounts, devices and process ids with the machine.
package netlab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
)

// Lab is a network. Its methods may be called at once.
type Lab struct {
	name   string
	bridge string
	nodes  []Node

	mu     sync.Mutex
	cut    map[[2]int]bool  // from, to: what is dropped on arrival
	slow   map[[2]int]*path // from, to
	tuns   map[int]*os.File
	closed bool

	forward sync.WaitGroup // of the goroutines that forward packets
}

// Node is one namespace.
type Node struct {
	// Name is "n1" and so on.
	Name string
	// Namespace is its name for ip-netns(8).
	Namespace string
	Addr      netip.Addr
}

// maxNodes fits the addresses of one lab.
const maxNodes = 9

// New makes a lab of n nodes. Labs of one machine have different numbers, 0 to 255; what an earlier one with the same
// number left is removed.
func New(number, n int) (*Lab, error) {
	if number < 0 || number > 255 || n < 1 || n > maxNodes {
		return nil, fmt.Errorf("no lab of number %d with %d nodes can be made", number, n)
	}
	l := &Lab{name: fmt.Sprintf("blst%d", number), cut: map[[2]int]bool{}, slow: map[[2]int]*path{}, tuns: map[int]*os.File{}}
	l.bridge = l.name + "br"
	for i := range n {
		l.nodes = append(l.nodes, Node{
			Name: fmt.Sprintf("n%d", i+1), Namespace: fmt.Sprintf("%s-n%d", l.name, i+1),
			Addr: netip.AddrFrom4([4]byte{10, 213, byte(number), byte(i + 1)}),
		})
	}
	if err := l.sweep(); err != nil {
		return nil, err
	}
	if err := l.build(number); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) build(number int) error {
	steps := [][]string{
		{"ip", "link", "add", l.bridge, "type", "bridge"},
		// The machine itself is on the network, as the clients of an admin are.
		{"ip", "addr", "add", fmt.Sprintf("10.213.%d.254/24", number), "dev", l.bridge},
		{"ip", "link", "set", l.bridge, "up"},
	}
	for i, n := range l.nodes {
		outside := l.veth(i)
		steps = append(steps,
			[]string{"ip", "netns", "add", n.Namespace},
			[]string{"ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", n.Namespace},
			[]string{"ip", "link", "set", outside, "master", l.bridge, "up"},
			[]string{"ip", "-n", n.Namespace, "addr", "add", n.Addr.String() + "/24", "dev", "eth0"},
			[]string{"ip", "-n", n.Namespace, "link", "set", "eth0", "up"},
			[]string{"ip", "-n", n.Namespace, "link", "set", "lo", "up"},
		)
	}
	for _, s := range steps {
		if err := run(s...); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) veth(i int) string { return fmt.Sprintf("%sv%d", l.name, i+1) }

// Nodes of the lab, in order.
func (l *Lab) Nodes() []Node { return l.nodes }

// Command is a command inside the network of node i. The process is the command itself, not a wrapper's child.
func (l *Lab) Command(i int, name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + l.nodes[i].Namespace, name}, args...)...)
}

// Cut drops every packet from one node to another until Heal. The other direction is left.
func (l *Lab) Cut(from, to int) error { return l.set(from, to, true) }

// Heal ends what Cut began; where nothing was cut it does nothing.
func (l *Lab) Heal(from, to int) error { return l.set(from, to, false) }

// Isolate cuts a node off from all others, in both directions.
func (l *Lab) Isolate(i int) error {
	var errs []error
	for j := range l.nodes {
		if j != i {
			errs = append(errs, l.Cut(i, j), l.Cut(j, i))
		}
	}
	return errors.Join(errs...)
}

// HealAll ends every cut and delay.
func (l *Lab) HealAll() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.cut)
	var errs []error
	for k := range l.slow {
		errs = append(errs, l.delay(k[0], k[1], 0, 0))
	}
	for i := range l.nodes {
		errs = append(errs, l.filter(i))
	}
	return errors.Join(errs...)
}

func (l *Lab) set(from, to int, cut bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cut {
		l.cut[[2]int{from, to}] = true
	} else {
		delete(l.cut, [2]int{from, to})
	}
	return l.filter(to)
}

// filter loads the rules of one node in one transaction.
func (l *Lab) filter(to int) error {
	var rules strings.Builder
	rules.WriteString("table ip ballast\ndelete table ip ballast\ntable ip ballast { chain in { type filter hook input priority 0;\n")
	for from := range l.nodes {
		if l.cut[[2]int{from, to}] {
			fmt.Fprintf(&rules, "ip saddr %s drop\n", l.nodes[from].Addr)
		}
	}
	rules.WriteString("}\n}\n")
	cmd := l.Command(to, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft in %s: %w: %s", l.nodes[to].Namespace, err, out)
	}
	return nil
}

// Close removes the network. Processes in it keep their namespace, without a link to anyone.
func (l *Lab) Close() error { return errors.Join(l.closeTuns(), l.sweep()) }

func (l *Lab) sweep() error {
	var errs []error
	for i := range maxNodes {
		// The link first: the kernel would remove it with the namespace, some time later.
		if there(l.veth(i)) {
			errs = append(errs, run("ip", "link", "delete", l.veth(i)))
		}
		ns := fmt.Sprintf("%s-n%d", l.name, i+1)
		if _, err := os.Stat("/run/netns/" + ns); err == nil {
			errs = append(errs, run("ip", "netns", "delete", ns))
		}
	}
	if there(l.bridge) {
		errs = append(errs, run("ip", "link", "delete", l.bridge))
	}
	return errors.Join(errs...)
}

func there(link string) bool {
	_, err := os.Stat("/sys/class/net/" + link)
	return err == nil
}

func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
