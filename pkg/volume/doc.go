// Package volume is Ballast's vocabulary: the things the cluster keeps (volumes, snapshots, replicas, pools, nodes,
// quotas), their ids and states, and the sentinel errors that every layer above speaks in.
//
// It holds plain values. It does no I/O, reads no clock and imports nothing of Ballast.
package volume
