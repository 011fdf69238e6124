// Package fuseloop is the frontend that shows a device to the kernel as a loop device on a FUSE file. DESIGN.md says why
// it is built the way it is.
package fuseloop
