// Package metrics makes Ballast observable: Prometheus metrics, health and readiness over HTTP. No other package imports
// Prometheus.
//
// Names follow its conventions: base units (seconds, bytes), counters end in _total. State is read when it is scraped
// and costs nothing otherwise; I/O is counted as it passes, with a few atomic additions a request. Series per volume
// exist while it is attached here (I/O), or for the first maxVolumes volumes (state).
package metrics

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// State is what is shown of the cluster.
type State struct {
	Volumes   []volume.Volume
	Snapshots []volume.Snapshot
	// Conditions of the volumes that are not well.
	Conditions map[volume.ID][]volume.Condition
	Nodes      []volume.Node
	Quotas     []volume.Quota
}

// Raft is how a controller's share of the cluster's log is.
type Raft struct {
	Leads, HasLeader         bool
	Term, Applied, Committed uint64
	Voters                   int
}

// Metrics holds every metric of a process. Its methods may be called at once.
type Metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
	io       ioMetrics
}

// New returns the metrics of a process of that version. Nothing of the cluster is shown before Watch.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "ballast_rpc_duration_seconds",
			Help:    "How long calls of CSI and of the admin API took, by method and gRPC code.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"method", "code"}),
		io: newIOMetrics(),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "ballast_build_info",
		Help:        "Always 1; the labels say what is running.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		build, m.calls, m.io.operations, m.io.bytes, m.io.errors, m.io.duration,
	)
	return m
}

// Watch shows the state of the cluster from now on. It is called once. Look is called for each scrape, and returns an
// error while the state cannot be read.
func (m *Metrics) Watch(look func(context.Context) (State, error)) error {
	return m.registry.Register(stateCollector{look})
}

// WatchRaft shows this controller's share of the log from now on; also where the state cannot be read, which is when it is
// looked at. It is called once; look is called for each scrape.
func (m *Metrics) WatchRaft(look func() Raft) error { return m.registry.Register(raftCollector{look}) }

// WatchEngines shows the engines of this node from now on. It is called once; look is called for each scrape.
func (m *Metrics) WatchEngines(look func() map[volume.ID]volume.EngineReport) error {
	return m.registry.Register(engineCollector{look})
}

// Health answers for /healthz and /readyz.
type Health struct {
	// Alive is nil while the process works; an error means that it should be restarted.
	Alive func(context.Context) error
	// Ready is nil once calls are served.
	Ready func(context.Context) error
}

// Handler serves /metrics, /healthz and /readyz.
func (m *Metrics) Handler(h Health) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4,
		Timeout:             30 * time.Second,
		ErrorHandling:       promhttp.ContinueOnError,
	}))
	mux.HandleFunc("GET /healthz", check(h.Alive))
	mux.HandleFunc("GET /readyz", check(h.Ready))
	return mux
}

func check(fn func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := fn(ctx); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}
