// Package agent is a node's composition root: it owns the node's pools and serves their replicas to engines, those of this
// node and of others; for each volume attached here it owns the engine, the kernel device and the mounts. It implements
// control.Agents for its own node, and the node's use cases for the CSI driver: stage, publish, expand, measure.
//
// Every run of an engine begins an epoch of its own. A call waits for it within its deadline; it goes on in the background,
// and the next call joins it. When an engine ends otherwise than by the node's doing, because its volume was taken away or
// its last replica lost writes, the device fails for good: what the page cache still holds must not reach a later attachment.
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
