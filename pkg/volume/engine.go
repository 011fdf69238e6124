package volume

// EngineReport is how the engine of a volume is, as the node that runs it tells.
type EngineReport struct {
	// Phase is what it does: "fencing", "committing" and "marking" until it is "live", "over" after its end.
	Phase string `json:"phase"`
	Epoch Epoch  `json:"epoch"`
	// Waiting is the number of the workload's requests that are not answered.
	Waiting int `json:"waiting,omitempty"`
	// Dirty is what is not reconciled among its replicas since the attach, in bytes.
	Dirty int64 `json:"dirty,omitempty"`
	// Resyncs are the replicas that are being brought up.
	Resyncs []Resync `json:"resyncs,omitempty"`
}

// Resync is how far the return of one replica has got.
type Resync struct {
	Replica ReplicaID `json:"replica"`
	// Stage is for people.
	Stage string `json:"stage,omitempty"`
	// Full: all of it is copied, because nobody knows what it missed.
	Full bool `json:"full,omitempty"`
	// Done and Left are bytes; Rate is bytes per second, lately. What is written meanwhile adds to Left.
	Done int64 `json:"done"`
	Left int64 `json:"left"`
	Rate int64 `json:"rate,omitempty"`
	// Snapshots is the number of snapshots that are still to be filled in.
	Snapshots int       `json:"snapshots,omitempty"`
	Since     Timestamp `json:"since,omitempty"`
}
