package meta

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Controller is what the cluster remembers of one of its controllers, so that one whose disk was put back to an older
// state is recognised: such a disk knows less than its controller promised.
type Controller struct {
	ID volume.NodeID `json:"id"`
	// Incarnation is made with the controller's directory.
	Incarnation string `json:"incarnation"`
	// Starts counts the starts of the controller in this incarnation; Session names the last of them.
	Starts  uint64 `json:"starts"`
	Session string `json:"session"`
	// Acknowledged is an index up to which the controller holds every entry.
	Acknowledged uint64 `json:"acknowledged"`
}

// ChangeKind says what happened to a controller.
type ChangeKind string

// Kinds of changes.
const (
	// Admit makes a controller known. It is refused with volume.ErrExists where one of another incarnation has the id.
	Admit ChangeKind = "admit"
	// Started says that a controller has started. It is refused with volume.ErrStale where a later start is known, or the
	// same one of another process: two copies of one disk.
	Started ChangeKind = "started"
	// Forget removes what is known of a controller that is no member any more.
	Forget ChangeKind = "forget"
)

// ControllerChange is the body of an entry of KindController.
type ControllerChange struct {
	Kind        ChangeKind    `json:"kind"`
	ID          volume.NodeID `json:"id"`
	Incarnation string        `json:"incarnation"`
	Starts      uint64        `json:"starts,omitempty"`
	Session     string        `json:"session,omitempty"`
}

// maxControllerName bounds incarnations and sessions, in bytes.
const maxControllerName = 64

// EncodeControllerChange makes the body of an entry. It returns volume.ErrInvalid where a value is out of bounds.
func EncodeControllerChange(c ControllerChange) ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return json.Marshal(c)
}

func (c ControllerChange) check() error {
	if c.ID == "" || len(c.ID) > volume.MaxNodeIDLen || c.Incarnation == "" || len(c.Incarnation) > maxControllerName || len(c.Session) > maxControllerName {
		return fmt.Errorf("controller %.64q, incarnation %.64q, session %.64q: a name is empty or too long: %w", c.ID, c.Incarnation, c.Session, volume.ErrInvalid)
	}
	return nil
}

func applyController(v *view, body []byte) (command.Result, error) {
	var c ControllerChange
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(&c)
	if err == nil && d.Decode(&struct{}{}) != io.EOF {
		err = fmt.Errorf("bytes after the value")
	}
	if err != nil {
		return nil, fmt.Errorf("controller change: %v: %w", err, volume.ErrInvalid)
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	key := controllers + string(c.ID)
	rec, known := load[Controller](v, key)
	other := known && rec.Incarnation != c.Incarnation
	switch c.Kind {
	case Admit:
		if other {
			return nil, fmt.Errorf("controller %s is known with another disk (incarnation %s): remove it first: %w", c.ID, rec.Incarnation, volume.ErrExists)
		}
		if !known {
			save(v, key, Controller{ID: c.ID, Incarnation: c.Incarnation})
		}
	case Started:
		switch {
		case !known:
			return nil, fmt.Errorf("controller %s is not known: %w", c.ID, volume.ErrNotFound)
		case other:
			return nil, fmt.Errorf("controller %s is known with another disk (incarnation %s, not %s): %w", c.ID, rec.Incarnation, c.Incarnation, volume.ErrStale)
		case c.Starts < rec.Starts || c.Starts == rec.Starts && c.Session != rec.Session:
			return nil, fmt.Errorf("controller %s: start %d is known already: its disk is a copy, or older than it was: %w", c.ID, rec.Starts, volume.ErrStale)
		}
		rec.Starts, rec.Session = c.Starts, c.Session
		save(v, key, rec)
	case Forget:
		if known && !other {
			v.del(key)
		}
	default:
		return nil, fmt.Errorf("controller change %.64q is unknown: %w", c.Kind, volume.ErrInvalid)
	}
	return command.Done{}, nil
}

// raise records what controllers hold.
func raise(v *view, marks []Mark) {
	for _, m := range marks {
		key := controllers + string(m.Controller)
		if rec, ok := load[Controller](v, key); ok && m.Index > rec.Acknowledged {
			rec.Acknowledged = m.Index
			save(v, key, rec)
		}
	}
}

// Controllers returns what is known of the cluster's controllers here, in order of id.
func (m *Machine) Controllers(ctx context.Context) (list []Controller, err error) {
	err = m.read(ctx, func(r *reader) error {
		return r.scan(controllers, "", func(_ string, b []byte) (bool, error) {
			c, err := decode[Controller](b)
			list = append(list, c)
			return true, err
		})
	})
	return list, err
}
