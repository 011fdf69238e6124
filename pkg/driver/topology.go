package driver

import (
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// topologyNode is the node that a topology names; false where it has a segment that no node of ours has.
func topologyNode(t *csi.Topology) (volume.NodeID, bool) {
	var node string
	for key, value := range t.GetSegments() {
		if !strings.EqualFold(key, volume.TopologyKey) { // keys are case-insensitive
			return "", false
		}
		node = value
	}
	return volume.NodeID(node), node != ""
}

// requirement is what a topology requirement asks for: the only nodes allowed, none meaning any, and those to try
// first, in order. It returns volume.ErrNoSpace where no node can meet it.
func requirement(r *csi.TopologyRequirement) (requisite, preferred []volume.NodeID, err error) {
	if len(r.GetRequisite()) > maxTopologies || len(r.GetPreferred()) > maxTopologies {
		return nil, nil, fmt.Errorf("accessibility_requirements: more than %d topologies: %w", maxTopologies, volume.ErrInvalid)
	}
	for _, t := range r.GetRequisite() {
		if len(t.GetSegments()) == 0 {
			return nil, nil, fmt.Errorf("accessibility_requirements: a topology without segments: %w", volume.ErrInvalid)
		}
		if n, ok := topologyNode(t); ok && !slices.Contains(requisite, n) {
			requisite = append(requisite, n)
		}
	}
	if len(r.GetRequisite()) > 0 && len(requisite) == 0 {
		return nil, nil, fmt.Errorf("accessibility_requirements: no requisite topology names a node by %s: %w", volume.TopologyKey, volume.ErrNoSpace)
	}
	for _, t := range r.GetPreferred() {
		n, ok := topologyNode(t)
		if !ok || slices.Contains(preferred, n) || len(requisite) > 0 && !slices.Contains(requisite, n) {
			continue
		}
		preferred = append(preferred, n)
	}
	return requisite, preferred, nil
}

// accessible are the topologies from which a volume can be reached: with required locality the nodes of its replicas, else
// every node, for which no list stands. (An orchestrator may keep the list for ever, and replicas move.)
func accessible(l volume.DataLocality, replicas []volume.Replica) []*csi.Topology {
	if l != volume.LocalityRequired {
		return nil
	}
	var nodes []volume.NodeID
	for _, r := range replicas {
		if !slices.Contains(nodes, r.Node) {
			nodes = append(nodes, r.Node)
		}
	}
	out := make([]*csi.Topology, 0, len(nodes))
	for _, n := range nodes {
		out = append(out, &csi.Topology{Segments: map[string]string{volume.TopologyKey: string(n)}})
	}
	return out
}
