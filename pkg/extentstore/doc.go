// Package extentstore is a pool: one data file of 64 KiB slots, and a Badger database beside it that says which slot
// holds which extent of which layer. It keeps replicas, which are chains of layers, and serves their bytes.
//
// The order of everything durable is: data is synced before the metadata that refers to it commits, and a slot is used
// again only after the commit that freed it is durable and readers that may have looked it up are gone. docs/format.md has
// the format.
//
// Locks, in the order in which they are taken: replica.gate, a range of replica.ranges, Pool.mu, the committer's turns, a
// stripe, and then the small ones (chain.dirtyMu, allocator.mu, journal.mu), under which nothing else is taken.
package extentstore

import (
	"log/slog"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Device is an open replica or snapshot. Close waits for requests in flight and flushes; afterwards every method
// returns block.ErrClosed.
type Device = interface {
	block.Device
	Close() error
}

// Options of a pool. Zero values are defaults.
type Options struct {
	// ID is given to a pool that is created; one that exists must have it. "" makes one up, and accepts any.
	ID volume.PoolID
	// Name is what people call it; default "default".
	Name string
	// Kind is dir by default.
	Kind volume.PoolKind
	// Device is the raw disk of a pool of kind disk: the pool's directory becomes the mount point of its filesystem.
	Device string
	// Wipe allows a raw disk that carries something to be overwritten. A disk that carries a pool is never wiped by it.
	Wipe bool
	// Capacity is what replicas may occupy, in bytes, the reserve not counted. Default: all that the filesystem has free
	// or the pool occupies already, less the reserve; for kind disk what was preallocated.
	Capacity int64
	// OverProvision bounds the sum of volume sizes to Capacity times it; at least 1, default 10. The pool only reports it.
	OverProvision float64
	// Reserve is kept beside the database, in bytes, so that deletes, merges and the database go on when the filesystem is
	// full. Default 256 MiB, at most a sixteenth of the filesystem.
	Reserve int64
	// CacheBytes bounds clean map pages in memory; default 32 MiB.
	CacheBytes int64
	// MergeRate bounds what background work reads and writes, in bytes per second; default 64 MiB/s. A full pool ignores it.
	MergeRate int64
	Logger    *slog.Logger

	// broken switches rules off, for tests of the tests.
	broken rules
	// salvage is for reading a pool that may be damaged: nothing is written, and what is bad is passed by.
	salvage bool
	// maxDirty replaces maxDirtyPages.
	maxDirty int64
	// maxMissed replaces maxMissedDirty.
	maxMissed int64
	// manual leaves all background work to Pool.step, for tests that decide what happens when.
	manual bool
}

func (o Options) withDefaults() Options {
	if o.Name == "" {
		o.Name = "default"
	}
	if o.Kind == "" {
		o.Kind = volume.PoolDir
	}
	if o.OverProvision < 1 {
		o.OverProvision = 10
	}
	if o.CacheBytes <= 0 {
		o.CacheBytes = 32 << 20
	}
	if o.MergeRate <= 0 {
		o.MergeRate = 64 << 20
	}
	if o.maxDirty == 0 {
		o.maxDirty = maxDirtyPages
	}
	if o.maxMissed == 0 {
		o.maxMissed = maxMissedDirty
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// rules are what the safety of data rests on, each of which a test may switch off to see that the suite notices.
type rules struct {
	commitBeforeSync    bool // metadata commits before the data it refers to is synced
	syncBeforeSnapshot  bool // data is synced before the dirty pages are copied
	ackBeforeCommit     bool // a flush answers without a commit
	reuseBeforeCommit   bool // a freed slot is used before the commit that freed it
	reuseBeforeGrace    bool // a freed slot is used while readers may still look at it
	splitPairs          bool // the two pages of a merge commit apart
	mergeWithoutLock    bool // a merge does not keep writers out of the extent
	cutWithoutBarrier   bool // a cut lets writes go on
	cutWithoutFlush     bool // a cut seals without a flush under the barrier
	discardForgetsBelow bool // a discard does not hide the layers below
	mergeForgetsZeros   bool // a merge loses the masks of zeros
	mergeWithoutCopy    bool // a merge marks blocks valid that it did not copy
	retryFailedSync     bool // a failed sync does not poison the pool
	resizeInMemory      bool // a new size is answered before it is durable
	markBeforeCommit    bool // a mark in the write-intent log is answered before it is durable
	clearStaysStored    bool // a region that is being taken out of the log counts as durably in it
	missedLeftOut       bool // a flush leaves out what peers missed
	tagBeforeMissed     bool // a tag is durable before what it vouches for
	dropInMemory        bool // a peer is forgotten in memory only
	stateInMemory       bool // a state is answered before it is durable
}
