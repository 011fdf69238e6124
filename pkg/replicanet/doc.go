// Package replicanet carries the messages of package replication between nodes: codec, client and server.
//
// Two nodes share a few connections for all volumes; a volume's replica is reached over a link, which lies on one of them.
// The messages of a link therefore arrive in order and at most once, or the link ends: nothing is ever sent again by this
// package. A connection that breaks is made anew, and its links with it, as new ones: what is sent on an ended link goes
// nowhere.
//
// Messages are queued by Send and go out together, with one system call, by Flush or with the next flush of anyone whose
// link is on the same connection. So one who has several messages sends all, then flushes once. Where several requests
// are under way a flush first lets others run who may have something to send too, and answers to what came together go out
// together; where there is but one, nothing waits for anything.
//
// Data is not copied on its way to the socket or from it, but by TLS. Send says when its Data may be changed again, Receive
// when what it was given is taken back.
//
// Peers prove who they are by certificates of the cluster (package pki). Without TLS, which must be asked for by name, a
// checksum protects the data, and everybody on the network may say to be anybody.
package replicanet
