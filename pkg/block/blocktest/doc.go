// Package blocktest holds the conformance suite of block.Device, and devices in memory: Mem, Crashable, which forgets
// what was not flushed, and Faulty, which fails, delays and hangs on purpose.
package blocktest
