package control

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// observer asks nodes how volumes are: each once for all of its volumes, and all nodes at the same time, so that the wait is
// that for one node. A node that does not answer is not asked again.
type observer struct {
	*Service
	nodes  []volume.Node
	silent map[volume.NodeID]bool
}

func (s *Service) observer(ctx context.Context) (*observer, error) {
	nodes, err := s.store.Nodes(ctx)
	return &observer{Service: s, nodes: nodes, silent: map[volume.NodeID]bool{}}, err
}

// sight is what is known of a volume just now.
type sight struct {
	volume.Volume
	// seen is what nodes said; one that was not asked, or did not answer, is missing.
	seen map[volume.NodeID]Observation
	// away are the replicas of which nothing can be known, left the number of those in sync that answer.
	away []awayReplica
	left int
	// quietOwner says why the node to which it is attached cannot be asked; "" where it was.
	quietOwner string
	// stranded: it is attached, and its node is as silent as every replica in sync: nobody can end that attachment.
	stranded bool
}

type awayReplica struct {
	volume.Replica
	why, safe string
}

// look asks of volumes. Those that are not Ready, or lost, are left alone.
func (o *observer) look(ctx context.Context, vs []volume.Volume) []sight {
	out := make([]sight, len(vs))
	type place struct{ subject, volume int }
	subjects, places := map[volume.NodeID][]Subject{}, map[volume.NodeID][]place{}
	ask := func(node volume.NodeID, i int, s Subject) {
		places[node] = append(places[node], place{len(subjects[node]), i})
		subjects[node] = append(subjects[node], s)
	}
	for i, v := range vs {
		out[i] = sight{Volume: v, seen: map[volume.NodeID]Observation{}}
		if v.State != volume.Ready || v.Lost {
			continue
		}
		owner := v.Owner == "" // it needs no other question
		for _, r := range v.Replicas {
			if why, _ := o.unreachable(r, o.nodes); why == "" {
				ask(r.Node, i, Subject{v.ID, r})
				owner = owner || r.Node == v.Owner
			}
		}
		if !owner {
			if out[i].quietOwner = o.silentOwner(v, o.nodes); out[i].quietOwner == "" {
				ask(v.Owner, i, Subject{Volume: v.ID})
			}
		}
	}
	for node, answers := range o.askAll(ctx, subjects) {
		for _, p := range places[node] {
			if p.subject < len(answers) {
				out[p.volume].seen[node] = answers[p.subject]
			}
		}
	}
	for i := range out {
		o.conclude(&out[i])
	}
	return out
}

// atOnce bounds the subjects in one question.
const atOnce = 256

func (o *observer) askAll(ctx context.Context, subjects map[volume.NodeID][]Subject) map[volume.NodeID][]Observation {
	answers := map[volume.NodeID][]Observation{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	maps.DeleteFunc(subjects, func(node volume.NodeID, _ []Subject) bool { return o.silent[node] })
	for node, of := range subjects {
		wg.Go(func() {
			var all []Observation
			var err error
			for part := range slices.Chunk(of, atOnce) {
				var got []Observation
				if got, err = o.ask(ctx, node, part); err != nil {
					break
				}
				all = append(all, got...)
			}
			mu.Lock()
			defer mu.Unlock()
			answers[node] = all
			if err != nil && ctx.Err() == nil {
				o.silent[node] = true
				o.o.Logger.Debug("a node does not tell how its volumes are", "node", node, "err", err)
			}
		})
	}
	wg.Wait()
	return answers
}

func (o *observer) ask(ctx context.Context, node volume.NodeID, of []Subject) ([]Observation, error) {
	limit, cancel := context.WithTimeout(ctx, o.o.FenceTimeout)
	defer cancel()
	got, err := o.agents.Observe(limit, node, of)
	if err == nil && len(got) != len(of) {
		err = fmt.Errorf("%d answers to %d questions: %w", len(got), len(of), volume.ErrUnavailable)
	}
	return got, err
}

// conclude says which replicas are away.
func (o *observer) conclude(x *sight) {
	if x.State != volume.Ready || x.Lost {
		return
	}
	for _, r := range x.Replicas {
		why, safe := o.unreachable(r, o.nodes)
		if _, answered := x.seen[r.Node]; why == "" && !answered {
			why, safe = fmt.Sprintf("node %s does not answer", r.Node), "see that ballastd runs there and the controllers reach it"
		}
		switch {
		case why != "":
			x.away = append(x.away, awayReplica{r, why, safe})
		case r.Role == volume.InSync:
			x.left++
		}
	}
	if a := x.Attachment; a != nil {
		x.stranded = x.left == 0 && o.judge(o.nodes).gone(a.Node)
	}
	switch _, answered := x.seen[x.Owner]; {
	case x.Attachment == nil: // another node may take over
		x.quietOwner = ""
	case x.Owner != "" && !answered && x.quietOwner == "":
		x.quietOwner = fmt.Sprintf("node %s, to which it is attached, does not answer", x.Owner)
	}
}

func (x sight) health() Health {
	h := Health{Volume: x.ID, Conditions: x.conditions(), Engine: x.engine(), LastFlush: map[volume.ReplicaID]volume.Timestamp{}}
	for _, r := range x.Replicas {
		if at := x.seen[r.Node].LastFlush; at > 0 {
			h.LastFlush[r.ID] = at
		}
	}
	return h
}

// engine is what the volume's engine tells.
func (x sight) engine() *volume.EngineReport { return x.seen[x.Owner].Engine }

func (x sight) isAway(id volume.ReplicaID) bool {
	return slices.ContainsFunc(x.away, func(a awayReplica) bool { return a.ID == id })
}
