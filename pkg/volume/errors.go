package volume

import "errors"

// Sentinel errors: one per kind of failure, wrapped with a message that names the cause and the next step. Services map
// them to gRPC codes in one place (pkg/rpcerr). An error that wraps none of these is internal.
var (
	// ErrInvalid: the request is malformed or asks for something unsupported; nothing was changed.
	ErrInvalid = errors.New("invalid argument")
	// ErrNotFound: the volume, snapshot, node, pool or path does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists: the name or path is taken by something incompatible with the request.
	ErrExists = errors.New("already exists")
	// ErrInUse: the state of the thing forbids it now (attached elsewhere, published, pinned).
	ErrInUse = errors.New("failed precondition")
	// ErrOutOfRange: a size or offset outside what is possible.
	ErrOutOfRange = errors.New("out of range")
	// ErrNoSpace: no pool has room or topology cannot be met; nothing was kept.
	ErrNoSpace = errors.New("no space")
	// ErrQuota: a tenant's quota forbids it; nothing was kept.
	ErrQuota = errors.New("quota exceeded")
	// ErrBusy: a conflicting operation is under way; the same call may be made again.
	ErrBusy = errors.New("busy")
	// ErrUnavailable: a part that is needed does not answer now; the work goes on or may be retried.
	ErrUnavailable = errors.New("unavailable")
	// ErrStale: a paging token or a version is no longer valid.
	ErrStale = errors.New("stale")
	// ErrDenied: whoever asks may not; nothing was changed.
	ErrDenied = errors.New("permission denied")
	// ErrDataLoss: stored bytes are known to be lost or damaged.
	ErrDataLoss = errors.New("data loss")
)
