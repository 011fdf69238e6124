package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"
)

type style string

// Styles are ANSI SGR sequences.
const (
	stylePlain style = ""
	styleHead  style = "1"
	styleGood  style = "32"
	styleWarn  style = "33"
	styleBad   style = "31"
	styleDim   style = "2"
)

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// isPerson tells whether somebody is there to answer a question; a variable for the tests' sake.
var isPerson = isTerminal

// colours tells whether w shows them, https://no-color.org. CLICOLOR_FORCE serves programs that pass our output on to a
// terminal.
func colours(w io.Writer) bool {
	if os.Getenv("NO_COLOR") != "" {
		return false
	}
	if v := os.Getenv("CLICOLOR_FORCE"); v != "" && v != "0" {
		return true
	}
	return isTerminal(w) && os.Getenv("TERM") != "dumb"
}

func paint(w io.Writer, s style, text string) string {
	if s == stylePlain || text == "" || !colours(w) {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// cell is one field of a table.
type cell struct {
	text  string
	style style
}

func plain(s string) cell { return cell{text: s} }

func orDash(s string) cell {
	if s == "" {
		return cell{"-", styleDim}
	}
	return plain(s)
}

// agoCell says how long ago t was.
func agoCell(t *time.Time) cell {
	if t == nil {
		return orDash("")
	}
	return plain(ageText(t, now()) + " ago")
}

// safe replaces what could move the cursor or colour a terminal: names come from outside.
func safe(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || (r >= 0x7f && r < 0xa0) {
			return '?'
		}
		return r
	}, s)
}

// table aligns its columns by the longest cell of each.
type table struct {
	head   []string
	rows   [][]cell
	widths []int
}

func (t *table) add(row []cell) {
	for i := range row {
		row[i].text = safe(row[i].text)
	}
	t.rows = append(t.rows, row)
	t.fit(row)
}

func (t *table) fit(row []cell) {
	for len(t.widths) < len(row) {
		t.widths = append(t.widths, utf8.RuneCountInString(t.head[len(t.widths)]))
	}
	for i, c := range row {
		t.widths[i] = max(t.widths[i], utf8.RuneCountInString(c.text))
	}
}

func (t *table) line(w io.Writer, row []cell) error {
	var b strings.Builder
	for i, c := range row {
		b.WriteString(paint(w, c.style, c.text))
		if i < len(row)-1 {
			b.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(c.text)+2))
		}
	}
	_, err := fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	return err
}

func (t *table) header(w io.Writer) error {
	row := make([]cell, len(t.head))
	for i, h := range t.head {
		row[i] = cell{h, styleHead}
	}
	t.fit(row)
	return t.line(w, row)
}

func (t *table) print(w io.Writer) error {
	if err := t.header(w); err != nil {
		return err
	}
	for _, r := range t.rows {
		if err := t.line(w, r); err != nil {
			return err
		}
	}
	return nil
}

// data writes v as JSON or YAML.
func (c *cli) data(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if c.output == "yaml" {
		if b, err = yaml.JSONToYAML(b); err != nil {
			return err
		}
		_, err = c.out.Write(b)
		return err
	}
	_, err = fmt.Fprintf(c.out, "%s\n", b)
	return err
}

func (c *cli) forPeople() bool { return c.output == "table" || c.output == "wide" }

// say reports what was done to people; with -o json or yaml only data is written.
func (c *cli) say(format string, args ...any) error {
	if !c.forPeople() {
		return nil
	}
	_, err := fmt.Fprintf(c.out, format+"\n", args...)
	return err
}

func sizeText(n int64) string {
	if n < 0 {
		return "-"
	}
	return humanize.IBytes(uint64(n))
}

func sizeCell(n int64) cell { return plain(sizeText(n)) }

func limitCell(n int64, text func(int64) string) cell {
	if n == 0 {
		return cell{"unlimited", styleDim}
	}
	return plain(text(n))
}

func countText(n int64) string { return humanize.Comma(n) }

// parseSize reads a size as Kubernetes and people write it: 100Gi, 100GiB, 1.5T, 4096.
func parseSize(s string) (int64, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || n > math.MaxInt64 {
		return 0, usage(fmt.Errorf("%q is no size; write it like 10Gi, 500M or 4096", s))
	}
	return int64(n), nil
}

// ageText is how long ago t was, short.
func ageText(t *time.Time, now time.Time) string {
	if t == nil {
		return "-"
	}
	d := now.Sub(*t)
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// meter draws a share of a whole.
func meter(part, whole int64) cell {
	if whole <= 0 {
		return cell{"-", styleDim}
	}
	share := float64(part) / float64(whole)
	s := styleGood
	switch {
	case share >= 0.95:
		s = styleBad
	case share >= 0.8:
		s = styleWarn
	}
	return cell{bar(part, whole), s}
}

// bar draws a share of a whole that is not 0, and says how many percent that is.
func bar(part, whole int64) string {
	share := float64(part) / float64(whole)
	const width = 10
	full := min(width, max(0, int(math.Round(share*width))))
	return fmt.Sprintf("%s%s %3.0f%%", strings.Repeat("█", full), strings.Repeat("░", width-full), share*100)
}

// field is one line of what `get` shows to people.
type field struct {
	name  string
	value cell
}

func (c *cli) describe(fields []field) error {
	w := 0
	for _, f := range fields {
		w = max(w, utf8.RuneCountInString(f.name))
	}
	for _, f := range fields {
		label := f.name
		if label != "" {
			label += ":"
		}
		_, err := fmt.Fprintf(c.out, "%s%s  %s\n", paint(c.out, styleHead, label), strings.Repeat(" ", w+1-utf8.RuneCountInString(label)), paint(c.out, f.value.style, safe(f.value.text)))
		if err != nil {
			return err
		}
	}
	return nil
}

// paragraph wraps text for a terminal of 80 columns.
func paragraph(text string) string {
	var b strings.Builder
	col := 0
	for i, word := range strings.Fields(safe(text)) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case col+1+n > 80:
			b.WriteByte('\n')
			col = 0
		default:
			b.WriteByte(' ')
			col++
		}
		b.WriteString(word)
		col += n
	}
	return b.String()
}
