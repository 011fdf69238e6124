// Package mount is the adapter to the host's mounts and filesystem tools: it probes, makes, checks, grows, mounts, binds,
// freezes and measures filesystems. Mounting goes through mount(8) (k8s.io/mount-utils), whose parsing of options nothing
// else reproduces; unmounting is a system call, because its errors must be told apart.
//
// Every method is idempotent. A mount is looked up in the kernel's mount table and never by touching the path, so that
// one whose device is dead can be found and removed.
//
// mkfs is never this package's decision alone: Decide takes the durable record of the volume and what Probe proved to
// be on the device.
package mount
