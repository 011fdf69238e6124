package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ballast-csi/ballast/pkg/block"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Operations, the values of the label op.
const (
	opRead  = "read"
	opWrite = "write"
	opZero  = "discard"
	opFlush = "flush"
)

type ioMetrics struct {
	operations, bytes, errors *prometheus.CounterVec
	duration                  *prometheus.HistogramVec
}

func newIOMetrics() ioMetrics {
	labels := []string{"volume", "op"}
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ballast_replica_io_" + name, Help: help}, labels)
	}
	return ioMetrics{
		operations: counter("operations_total", "Requests to the replica of the volume that this node has, from its engine, here or elsewhere."),
		bytes:      counter("bytes_total", "Bytes of these requests."),
		errors:     counter("errors_total", "Requests of these that were answered with an error."),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "ballast_replica_io_duration_seconds",
			Help:    "How long these requests took.",
			Buckets: []float64{.00005, .0002, .001, .005, .025, .1, .5, 2.5, 10},
		}, labels),
	}
}

// operation counts one kind of request of one volume.
type operation struct {
	operations, bytes, errors prometheus.Counter
	duration                  prometheus.Observer
}

func (m ioMetrics) operation(id volume.ID, op string) operation {
	l := []string{string(id), op}
	return operation{
		operations: m.operations.WithLabelValues(l...),
		bytes:      m.bytes.WithLabelValues(l...),
		errors:     m.errors.WithLabelValues(l...),
		duration:   m.duration.WithLabelValues(l...),
	}
}

func (o operation) done(start time.Time, n int64, err error) error {
	o.operations.Inc()
	if n > 0 {
		o.bytes.Add(float64(n))
	}
	if err != nil {
		o.errors.Inc()
	}
	o.duration.Observe(time.Since(start).Seconds())
	return err
}

// device counts what passes.
type device struct {
	block.Device
	read, write, zero, flush operation
}

// Device returns dev with its requests counted under the volume's id, until Forget.
func (m *Metrics) Device(id volume.ID, dev block.Device) block.Device {
	return &device{
		Device: dev,
		read:   m.io.operation(id, opRead),
		write:  m.io.operation(id, opWrite),
		zero:   m.io.operation(id, opZero),
		flush:  m.io.operation(id, opFlush),
	}
}

// Forget drops the series of a volume that is detached.
func (m *Metrics) Forget(id volume.ID) {
	l := prometheus.Labels{"volume": string(id)}
	m.io.operations.DeletePartialMatch(l)
	m.io.bytes.DeletePartialMatch(l)
	m.io.errors.DeletePartialMatch(l)
	m.io.duration.DeletePartialMatch(l)
}

// ReadAt implements block.Device.
func (d *device) ReadAt(ctx context.Context, p []byte, off int64) error {
	start := time.Now()
	return d.read.done(start, int64(len(p)), d.Device.ReadAt(ctx, p, off))
}

// WriteAt implements block.Device.
func (d *device) WriteAt(ctx context.Context, p []byte, off int64) error {
	start := time.Now()
	return d.write.done(start, int64(len(p)), d.Device.WriteAt(ctx, p, off))
}

// Zero implements block.Device.
func (d *device) Zero(ctx context.Context, off, n int64) error {
	start := time.Now()
	return d.zero.done(start, n, d.Device.Zero(ctx, off, n))
}

// Flush implements block.Device.
func (d *device) Flush(ctx context.Context) error {
	start := time.Now()
	return d.flush.done(start, 0, d.Device.Flush(ctx))
}
