package metrics

import "github.com/prometheus/client_golang/prometheus"

var (
	descRaftLeads   = desc("raft_leader", "1 on the controller that leads, else 0.")
	descRaftKnows   = desc("raft_leader_known", "1 while this controller knows of a leader, itself or another; 0 everywhere means that nothing can be changed.")
	descRaftTerm    = desc("raft_term", "Term of the controllers' log; each election begins one.")
	descRaftApplied = desc("raft_applied_index", "Entry of the controllers' log up to which this controller has applied it.")
	descRaftCommit  = desc("raft_commit_index", "Entry of the controllers' log up to which this controller knows it to be on a majority.")
	descRaftVoters  = desc("raft_voters", "Controllers that count for a majority.")
)

// raftCollector reads how this controller is when it is scraped.
type raftCollector struct{ look func() Raft }

// Describe implements prometheus.Collector.
func (raftCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descRaftLeads, descRaftKnows, descRaftTerm, descRaftApplied, descRaftCommit, descRaftVoters} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c raftCollector) Collect(ch chan<- prometheus.Metric) {
	r := c.look()
	for _, x := range []struct {
		d *prometheus.Desc
		v float64
	}{
		{descRaftLeads, truth(r.Leads)}, {descRaftKnows, truth(r.HasLeader)}, {descRaftTerm, float64(r.Term)},
		{descRaftApplied, float64(r.Applied)}, {descRaftCommit, float64(r.Committed)}, {descRaftVoters, float64(r.Voters)},
	} {
		ch <- prometheus.MustNewConstMetric(x.d, prometheus.GaugeValue, x.v)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
