package metaraft

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/hashicorp/go-hclog"

	"github.com/ballast-csi/ballast/pkg/repeat"
)

// raftLogger hands what raft logs to slog. What raft calls an error is nearly always a peer that does not answer: a
// warning, and of the same of the same peer, which raft says several times a second, one a minute. What it calls
// information is for whoever looks into raft.
type raftLogger struct {
	hclog.Logger // drops everything
	log          *slog.Logger
	said         *said
}

func newRaftLogger(log *slog.Logger) raftLogger {
	return raftLogger{hclog.NewNullLogger(), log, &said{}}
}

// said is what raft has warned of lately.
type said struct {
	mu sync.Mutex
	of map[string]*repeat.Trouble
}

// maxSaid bounds it: raft has some twenty warnings, and few peers.
const maxSaid = 256

// again tells whether to say something once more. What it is about comes first in args.
func (s *said) again(msg string, args []any) bool {
	if len(args) > 1 {
		msg += fmt.Sprint(" ", args[1])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.of[msg]
	if t == nil {
		if s.of == nil || len(s.of) >= maxSaid {
			s.of = map[string]*repeat.Trouble{}
		}
		t = &repeat.Trouble{}
		s.of[msg] = t
	}
	return t.Again()
}

// over forgets it all, and tells whether there was any.
func (s *said) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := len(s.of) > 0
	s.of = nil
	return was
}

func (l raftLogger) emit(level slog.Level, msg string, args []any) {
	if !l.log.Enabled(context.Background(), level) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	l.log.Log(context.Background(), level, "raft: "+msg, args...)
}

func (l raftLogger) Log(level hclog.Level, msg string, args ...any) {
	switch {
	case level >= hclog.Warn:
		l.Warn(msg, args...)
	case level == hclog.Info:
		l.Info(msg, args...)
	default:
		l.Debug(msg, args...)
	}
}

func (l raftLogger) Debug(msg string, args ...any) { l.emit(slog.LevelDebug, msg, args) }
func (l raftLogger) Info(msg string, args ...any)  { l.emit(slog.LevelDebug, msg, args) }
func (l raftLogger) Error(msg string, args ...any) { l.Warn(msg, args...) }

func (l raftLogger) Warn(msg string, args ...any) {
	level := slog.LevelDebug
	if l.said.again(msg, args) {
		level = slog.LevelWarn
	}
	l.emit(level, msg, args)
}

func (l raftLogger) With(args ...any) hclog.Logger {
	return raftLogger{l.Logger, l.log.With(args...), l.said}
}
func (l raftLogger) Named(string) hclog.Logger      { return l }
func (l raftLogger) ResetNamed(string) hclog.Logger { return l }
func (l raftLogger) IsDebug() bool                  { return l.log.Enabled(context.Background(), slog.LevelDebug) }
func (l raftLogger) IsInfo() bool                   { return l.log.Enabled(context.Background(), slog.LevelInfo) }
func (l raftLogger) IsWarn() bool                   { return true }
func (l raftLogger) IsError() bool                  { return true }
