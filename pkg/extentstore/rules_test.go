package extentstore

import "testing"

// TestRules switches each rule off in turn: a suite that does not notice does not test the rule.
func TestRules(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		broken rules
		from   uint64 // a seed that finds it, at the time of writing
	}{
		"commitBeforeSync":    {rules{commitBeforeSync: true}, 57},
		"syncBeforeSnapshot":  {rules{syncBeforeSnapshot: true}, 146},
		"ackBeforeCommit":     {rules{ackBeforeCommit: true}, 0},
		"reuseBeforeCommit":   {rules{reuseBeforeCommit: true}, 41},
		"splitPairs":          {rules{splitPairs: true}, 18},
		"cutWithoutFlush":     {rules{cutWithoutFlush: true}, 0},
		"discardForgetsBelow": {rules{discardForgetsBelow: true}, 0},
		"mergeForgetsZeros":   {rules{mergeForgetsZeros: true}, 5},
		"mergeWithoutCopy":    {rules{mergeWithoutCopy: true}, 0},
		"resizeInMemory":      {rules{resizeInMemory: true}, 1},
		"markBeforeCommit":    {rules{markBeforeCommit: true}, 0},
		"missedLeftOut":       {rules{missedLeftOut: true}, 0},
		"dropInMemory":        {rules{dropInMemory: true}, 43},
		"stateInMemory":       {rules{stateInMemory: true}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := c.from; seed < c.from+500; seed++ {
				w, err := newWorld(seed, c.broken)
				if err == nil {
					err = w.run(6, 60, 150)
				}
				if err != nil {
					t.Logf("found by seed %d: %v", seed, err)
					return
				}
			}
			t.Error("nothing noticed that the rule is broken")
		})
	}
}
