package extentstore

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/ballast-csi/ballast/pkg/layer"
	"github.com/ballast-csi/ballast/pkg/region"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// set is of regions or extents.
type set map[uint32]bool

func (s set) runs() (out []region.Run) {
	var r region.Set
	for i := range s {
		r.Add(i)
	}
	out, _, _ = r.Runs(0, 1000)
	return out
}

func setOf(runs []region.Run) set {
	s := set{}
	for _, r := range runs {
		for i := r.First; i < r.End(); i++ {
			s[i] = true
		}
	}
	return s
}

// without are the members that o lacks.
func (s set) without(o set) (left []uint32) {
	for i := range s {
		if !o[i] {
			left = append(left, i)
		}
	}
	slices.Sort(left)
	return left
}

// modelJournal is what a journal should have; after a crash, what it must and what it may.
type modelJournal struct {
	states      []string // the last is the present one
	wil, wilMay set      // the log, and what may be in it after a crash as well
	peers       map[volume.ReplicaID]*modelPeer
}

type modelPeer struct {
	since     volume.ConfigVersion
	now, must set
	// maybe: whether it is there is not known, because a call was cut off.
	maybe bool
	// adding is what a call that was cut off vouched for with another tag.
	adding      set
	addingSince volume.ConfigVersion
}

func newModelJournal() *modelJournal {
	return &modelJournal{states: []string{""}, wil: set{}, wilMay: set{}, peers: map[volume.ReplicaID]*modelPeer{}}
}

// flushed: all that was noted is durable.
func (j *modelJournal) flushed() {
	for _, p := range j.peers {
		p.must = maps.Clone(p.now)
	}
}

// Few regions and extents, in several records each.
var (
	hotRegions = []uint32{0, 1, 63, 511, 512, 5000}
	hotMissed  = []uint32{0, 63, 64, 4095, 4096, 9000, 13000, 20000}
	modelPeers = []string{"a", "b", "c"}
)

func (w *world) some(from []uint32) set {
	s := set{}
	for range 1 + w.rng.IntN(4) {
		s[from[w.rng.IntN(len(from))]] = true
	}
	return s
}

// useJournal does one random operation of the protocol.
func (w *world) useJournal(v *modelVolume) (err error) {
	ctx, j := context.Background(), v.journal
	w.next++
	peer := volume.ReplicaID(modelPeers[w.rng.IntN(len(modelPeers))])
	m := j.peers[peer]
	switch w.rng.IntN(7) {
	case 0:
		state := fmt.Sprint("state ", w.next)
		j.states = append(j.states, state)
		if err = v.dev.SetState(ctx, []byte(state)); err == nil {
			j.states = []string{state}
		}
		w.note("%s of %s: %v", state, v.id, err)
	case 1, 2:
		s := w.some(hotRegions)
		maps.Copy(j.wilMay, s)
		if err = v.dev.MarkWIL(ctx, s.runs()); err == nil {
			maps.Copy(j.wil, s)
		}
		w.note("mark %v of %s: %v", s.runs(), v.id, err)
	case 3:
		s := w.some(hotRegions)
		err = v.dev.ClearWIL(ctx, s.runs())
		for i := range s {
			delete(j.wil, i)
		}
		if w.rng.IntN(2) == 0 {
			w.p.settleWIL()
		}
		w.note("clear %v of %s: %v", s.runs(), v.id, err)
	case 4:
		if m == nil {
			m = &modelPeer{since: volume.ConfigVersion(w.next), now: set{}, must: set{}, maybe: true}
			j.peers[peer] = m
		}
		err = v.dev.TrackMissed(ctx, replication.MissedTag{Peer: peer, Since: volume.ConfigVersion(w.next)})
		w.note("track %s by %s: %v", peer, v.id, err)
		if err == nil {
			m.maybe = false
			j.flushed()
		}
	case 5:
		if w.rng.IntN(3) > 0 { // notes are more frequent than all else
			break
		}
		if w.rng.IntN(2) == 0 {
			if m != nil {
				m.maybe = true
			}
			err = v.dev.DropMissed(ctx, peer)
			w.note("drop %s by %s: %v", peer, v.id, err)
			if err == nil {
				delete(j.peers, peer)
				j.flushed()
			}
			return err
		}
		s := w.some(hotMissed)
		if m == nil {
			m = &modelPeer{since: volume.ConfigVersion(w.next), now: set{}, must: set{}, maybe: true}
			j.peers[peer] = m
		}
		m.adding, m.addingSince = s, volume.ConfigVersion(w.next)
		maps.Copy(m.now, s)
		err = v.dev.AddMissed(ctx, replication.MissedTag{Peer: peer, Since: m.addingSince}, s.runs())
		w.note("add %v to %s by %s: %v", s.runs(), peer, v.id, err)
		if err == nil {
			m.since, m.adding, m.maybe = m.addingSince, nil, false
			j.flushed()
		}
		return err
	}
	for i := range w.some(hotMissed) {
		v.dev.NoteMissed(peer, int64(i)*layer.ExtentSize+5, 1)
		if m = j.peers[peer]; m != nil {
			m.now[i] = true
		}
	}
	return err
}

// compareJournal compares; after a crash what is found is taken over.
func (w *world) compareJournal(v *modelVolume, crashed bool) error {
	j := v.journal
	state := string(v.dev.State())
	if state != j.states[len(j.states)-1] && (!crashed || !slices.Contains(j.states, state)) {
		return fmt.Errorf("state of %s is %q, want the last of %q", v.id, state, j.states)
	}
	wil, may := setOf(v.dev.WIL()), j.wil
	if crashed {
		may = j.wilMay
	}
	if lost, more := j.wil.without(wil), wil.without(may); len(lost)+len(more) > 0 {
		return fmt.Errorf("write-intent log of %s lacks %v and has %v", v.id, lost, more)
	}
	found := map[volume.ReplicaID]*modelPeer{}
	for _, tag := range v.dev.Missed() {
		_, runs, err := missedOf(v.dev, tag.Peer, 2)
		if err != nil {
			return err
		}
		got := setOf(runs)
		found[tag.Peer] = &modelPeer{since: tag.Since, now: got, must: maps.Clone(got)}
		m := j.peers[tag.Peer]
		if m == nil || m.maybe && !crashed {
			return fmt.Errorf("%s tracks %s, which it should not", v.id, tag.Peer)
		}
		must := m.now
		if crashed {
			must = m.must
			if m.adding != nil && tag.Since == m.addingSince {
				m.since, must = m.addingSince, m.adding
			}
		}
		if lost, more := must.without(got), got.without(m.now); len(lost)+len(more) > 0 || tag.Since != m.since {
			return fmt.Errorf("what %s missed since %d, noted by %s since %d, lacks %v and has %v", tag.Peer, m.since, v.id, tag.Since, lost, more)
		}
	}
	for id, m := range j.peers {
		if found[id] == nil && (!m.maybe || !crashed) {
			return fmt.Errorf("%s does not track %s any more", v.id, id)
		}
	}
	if crashed {
		j.states, j.wil, j.wilMay, j.peers = []string{state}, wil, maps.Clone(wil), found
	}
	return nil
}
