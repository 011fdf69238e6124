package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// maxVolumes bounds the volumes that have series of their own.
	maxVolumes = 2000
	// scrapeTimeout bounds what one scrape may cost.
	scrapeTimeout = 10 * time.Second
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("ballast_"+name, help, labels, nil)
}

var (
	descReady     = desc("ready", "1 once calls are served, else 0.")
	descVolumes   = desc("volumes", "Volumes by state.", "state")
	descSnapshots = desc("snapshots", "Snapshots by state.", "state")
	descDiffering = desc("snapshots_differing", "Snapshots whose copies were compared and are not alike.")
	descHidden    = desc("volumes_without_series", "Volumes beyond the number that have series of their own.")

	descVolumeInfo      = desc("volume_info", "Always 1; the labels describe the volume.", "volume", "name", "tenant")
	descVolumeSize      = desc("volume_size_bytes", "Size of the volume.", "volume")
	descVolumePhysical  = desc("volume_physical_bytes", "What the volume's own layers occupy on pools, all replicas together.", "volume")
	descVolumeAttached  = desc("volume_attached", "1 while the volume is attached to the node.", "volume", "node")
	descVolumeCondition = desc("volume_condition", "1 while something is wrong with the volume.", "volume", "severity", "reason")
	descVolumeInSync    = desc("volume_replicas_in_sync", "Replicas of the volume that have every acknowledged write.", "volume")
	descVolumeWanted    = desc("volume_replicas_wanted", "Replicas that the volume is to have.", "volume")
	descHealth          = desc("volumes_health", "Ready volumes by their worst condition.", "health")
	descReplicas        = desc("replicas", "Replicas of all volumes by role.", "role")

	descPoolCapacity    = desc("pool_capacity_bytes", "What replicas may occupy in the pool.", "node", "pool")
	descPoolUsed        = desc("pool_used_bytes", "What replicas occupy in the pool.", "node", "pool")
	descPoolProvisioned = desc("pool_provisioned_bytes", "Sum of the sizes of the volumes placed in the pool.", "node", "pool")
	descPoolRatio       = desc("pool_over_provision_ratio", "Provisioned bytes that the pool allows, as a multiple of its capacity.", "node", "pool")

	descNodeSeen   = desc("node_last_seen_timestamp_seconds", "When the node last reported.", "node")
	descNodeInfo   = desc("node_info", "Always 1; the labels describe the node. state is what an admin wants of it: active, drained or emptying.", "node", "zone", "state")
	descQuotaUsed  = desc("quota_used", "What a tenant uses, in bytes or in number.", "tenant", "resource")
	descQuotaLimit = desc("quota_limit", "What a tenant may use, in bytes or in number; without a series there is no limit.", "tenant", "resource")
)

// stateCollector reads the state when it is scraped.
type stateCollector struct {
	look func(context.Context) (State, error)
}

// Describe implements prometheus.Collector.
func (stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descReady, descVolumes, descSnapshots, descDiffering, descHidden,
		descVolumeInfo, descVolumeSize, descVolumePhysical, descVolumeAttached, descVolumeCondition,
		descVolumeInSync, descVolumeWanted, descHealth, descReplicas,
		descPoolCapacity, descPoolUsed, descPoolProvisioned, descPoolRatio,
		descNodeSeen, descNodeInfo, descQuotaUsed, descQuotaLimit,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c stateCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s, err := c.look(ctx)
	if err != nil {
		gauge(descReady, 0)
		return
	}
	gauge(descReady, 1)
	volumes(s, gauge)
	pools(s.Nodes, gauge)
	quotas(s.Quotas, gauge)
}

type gaugeFunc func(d *prometheus.Desc, v float64, labels ...string)

