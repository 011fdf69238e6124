package engine

import (
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
)

// started is where the machines' clock begins.
var started = time.Now()

// now is the machines' monotonic time.
func now() replication.Now { return replication.Now(time.Since(started)) }
