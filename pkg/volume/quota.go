package volume

// Amounts are what a tenant uses, or may use at most.
type Amounts struct {
	// LogicalBytes is the sum of the sizes of volumes: each counts once, however many replicas it has.
	LogicalBytes int64 `json:"logicalBytes"`
	// PhysicalBytes is what volumes and snapshots occupy on pools: every replica and every holder counts.
	PhysicalBytes int64 `json:"physicalBytes"`
	Volumes       int64 `json:"volumes"`
	Snapshots     int64 `json:"snapshots"`
}

// Quota is a tenant's limits (zero: unlimited) and use.
type Quota struct {
	Tenant string  `json:"tenant"`
	Limit  Amounts `json:"limit"`
	Used   Amounts `json:"used"`
}
