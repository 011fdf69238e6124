// Package report is what the guest tells the host over a virtio port: one JSON object in a line.
package report

// Kind of an Event.
type Kind string

const (
	// Acked says that the work numbered N of a stream, and all before it, was done and flushed.
	Acked Kind = "acked"
	// Value is a measured or found value, for people.
	Value Kind = "value"
	// Failed ends the scenario: Text says what went wrong.
	Failed Kind = "failed"
	// Done ends the scenario well.
	Done Kind = "done"
)

// Event is one line.
type Event struct {
	Kind Kind   `json:"kind"`
	Name string `json:"name,omitempty"` // of a stream or a value
	N    int64  `json:"n,omitempty"`
	Text string `json:"text,omitempty"`
}
