package fuseloop

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

const (
	fsType   = "fuse.ballast"
	fsSource = "ballast"
)

// mountPoint is a line of /proc/self/mountinfo.
type mountPoint struct {
	number string // "major:minor" of the filesystem
	path   string
	fsType string
	source string
}

func mountPoints() ([]mountPoint, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer file.Close()
	var all []mountPoint
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			all = append(all, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return all, nil
}

// parseMount parses a line as proc_pid_mountinfo(5) describes it.
func parseMount(line string) (mountPoint, bool) {
	before, after, ok := strings.Cut(line, " - ")
	left, right := strings.Fields(before), strings.Fields(after)
	if !ok || len(left) < 6 || len(right) < 2 {
		return mountPoint{}, false
	}
	return mountPoint{number: left[2], path: unescape(left[4]), fsType: right[0], source: unescape(right[1])}, true
}

// minor is the filesystem's number in fusectl, 0 if unknown.
func (m mountPoint) minor() uint32 {
	_, text, _ := strings.Cut(m.number, ":")
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// unescape undoes the kernel's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
