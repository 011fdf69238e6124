package engine

import (
	"testing"
	"time"
)

func TestMeter(t *testing.T) {
	var m Meter
	if ops, p99 := m.Take(); ops != 0 || p99 != 0 {
		t.Errorf("nothing was recorded: %d, %v", ops, p99)
	}
	for d := time.Duration(0); d < 40*time.Second; d = d*5/4 + time.Microsecond {
		i := meterBucket(d)
		if end := bucketEnd(i); i < 99 && (d >= end || d > 4*time.Microsecond && end > d*3/2) {
			t.Errorf("%v is counted as less than %v", d, end)
		}
	}
	for range 985 {
		m.record(100 * time.Microsecond)
	}
	for range 15 {
		m.record(10 * time.Millisecond)
	}
	if ops, p99 := m.Take(); ops != 1000 || p99 < 10*time.Millisecond || p99 > 15*time.Millisecond {
		t.Errorf("%d, %v", ops, p99)
	}
	for range 995 {
		m.record(100 * time.Microsecond)
	}
	for range 5 {
		m.record(10 * time.Millisecond)
	}
	if ops, p99 := m.Take(); ops != 1000 || p99 < 100*time.Microsecond || p99 > 150*time.Microsecond {
		t.Errorf("%d, %v", ops, p99)
	}
}
