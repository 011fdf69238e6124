package region

// Generations is what was sent since the last successful flush. A flush covers what had finished when it began and not
// what was under way: so there are two sets, and what is under way is put into the newer one when a flush begins.
type Generations struct {
	// Invariant: a member not yet covered by a successful flush is in young or old.
	young, old Set
}

// Add puts i into the young generation.
func (g *Generations) Add(i uint32) { g.young.Add(i) }

// AddRange puts [from, to) into the young generation.
func (g *Generations) AddRange(from, to uint32) { g.young.AddRange(from, to) }

// Begin is called when a flush is sent: all that was sent so far ages. The caller then adds what is under way again.
func (g *Generations) Begin() {
	if g.old.Empty() {
		g.old, g.young = g.young, g.old
		return
	}
	g.old.Union(&g.young)
	g.young.Clear()
}

// Succeed is called when the flush that Begin announced succeeded: the old generation is durable.
func (g *Generations) Succeed() { g.old.Clear() }

// Clear forgets everything.
func (g *Generations) Clear() {
	g.young.Clear()
	g.old.Clear()
}

// Empty tells whether everything sent has been flushed.
func (g *Generations) Empty() bool { return g.young.Empty() && g.old.Empty() }

// Into adds both generations to s.
func (g *Generations) Into(s *Set) {
	s.Union(&g.old)
	s.Union(&g.young)
}

// Old is the generation that a flush under way makes durable. It is only to be read.
func (g *Generations) Old() *Set { return &g.old }
