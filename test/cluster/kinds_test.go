package cluster

import (
	"errors"
	"syscall"
	"time"
)

// Faults of the network, of disks, and of processes that hang.

// stopNode is short of what others would take for its death: they would be asked to attach first.
func (r *faultRun) stopNode(i int) error {
	n := r.Nodes()[i]
	if err := n.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	r.sleep(200*time.Millisecond, 9*time.Second)
	return n.Signal(syscall.SIGCONT)
}

// takeFrom takes the volumes of a node that cannot be told, and still has devices and clients; then it is let go on.
func (r *faultRun) takeFrom(i int, kind string, hold, free func() error) error {
	if err := r.settle(); err != nil { // else the node may be the last that has everything
		return err
	}
	own := r.owned(i)
	if err := hold(); err != nil {
		return err
	}
	for _, s := range own {
		s.lose()
	}
	old, err := r.takeAll(own, i)
	if err != nil {
		return errors.Join(err, free())
	}
	for _, c := range old {
		c.superseded.Store(true)
	}
	if err := r.working(kind); err != nil {
		return errors.Join(err, free())
	}
	if err := free(); err != nil {
		return err
	}
	for k, s := range own {
		if err := s.lost(old[k]); err != nil { // its device dies as soon as it learns
			return err
		}
	}
	return r.each(own, func(s *served) error { return s.clear(i) })
}

func (r *faultRun) stopAndTake(i int) error {
	n := r.Nodes()[i]
	return r.takeFrom(i, "while a node was stopped", func() error { return n.Signal(syscall.SIGSTOP) }, func() error { return n.Signal(syscall.SIGCONT) })
}

func (r *faultRun) isolateAndTake(i int) error {
	return r.takeFrom(i, "while a node was isolated", func() error { return r.lab.Isolate(i) }, func() error { return r.join(i) })
}

// join ends what Isolate began; delays stay.
func (r *faultRun) join(i int) error {
	var errs []error
	for j := range r.Nodes() {
		if j != i {
			errs = append(errs, r.lab.Heal(i, j), r.lab.Heal(j, i))
		}
	}
	return errors.Join(errs...)
}

func (r *faultRun) cutOneWay(i int) error {
	to, used := r.other(i), r.once(3)
	if used {
		for end, other := range map[int]int{i: to, to: i} {
			if err := r.each(r.owned(end), func(s *served) error { return s.spared(other) }); err != nil {
				return err
			}
		}
	}
	if err := r.lab.Cut(i, to); err != nil {
		return err
	}
	r.sleep(100*time.Millisecond, 9*time.Second)
	if used {
		if err := r.working("while a link was cut"); err != nil {
			return err
		}
	}
	return r.lab.Heal(i, to)
}

// isolate: volumes of the node wait, those of others go on.
func (r *faultRun) isolate(i int) error {
	if err := r.lab.Isolate(i); err != nil {
		return err
	}
	r.sleep(100*time.Millisecond, 9*time.Second)
	return r.join(i)
}

// delay makes the network bad for a while, during which other things happen.
func (r *faultRun) delay(i int) error {
	r.fair = 1 + r.rnd.IntN(3)
	least := time.Duration(r.rnd.IntN(30)) * time.Millisecond
	most := least + time.Duration(1+r.rnd.IntN(100))*time.Millisecond
	for j := range r.Nodes() {
		if j == i || r.once(3) {
			continue
		}
		if err := r.lab.Delay(i, j, least, most); err != nil {
			return err
		}
		if r.once(2) {
			if err := r.lab.Delay(j, i, least, most); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *faultRun) fillDisk(i int) error {
	if err := r.elsewhere(i); err != nil {
		return err
	}
	if err := r.disks[i].Fill(); err != nil {
		return err
	}
	r.sleep(time.Second, 8*time.Second)
	if err := r.working("while a disk was full"); err != nil {
		return err
	}
	return r.disks[i].Heal()
}

// fillAllDisks: writes wait, and fail on nobody.
func (r *faultRun) fillAllDisks(int) error {
	var errs []error
	for _, d := range r.disks {
		errs = append(errs, d.Fill())
	}
	r.sleep(2*time.Second, 8*time.Second)
	for _, d := range r.disks {
		errs = append(errs, d.Heal())
	}
	return errors.Join(errs...)
}

func (r *faultRun) slowDisk(i int) error {
	r.disks[i].Slow(time.Duration(1+r.rnd.IntN(60)) * time.Millisecond)
	r.sleep(time.Second, 8*time.Second)
	if err := r.working("while a disk was slow"); err != nil {
		return err
	}
	return r.disks[i].Heal()
}

func (r *faultRun) hangDisk(i int) error {
	used := r.once(2)
	if used {
		if err := r.elsewhere(i); err != nil {
			return err
		}
	}
	r.disks[i].Hang()
	r.sleep(500*time.Millisecond, 8*time.Second)
	var err error
	if used {
		err = r.working("while a disk hung")
	}
	return errors.Join(err, r.disks[i].Heal())
}

// failDisk: I/O goes on with the other replicas. The daemon uses the disk again when it is started anew.
func (r *faultRun) failDisk(i int) error {
	if err := r.settle(); err != nil {
		return err
	}
	r.disks[i].Fail(r.once(2))
	r.sleep(200*time.Millisecond, 4*time.Second)
	if err := r.working("while a disk failed"); err != nil {
		return err
	}
	if r.once(2) { // its workloads are moved first
		to := r.other(i)
		if err := r.each(r.owned(i), func(s *served) error { return s.move(to) }); err != nil {
			return err
		}
	}
	if err := r.disks[i].Heal(); err != nil {
		return err
	}
	return r.killNode(i)
}