func volumes(s State, gauge gaugeFunc) {
	states := map[volume.State]int{volume.Creating: 0, volume.Ready: 0, volume.Deleting: 0}
	roles := map[volume.ReplicaRole]int{volume.InSync: 0, volume.Stale: 0, volume.Filling: 0}
	health := map[volume.Severity]int{healthy: 0, volume.Degraded: 0, volume.Inaccessible: 0, volume.DataLoss: 0}
	for i, v := range s.Volumes {
		states[v.State]++
		inSync := 0
		for _, r := range v.Replicas {
			roles[r.Role]++
			if r.Role == volume.InSync {
				inSync++
			}
		}
		if v.State == volume.Ready {
			health[worst(s.Conditions[v.ID])]++
		}
		if i >= maxVolumes {
			continue
		}
		id := string(v.ID)
		gauge(descVolumeInfo, 1, id, v.Name, v.Tenant)
		gauge(descVolumeSize, float64(v.Size), id)
		gauge(descVolumePhysical, float64(v.PhysicalBytes), id)
		gauge(descVolumeInSync, float64(inSync), id)
		gauge(descVolumeWanted, float64(v.Parameters.Replicas), id)
		if v.Attachment != nil {
			gauge(descVolumeAttached, 1, id, string(v.Attachment.Node))
		}
		seen := map[[2]string]bool{}
		for _, cond := range s.Conditions[v.ID] {
			key := [2]string{string(cond.Severity), cond.Reason}
			if !seen[key] {
				gauge(descVolumeCondition, 1, id, key[0], key[1])
			}
			seen[key] = true
		}
	}
	for state, n := range states {
		gauge(descVolumes, float64(n), string(state))
	}
	for role, n := range roles {
		gauge(descReplicas, float64(n), string(role))
	}
	for h, n := range health {
		gauge(descHealth, float64(n), string(h))
	}
	gauge(descHidden, float64(max(0, len(s.Volumes)-maxVolumes)))

	states = map[volume.State]int{volume.Creating: 0, volume.Ready: 0, volume.Deleting: 0}
	differing := 0
	for _, sn := range s.Snapshots {
		states[sn.State]++
		if sn.CopiesDiffer() != nil {
			differing++
		}
	}
	gauge(descDiffering, float64(differing))
	for state, n := range states {
		gauge(descSnapshots, float64(n), string(state))
	}
}

// healthy stands beside the severities.
const healthy volume.Severity = "Healthy"

func worst(cs []volume.Condition) volume.Severity {
	rank := map[volume.Severity]int{healthy: 0, volume.Degraded: 1, volume.Inaccessible: 2, volume.DataLoss: 3}
	w := healthy
	for _, c := range cs {
		if rank[c.Severity] > rank[w] {
			w = c.Severity
		}
	}
	return w
}

func pools(ns []volume.Node, gauge gaugeFunc) {
	for _, n := range ns {
		gauge(descNodeSeen, float64(n.LastSeen)/1e9, string(n.ID))
		state := string(n.State)
		if n.State == volume.NodeActive {
			state = "active"
		}
		gauge(descNodeInfo, 1, string(n.ID), n.Zone, state)
		for _, p := range n.Pools {
			gauge(descPoolCapacity, float64(p.Capacity), string(n.ID), p.Name)
			gauge(descPoolUsed, float64(p.Used), string(n.ID), p.Name)
			gauge(descPoolProvisioned, float64(p.Provisioned), string(n.ID), p.Name)
			gauge(descPoolRatio, p.OverProvision, string(n.ID), p.Name)
		}
	}
}

func quotas(qs []volume.Quota, gauge gaugeFunc) {
	for _, q := range qs[:min(len(qs), maxVolumes)] {
		for _, r := range []struct {
			name        string
			used, limit int64
		}{
			{"logical_bytes", q.Used.LogicalBytes, q.Limit.LogicalBytes},
			{"physical_bytes", q.Used.PhysicalBytes, q.Limit.PhysicalBytes},
			{"volumes", q.Used.Volumes, q.Limit.Volumes},
			{"snapshots", q.Used.Snapshots, q.Limit.Snapshots},
		} {
			gauge(descQuotaUsed, float64(r.used), q.Tenant, r.name)
			if r.limit != 0 {
				gauge(descQuotaLimit, float64(r.limit), q.Tenant, r.name)
			}
		}
	}
}
