// Package replication is Ballast's replication protocol as three pure state machines:
//
//   - Membership, the controllers' record of a volume: who holds it, who is in sync. Every change is a compare-and-set.
//   - Engine, the one writer of an attached volume: it sends operations to replicas and acknowledges them to the client.
//   - Replica, one copy: it admits operations of one epoch and session and has its store carry them out.
//
// They do no I/O, read no clock and start no goroutines. A carrier steps them with events (method calls that give the
// time) and carries out the effects they return; calls on one machine must not overlap. The same events give the same
// effects: nothing depends on chance or on the order of a map.
//
// The scripts in testdata show what they do; testdata is the place to look a behaviour up.
package replication
