package layer

// Runs joins blocks into maximal runs, in order, and hands them on. The zero value with Emit set is ready.
type Runs struct {
	// Emit gets each run, in bytes.
	Emit func(off, length int64) error
	// From clips runs to begin at this offset or later; To clips them to end there, where it is not 0.
	From, To int64

	off, end int64
}

// Add takes the blocks of the extent at off. Calls come in ascending order of off.
func (r *Runs) Add(off int64, blocks Mask) error {
	for {
		first, n, rest := blocks.Run()
		if n == 0 {
			return nil
		}
		if err := r.add(off+int64(first)*BlockSize, int64(n)*BlockSize); err != nil {
			return err
		}
		blocks = rest
	}
}

func (r *Runs) add(off, n int64) error {
	if off == r.end && r.end > r.off {
		r.end += n
		return nil
	}
	if err := r.Flush(); err != nil {
		return err
	}
	r.off, r.end = off, off+n
	return nil
}

// Flush hands on the last run. It is called once after the last Add.
func (r *Runs) Flush() error {
	off, end := max(r.off, r.From), r.end
	if r.To > 0 {
		end = min(end, r.To)
	}
	r.off, r.end = 0, 0
	if off >= end {
		return nil
	}
	return r.Emit(off, end-off)
}

// Touched are the blocks that any of the entries of one extent wrote or zeroed: what may differ from the layer under
// the last of them.
func Touched(chain []Entry) Mask {
	var m Mask
	for _, e := range chain {
		m |= e.Covers()
	}
	return m
}
