// Package repeat keeps the log readable while the same thing goes wrong again and again.
package repeat

import (
	"sync"
	"time"
)

// pause is between two lines about a trouble that goes on.
const pause = time.Minute

// Trouble is something that may go wrong again and again. The log has it when it begins, then once a minute, and when it
// is over. The zero Trouble has not happened yet; several goroutines may use one.
type Trouble struct {
	mu   sync.Mutex
	said time.Time // zero: it is over
}

// Again notes that it went wrong, and tells whether to say so.
func (t *Trouble) Again() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.said.IsZero() && now.Sub(t.said) < pause {
		return false
	}
	t.said = now
	return true
}

// Over notes that it went well, and tells whether to say so: it had gone wrong before.
func (t *Trouble) Over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := !t.said.IsZero()
	t.said = time.Time{}
	return was
}
