package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Cost is what a process uses.
type Cost struct {
	RSS int64 // bytes, all that is resident
	// Anonymous is the part of RSS that is no file's, in bytes.
	Anonymous int64
	CPU       time.Duration // user and system, since the process began
	Threads   int
}

// Cost of the running daemon now.
func (d *Daemon) Cost() (Cost, error) {
	pid := d.Pid()
	if pid == 0 {
		return Cost{}, errors.New("the daemon does not run")
	}
	return ProcessCost(pid)
}

// ProcessCost is what a process uses now.
func ProcessCost(pid int) (Cost, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Cost{}, err
	}
	var c Cost
	for _, line := range strings.Split(string(b), "\n") {
		name, value, _ := strings.Cut(line, ":")
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			continue // not one of the numbers
		}
		switch name {
		case "VmRSS":
			c.RSS = n << 10
		case "RssAnon":
			c.Anonymous = n << 10
		case "Threads":
			c.Threads = int(n)
		}
	}
	b, err = os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Cost{}, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return Cost{}, fmt.Errorf("/proc/%d/stat is not understood: %q", pid, b)
	}
	for _, f := range fields[11:13] { // utime and stime, in ticks of 10 ms
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return Cost{}, err
		}
		c.CPU += time.Duration(n) * 10 * time.Millisecond
	}
	return c, nil
}
