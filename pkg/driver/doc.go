// Package driver is the CSI plugin: the Identity, Controller, SnapshotMetadata and Node services, and the gRPC server
// that carries them on Unix sockets.
//
// Each service is a small type over an interface that it declares for itself. A service checks and translates; the use
// cases are behind those interfaces. Errors leave as the sentinels of package volume, and one interceptor maps them to
// codes. It is the only package that knows the CSI specification.
package driver
