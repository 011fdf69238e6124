package vm

import (
	"testing"
	"time"
)

// TestIOFlusher: with CAP_SYS_RESOURCE every thread of ballastd is an I/O flusher, and it warns of nothing.
func TestIOFlusher(t *testing.T) {
	run(t, 1024, 3*time.Minute, "flusher")
}

// TestOnlineExpand grows ext4, xfs, btrfs and a raw volume while they are in use.
func TestOnlineExpand(t *testing.T) {
	run(t, 1024, 5*time.Minute, "expand")
}

// TestWritebackWithLittleMemory: dirty pages whose only way out is through ballastd do not deadlock it.
func TestWritebackWithLittleMemory(t *testing.T) {
	run(t, 400, 8*time.Minute, "pressure", "-mib=512")
}
