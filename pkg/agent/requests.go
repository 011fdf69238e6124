package agent

import "github.com/ballast-csi/ballast/pkg/volume"

// Stage asks that a volume be made ready at a directory.
type Stage struct {
	Volume     volume.ID
	Path       string
	Capability volume.Capability
}

// Publish asks that a staged volume appear at a workload's path.
type Publish struct {
	Volume volume.ID
	// Staging is where it was staged.
	Staging    string
	Path       string
	Capability volume.Capability
	ReadOnly   bool
}

// Expand asks that what uses the volume at a path have all its size. Sizes in bytes; 0 is not given.
type Expand struct {
	Volume                    volume.ID
	Path                      string
	RequiredBytes, LimitBytes int64
}

// Usage of a volume at a path, in bytes and inodes. Of a block device only Total is known.
type Usage struct {
	Access                                   volume.Access
	Total, Used, Available                   int64
	TotalInodes, UsedInodes, AvailableInodes int64
}
