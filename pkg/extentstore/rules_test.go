package extentstore

import "testing"

// TestRules switches each rule off in turn: a suite that does not notice does not test the rule.
func TestRules(t *testing.T) {
	for name, broken := range map[string]rules{
		"commitBeforeSync":    {commitBeforeSync: true},
		"syncBeforeSnapshot":  {syncBeforeSnapshot: true},
		"ackBeforeCommit":     {ackBeforeCommit: true},
		"reuseBeforeCommit":   {reuseBeforeCommit: true},
		"splitPairs":          {splitPairs: true},
		"cutWithoutFlush":     {cutWithoutFlush: true},
		"discardForgetsBelow": {discardForgetsBelow: true},
		"mergeForgetsZeros":   {mergeForgetsZeros: true},
		"mergeWithoutCopy":    {mergeWithoutCopy: true},
		"resizeInMemory":      {resizeInMemory: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(300) {
				w, err := newWorld(seed, broken)
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
