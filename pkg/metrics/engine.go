package metrics

import (
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ballast-csi/ballast/pkg/volume"
)

var (
	descEngineLive    = desc("engine_live", "1 while the volume's engine serves I/O, 0 while it is on its way there.", "volume")
	descEngineWaiting = desc("engine_waiting_requests", "Requests of the workload that the volume's engine has not answered.", "volume")
	descEngineDirty   = desc("engine_dirty_bytes", "What is not reconciled among the volume's replicas since it was attached.", "volume")

	descResyncDone = desc("resync_done_bytes", "What was copied to a replica since its resync began.", "volume", "replica")
	descResyncLeft = desc("resync_left_bytes", "What a replica still lacks, as far as is known.", "volume", "replica")
	descResyncRate = desc("resync_bytes_per_second", "How fast a replica is being copied to, lately.", "volume", "replica")
)

// engineCollector reads how the engines of this node are when it is scraped.
type engineCollector struct {
	look func() map[volume.ID]volume.EngineReport
}

// Describe implements prometheus.Collector.
func (engineCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descEngineLive, descEngineWaiting, descEngineDirty, descResyncDone, descResyncLeft, descResyncRate} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c engineCollector) Collect(ch chan<- prometheus.Metric) {
	engines := c.look()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	ids := slices.Sorted(maps.Keys(engines))
	for _, id := range ids[:min(len(ids), maxVolumes)] {
		e := engines[id]
		gauge(descEngineLive, truth(e.Phase == "live"), string(id))
		gauge(descEngineWaiting, float64(e.Waiting), string(id))
		gauge(descEngineDirty, float64(e.Dirty), string(id))
		for _, r := range e.Resyncs {
			gauge(descResyncDone, float64(r.Done), string(id), string(r.Replica))
			gauge(descResyncLeft, float64(r.Left), string(id), string(r.Replica))
			gauge(descResyncRate, float64(r.Rate), string(id), string(r.Replica))
		}
	}
}
