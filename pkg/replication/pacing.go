package replication

// Pacer reckons how many bytes of copies may be in flight on a disk, from what the foreground feels, and where one copy at a
// time is too much still, how many may begin in a second. It is fed every PaceEvery; one Pacer serves all resyncs of a disk.
type Pacer struct {
	window   int64
	rate     int64 // bytes per second; 0 is no bound
	baseline Now
	floor    int64 // bytes per second
	// Of the running resync: the least that was left, and since when it has not become less.
	least   int64
	leastAt Now
	raised  int
	last    Now
	busyAt  Now // when the foreground did something last
	copied  int64
}

// Figures of the pacing.
const (
	// PaceEvery is the time between samples.
	PaceEvery = 100 * Millisecond
	// MinWindow and MaxWindow bound the window, in bytes.
	MinWindow int64 = 256 << 10
	MaxWindow int64 = 64 << 20
	// StartRate is that of a resync that begins, in bytes per second: what the foreground feels is known a little later.
	StartRate = paceFloor

	paceStep   int64 = 256 << 10
	rateStep   int64 = 1 << 20   // bytes per second
	maxRate    int64 = 512 << 20 // from here on the window alone bounds
	paceSlack        = Millisecond / 2
	paceFloor  int64 = 8 << 20 // bytes per second
	paceUrgent       = 4       // times the floor, where one copy is left
	paceLosing       = 30 * Second
	paceIdle         = 2 * Second // a foreground that rests for so long is none
	maxRaised        = 6          // doublings of the floor
)

// PaceSample is what was seen since the sample before.
type PaceSample struct {
	Now Now
	// P99 of the foreground's latency, and the number of its operations; without operations P99 is not looked at.
	P99 Now
	Ops int
	// Resyncing tells whether anything is copied; Copied and Left are bytes, over all resyncs of the disk, Copied from an
	// arbitrary start and with those compared.
	Resyncing    bool
	Copied, Left int64
	// Alone tells whether a volume being copied has a single copy left.
	Alone bool
}

// NewPacer returns a pacer that knows nothing of the disk yet.
func NewPacer() *Pacer {
	return &Pacer{window: MinWindow, rate: StartRate, floor: paceFloor, busyAt: -paceIdle}
}

// Window is the bytes of copies that may be in flight.
func (p *Pacer) Window() int64 { return p.window }

// Rate is the bytes of copies that may begin in a second; 0 is no bound.
func (p *Pacer) Rate() int64 { return p.rate }

// Target is the latency up to which the window grows; 0 while the foreground's own is not known.
func (p *Pacer) Target() Now {
	if p.baseline == 0 {
		return 0
	}
	return p.baseline + p.baseline/4 + paceSlack
}

// Floor is the rate that copies get whatever the foreground feels, in bytes per second.
func (p *Pacer) Floor() int64 { return p.floor }

// Sample takes what was seen.
func (p *Pacer) Sample(s PaceSample) {
	span := s.Now - p.last
	copied := s.Copied - p.copied
	p.last, p.copied = s.Now, s.Copied
	if s.Ops > 0 {
		p.busyAt = s.Now
	}
	if !s.Resyncing {
		if s.Ops > 0 {
			// The baseline follows the undisturbed foreground over some seconds.
			if p.baseline == 0 {
				p.baseline = s.P99
			}
			p.baseline += (s.P99 - p.baseline) / 16
		}
		p.window, p.rate, p.least, p.raised = MinWindow, StartRate, 0, 0
		return
	}
	p.losing(s)
	p.floor = paceFloor << p.raised
	if s.Alone {
		p.floor *= paceUrgent
	}
	if p.rate > 0 {
		p.rate = max(p.rate, p.floor)
	}
	reached := int64(float64(copied) * float64(Second) / float64(max(span, 1)))
	slow := span > 0 && reached < p.floor
	idle := s.Now-p.busyAt >= paceIdle
	more := slow || idle || p.baseline == 0 || s.P99 <= p.Target()
	switch {
	case s.Ops == 0 && !idle && !slow: // it goes on soon, most likely
	case more:
		if p.rate == 0 || reached < p.rate*3/4 { // it is the window that holds copies up
			p.window = min(p.window+paceStep, MaxWindow)
		}
		if p.rate == 0 {
			break
		}
		if p.rate += rateStep; idle {
			p.rate *= 2
		}
		if p.rate > maxRate {
			p.rate = 0
		}
	case p.window > MinWindow:
		p.window = max(p.window*7/10, MinWindow)
	default:
		if p.rate == 0 {
			p.rate = min(reached, maxRate)
		}
		p.rate = max(p.rate*7/10, p.floor)
	}
}

// losing raises the floor of a resync that gets no closer to its end.
func (p *Pacer) losing(s PaceSample) {
	switch {
	case p.least == 0 || s.Left < p.least:
		p.least, p.leastAt = max(s.Left, 1), s.Now
	case s.Now-p.leastAt >= paceLosing:
		p.raised = min(p.raised+1, maxRaised)
		p.leastAt = s.Now
	}
}
