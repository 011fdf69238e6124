// Package agent is a node's composition root: it owns the node's pools, and for each volume attached here its replica,
// its kernel device and its mounts. It implements control.Agents for its own node, and the node's use cases for the CSI
// driver: stage, publish, expand, measure.
//
// A volume's filesystem is mounted once, at a private anchor in the run directory; staging paths are bind mounts of the
// anchor, targets bind mounts of staging paths. So a volume can have several staging paths, and after a crash the slow
// part (journal replay) happens at the anchor before any path that a workload sees is touched.
//
// Everything that is staged or published is recorded durably before it is done, and forgotten after it is undone. The
// kernel devices die with the process; at start the records say what to bring back. A path keeps its dead mount, which
// fails all I/O, until a live one takes its place: a workload never writes beneath it onto the host's disk.
//
// Close, the clean stop, writes out filesystems and raw devices and then lets the devices die like a crash does: unmounting
// under a running workload would make it write onto the host's disk. The records stay, so the next start restores.
package agent
