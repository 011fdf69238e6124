package metaraft

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger hands what raft logs to slog. What raft calls an error is nearly always a peer that does not answer: a
// warning. What it calls information is for whoever looks into raft.
type raftLogger struct {
	hclog.Logger // drops everything
	log          *slog.Logger
}

func newRaftLogger(log *slog.Logger) hclog.Logger {
	if log == nil {
		return hclog.NewNullLogger()
	}
	return raftLogger{hclog.NewNullLogger(), log}
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
func (l raftLogger) Warn(msg string, args ...any)  { l.emit(slog.LevelWarn, msg, args) }
func (l raftLogger) Error(msg string, args ...any) { l.emit(slog.LevelWarn, msg, args) }

func (l raftLogger) With(args ...any) hclog.Logger  { return raftLogger{l.Logger, l.log.With(args...)} }
func (l raftLogger) Named(string) hclog.Logger      { return l }
func (l raftLogger) ResetNamed(string) hclog.Logger { return l }
func (l raftLogger) IsDebug() bool                  { return l.log.Enabled(context.Background(), slog.LevelDebug) }
func (l raftLogger) IsInfo() bool                   { return l.log.Enabled(context.Background(), slog.LevelInfo) }
func (l raftLogger) IsWarn() bool                   { return true }
func (l raftLogger) IsError() bool                  { return true }
