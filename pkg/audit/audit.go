// Package audit is the append-only record of every change: who asked for what, when, and how it ended.
//
// The log is a file of JSON lines. An event is on disk when Record returns. At its size limit the file is renamed and a
// new one begun; a bounded number of old ones is kept.
package audit

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Event is one change.
type Event struct {
	Time   time.Time `json:"time"`
	Actor  string    `json:"actor"`
	Action string    `json:"action"`
	Object string    `json:"object"`
	Detail string    `json:"detail,omitempty"`
	// Outcome is "ok" or the error.
	Outcome string `json:"outcome"`
}

// OK is the outcome of what succeeded.
const OK = "ok"

// maxTail bounds what Tail returns.
const maxTail = 100000

// maxField bounds what one event carries of a text from outside, in bytes.
const maxField = 1024

// Options of a Log. Zero values are the defaults.
type Options struct {
	// MaxBytes of one file: 16 MiB.
	MaxBytes int64
	// Keep is how many old files are kept: 8.
	Keep int
	// Logger gets what could not be written.
	Logger *slog.Logger
	// Now is the clock.
	Now func() time.Time
}

// Log is an open audit log.
type Log struct {
	path string
	o    Options

	mu   sync.Mutex
	file *os.File
	size int64
}

type actorKey struct{}

// WithActor says who asks for what is done under ctx.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

// Actor is who asks; "system" where nobody was named: the reconciler and the nodes.
func Actor(ctx context.Context) string {
	if a, ok := ctx.Value(actorKey{}).(string); ok && a != "" {
		return a
	}
	return "system"
}

// Open opens the log at path, and makes it (mode 0600) where there is none. A line that a crash cut off is ended, so that
// the next event has a line of its own.
func Open(path string, o Options) (*Log, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 16 << 20
	}
	if o.Keep == 0 {
		o.Keep = 8
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &Log{path: path, o: o}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	return l, nil
}

func (l *Log) open() error {
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil && size > 0 {
		var last [1]byte
		if _, err = f.ReadAt(last[:], size-1); err == nil && last[0] != '\n' {
			_, err = f.Write([]byte{'\n'})
			size++
		}
	}
	if err == nil {
		err = syncDir(filepath.Dir(l.path))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size = f, size
	return nil
}

// Close closes the file. Record after it is dropped with a message.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// Record appends an event; it is durable on return. The change has been made already, so what cannot be written goes to
// the logger instead. The actor is that of ctx; outcome nil is OK.
func (l *Log) Record(ctx context.Context, action, object, detail string, outcome error) {
	e := Event{Time: l.o.Now().UTC(), Actor: clip(Actor(ctx)), Action: action, Object: clip(object), Detail: clip(detail), Outcome: OK}
	if outcome != nil {
		e.Outcome = clip(outcome.Error())
	}
	if err := l.append(e); err != nil {
		l.o.Logger.Error("audit event is not on disk", "error", err, "actor", e.Actor, "action", e.Action, "object", e.Object, "outcome", e.Outcome)
	}
}

func clip(s string) string {
	if len(s) > maxField {
		s = s[:maxField] + "…"
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

func (l *Log) append(e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return errors.New("the log is closed")
	}
	if l.size > 0 && l.size+int64(len(b)) > l.o.MaxBytes {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	n, err := l.file.Write(b)
	if err != nil {
		if n > 0 { // as when the disk is full: half a line would swallow the next event
			err = errors.Join(err, l.file.Truncate(l.size))
		}
		return err
	}
	l.size += int64(n)
	return l.file.Sync()
}

// rotate renames path to path.1, path.1 to path.2 and so on, and begins anew.
func (l *Log) rotate() error {
	keep := l.o.Keep
	if _, err := os.Lstat(l.path); errors.Is(err, fs.ErrNotExist) {
		keep = 0 // a try that could not begin anew has renamed them; once more, with each event, would drop all of them
	}
	for i := keep; i > 0; i-- {
		from := l.old(i - 1)
		if err := os.Rename(from, l.old(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	old := l.file
	if err := l.open(); err != nil {
		return err
	}
	return old.Close()
}

func (l *Log) old(i int) string {
	if i == 0 {
		return l.path
	}
	return fmt.Sprintf("%s.%d", l.path, i)
}

// Tail returns the last n events (100,000 at most), the oldest first; old files are read as far as needed. Lines that are no event are
// passed over.
func (l *Log) Tail(n int) ([]Event, error) {
	if n <= 0 {
		return nil, nil
	}
	n = min(n, maxTail)
	l.mu.Lock()
	defer l.mu.Unlock()
	var events []Event
	for i := 0; i <= l.o.Keep && len(events) < n; i++ {
		older, err := readLast(l.old(i), n-len(events))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
		events = append(older, events...)
	}
	return events, nil
}

func readLast(path string, n int) ([]Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var events []Event
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<10)
	for lines.Scan() {
		var e Event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			continue
		}
		if events = append(events, e); len(events) >= 2*n {
			events = slices.Clone(events[len(events)-n:])
		}
	}
	return events[max(0, len(events)-n):], lines.Err()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
