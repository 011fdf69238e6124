package metaraft

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Raft says the same of a peer that is away several times a second, and a peer may be away for days.
func TestRaftRepeatsItselfOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := newRaftLogger(slog.New(slog.NewTextHandler(&out, nil)))
		more := l.With("a", "b")
		for i := range 121 {
			l.Error("failed to heartbeat to", "peer", "n2", "backoff time", time.Duration(i), "error", errors.New("refused"))
			more.Warn("failed to heartbeat to", "peer", "n2", "error", fmt.Sprint(i))
			l.Warn("failed to heartbeat to", "peer", "n3")
			l.Warn("Election timeout reached, restarting election")
			time.Sleep(time.Second)
		}
		for what, want := range map[string]int{"peer=n2": 3, "peer=n3": 3, "Election": 3} {
			if got := strings.Count(out.String(), what); got != want {
				t.Errorf("%q %d times in two minutes, want %d", what, got, want)
			}
		}
		if !l.said.over() || l.said.over() {
			t.Error("it is over once")
		}
		l.Warn("failed to heartbeat to", "peer", "n2")
		if got := strings.Count(out.String(), "peer=n2"); got != 4 {
			t.Error("what comes back is not said at once")
		}
		for i := range 3 * maxSaid {
			l.Warn("x", "peer", i)
		}
		if n := len(l.said.of); n > maxSaid {
			t.Errorf("%d are remembered", n)
		}
	})
}
