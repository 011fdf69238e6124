package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// screen prints the show.
type screen struct {
	w       io.Writer
	colours bool
	blank   bool // the last line was
}

func newScreen(f *os.File) *screen {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &screen{w: f, colours: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s *screen) paint(code, text string) string {
	if !s.colours {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

const width = 78

// title opens the show.
func (s *screen) title(text, below string) {
	fmt.Fprintf(s.w, "\n  %s\n  %s\n", s.paint("1;36", text), s.paint("2", below))
}

// scene opens a part.
func (s *screen) scene(n int, title string) {
	number := fmt.Sprintf("── %d", n)
	rule := strings.Repeat("─", max(3, width-utf8.RuneCountInString(number+title)-2))
	s.gap()
	fmt.Fprintf(s.w, "%s %s %s\n", s.paint("36", number), s.paint("1", title), s.paint("36", rule))
}

// gap leaves one line blank.
func (s *screen) gap() {
	if !s.blank {
		fmt.Fprintln(s.w)
	}
	s.blank = false
}

// say explains.
func (s *screen) say(format string, args ...any) {
	s.blank = false
	fmt.Fprintf(s.w, "   %s\n", fmt.Sprintf(format, args...))
}

// did tells of a step that went well, and how long it took.
func (s *screen) did(what string, took time.Duration) {
	s.blank = false
	dots := strings.Repeat("·", max(2, width-14-utf8.RuneCountInString(what)))
	fmt.Fprintf(s.w, "   %s %s %s %s\n", s.paint("32", "✓"), what, s.paint("2", dots), s.paint("33", fmt.Sprintf("%8s", short(took))))
}

// proof is a fact that was checked.
func (s *screen) proof(format string, args ...any) {
	s.blank = false
	fmt.Fprintf(s.w, "   %s %s\n", s.paint("1;32", "✓"), s.paint("1", fmt.Sprintf(format, args...)))
}

const barColumns = 30

// bar draws how far something is and how long it still takes, over what it drew before; on paper not at all.
func (s *screen) bar(what string, done, total, rate int64) {
	if !s.colours || total <= 0 {
		return
	}
	part := int(done * barColumns / total)
	text := fmt.Sprintf("%s of %s", humanize.IBytes(uint64(done)), humanize.IBytes(uint64(total)))
	if rate > 0 {
		text += fmt.Sprintf(", %s/s, %s left", humanize.IBytes(uint64(rate)), (time.Duration((total-done)/rate) * time.Second).String())
	}
	fmt.Fprintf(s.w, "\r\x1b[K   %s %s%s %s", what, s.paint("36", strings.Repeat("█", part)), strings.Repeat("░", barColumns-part), text)
	s.blank = false
}

// barEnd draws the bar's end.
func (s *screen) barEnd(what string, total int64) {
	over := ""
	if s.colours {
		over = "\r\x1b[K"
	}
	fmt.Fprintf(s.w, "%s   %s %s %s\n", over, what, s.paint("36", strings.Repeat("█", barColumns)), humanize.IBytes(uint64(total)))
	s.blank = false
}

// command shows a command line and what it printed.
func (s *screen) command(line string, output []byte) {
	s.gap()
	fmt.Fprintf(s.w, "   %s %s\n", s.paint("2", "$"), s.paint("1", line))
	for _, l := range strings.Split(strings.TrimRight(string(output), "\n"), "\n") {
		fmt.Fprintf(s.w, "     %s\n", clip(l, 110))
	}
	fmt.Fprintln(s.w)
	s.blank = true
}

// clip cuts a line to n columns. Colours take none, and what is left of them is ended.
func clip(line string, n int) string {
	columns, escape, coloured := 0, false, false
	for i, r := range line {
		switch {
		case r == '\x1b':
			escape, coloured = true, true
		case escape:
			escape = r != 'm'
		case columns == n-1 && utf8.RuneCountInString(line[i:]) > 1:
			if coloured {
				return line[:i] + "…\x1b[0m"
			}
			return line[:i] + "…"
		default:
			columns++
		}
	}
	return line
}

func short(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
