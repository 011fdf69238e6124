// Package clusterapi is how nodes and controllers of a cluster call each other: gRPC over mutual TLS.
//
// Two services: a node carries out what control.Agents asks of it; a controller answers what a node's agent, and the engines
// on it, ask of the cluster, and lets new nodes join. The messages are the plain structs of the two ports, as JSON: they
// gain fields as protobuf's do, an unknown one is passed over, a missing one is zero. Errors arrive as the sentinels of
// package volume that they were.
package clusterapi
