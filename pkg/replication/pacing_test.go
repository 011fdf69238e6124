package replication

import (
	"cmp"
	"testing"
)

// disk is a foreground whose latency grows with the bytes that are copied, and copies whose rate grows with the window up to
// what they are allowed to begin.
type disk struct {
	p      *Pacer
	now    Now
	idle   Now // latency without copies
	perMiB Now // added for each MiB/s copied
	rate   int64
	copied int64
	left   int64
	grows  int64 // left grows by this, in bytes per second
	alone  bool
	perSec int64 // copies of the window's size in a second; 64 where it is 0
}

func (d *disk) run(span Now, resync bool) {
	for end := d.now + span; d.now < end; d.now += PaceEvery {
		if resync {
			d.rate = d.p.Window() * cmp.Or(d.perSec, 64)
			if r := d.p.Rate(); r > 0 {
				d.rate = min(d.rate, r)
			}
			moved := d.rate / 10
			d.copied += moved
			d.left = max(1, d.left-moved+d.grows/10)
		} else {
			d.rate = 0
		}
		d.p.Sample(PaceSample{Now: d.now, P99: d.idle + Now(d.rate>>20)*d.perMiB, Ops: 1, Resyncing: resync, Copied: d.copied, Left: d.left, Alone: d.alone})
	}
}

func TestPacerKeepsToTheTarget(t *testing.T) {
	d := &disk{p: NewPacer(), idle: 2 * Millisecond, perMiB: 10 * Millisecond / 1000, left: 1 << 50}
	d.run(10*Second, false)
	if got := d.p.Target(); got != 3*Millisecond {
		t.Fatalf("target %d", got)
	}
	d.run(60*Second, true)
	// 1 ms above the baseline is reached at 100 MiB/s; the window swings around that.
	if rate := d.rate >> 20; rate < 50 || rate > 130 {
		t.Errorf("%d MiB/s", rate)
	}
}

// A fast disk copies much with a single copy in flight: more than the foreground bears, here.
func TestPacerKeepsAFastDiskToTheTarget(t *testing.T) {
	d := &disk{p: NewPacer(), idle: 2 * Millisecond, perMiB: 20 * Millisecond / 1000, left: 1 << 50, perSec: 1000}
	d.run(10*Second, false)
	d.run(60*Second, true)
	// 1 ms above the baseline is reached at 50 MiB/s, one copy at a time makes 250.
	if rate := d.rate >> 20; rate < 30 || rate > 60 {
		t.Errorf("%d MiB/s", rate)
	}
	d.perMiB = 0
	d.run(60*Second, true)
	if d.p.Rate() != 0 || d.p.Window() <= MinWindow {
		t.Errorf("rate %d and window %d once the foreground feels nothing", d.p.Rate(), d.p.Window())
	}
	d.run(Second, false)
	if d.p.Rate() != StartRate {
		t.Errorf("rate %d after the resync", d.p.Rate())
	}
}

func TestPacerKeepsTheFloor(t *testing.T) {
	for _, alone := range []bool{false, true} {
		d := &disk{p: NewPacer(), idle: Millisecond, perMiB: 100 * Millisecond, left: 1 << 50, alone: alone}
		d.run(Second, false)
		before := d.copied
		d.run(10*Second, true)
		got, want := (d.copied-before)/10, paceFloor
		if alone {
			want *= paceUrgent
		}
		if got < want*8/10 {
			t.Errorf("alone %v: %d bytes a second, the floor is %d", alone, got, want)
		}
	}
}

// A client that writes faster than the floor makes the resync lose ground: the floor rises until it gains.
func TestPacerGainsGround(t *testing.T) {
	d := &disk{p: NewPacer(), idle: Millisecond, perMiB: 100 * Millisecond, left: 1 << 30, grows: 40 << 20}
	d.run(Second, false)
	d.run(1000*Second, true)
	if d.left > 1<<20 {
		t.Errorf("%d bytes left, floor %d", d.left, d.p.Floor())
	}
}

func TestPacerWithoutForeground(t *testing.T) {
	p := NewPacer()
	for i := range 1000 {
		p.Sample(PaceSample{Now: Now(i) * PaceEvery, Resyncing: true, Copied: int64(i) << 30, Left: 1 << 40})
	}
	if p.Window() != MaxWindow {
		t.Errorf("window %d", p.Window())
	}
}

// An engine that nobody has given a pace yet copies as slowly as one whose foreground is not known.
func TestAnEngineBeginsSlowly(t *testing.T) {
	w := newWorld(3, 512)
	e, err := NewEngine(EngineConfig{Node: "n1", FenceOnly: true, Geometry: w.g, Timing: w.t}, w.m, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := MinWindow / 4
	if !e.mayCopy(n) {
		t.Fatal("nothing may be copied")
	}
	e.copies(n)
	if wait := Now(n * int64(Second) / StartRate); e.mayCopy(n) || e.copyAt != wait {
		t.Errorf("the second copy may begin at %v, want %v", e.copyAt, wait)
	}
	if e.now = e.copyAt; !e.mayCopy(MinWindow-n) || e.mayCopy(MinWindow-n+1) {
		t.Error("the window is another")
	}
}

// Replicas that return are copied to no faster than the rate, all of them together, and not much slower; the engine asks to be woken
// for what it does then.
func TestResyncsKeepToTheirRate(t *testing.T) {
	const size, rate = 512, 256
	w := live(t, 3)
	for off := int64(0); off < size; off += 8 {
		w.write(off, "aaaaaaaa")
		w.run()
	}
	w.e.SetResyncPace(w.now, size, rate)
	for _, id := range []string{"r2", "r3"} {
		h := w.host(id)
		h.store = newMemStore(size)
		h.incarnation += 1000
		w.boot(h)
		w.disconnect(h)
		w.connect(w.e, h)
	}
	w.run()
	if n := len(w.m.ISR()); n != 1 {
		t.Fatalf("%d are in sync", n)
	}
	var copied, added int64 // to those that go on, and to those that are in sync again
	var compared int64      // to one of them
	begin, wakes := w.now, 0
	for isr := 1; isr < 3; wakes++ {
		at := w.e.NextWake()
		if at > begin+60*Second {
			t.Fatalf("%v are in sync, then it is woken at %v: %+v", w.m.ISR(), at, w.e.Status().Members)
		}
		w.now = max(w.now, at)
		w.e.Tick(w.now)
		w.effects()
		w.run()
		copied = 0
		for _, m := range w.e.Status().Members {
			if m.Resync != nil {
				copied += m.Resync.Done + m.Resync.Compared
				compared = max(compared, m.Resync.Compared)
			}
		}
		if n := len(w.m.ISR()); n > isr {
			added, isr = added+2*int64(n-isr)*size, n // each byte is copied and compared
		}
		if may := w.g.MaxCopy + int64(float64(w.now-begin)*rate/float64(Second)); copied+added > may {
			t.Fatalf("%d bytes are copied and compared after %v, %d may be", copied+added, w.now-begin, may)
		}
	}
	if compared < size-w.g.MaxCopy {
		t.Errorf("%d bytes of %d were compared", compared, size)
	}
	took, least := w.now-begin, 2*2*size*Second/rate
	if took < least-Second || took > 2*least || wakes > 100 {
		t.Errorf("it took %v where %v is the least, and was woken %d times", took, least, wakes)
	}
	for wakes = 0; w.e.NextWake() < w.now+Second; wakes++ {
		if w.now = max(w.now, w.e.NextWake()); wakes == 10 {
			t.Fatal("it is woken again and again after the last copy")
		}
		w.e.Tick(w.now)
		w.effects()
		w.run()
	}
}
