package disk

import (
	"os"
	"runtime"
)

// UseProcessors lets the Go runtime run as many goroutines at once as a process that works on Files needs, unless GOMAXPROCS
// is set.
//
// A read or write of a File is a system call that waits for the disk, and keeps its processor until the runtime takes it
// away, some 20 µs to 10 ms later: with one for each CPU a fast disk gets hardly more requests at once than there are CPUs
// (32 writers, 2 CPUs: 26k IOPS with 2 processors, 45k to 67k with 16). And goroutines that compute (hashes, TLS) keep the
// runtime from looking at the network as soon as there is one for each processor. With more of them than CPUs the kernel
// shares the CPUs out.
func UseProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(16, 4*runtime.NumCPU()))
	}
}
