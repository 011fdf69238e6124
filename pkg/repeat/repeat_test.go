package repeat

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestTrouble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var x Trouble
		if x.Over() {
			t.Error("it is over before it began")
		}
		for range 2 { // it comes back
			said := 0
			for range 181 {
				if x.Again() {
					said++
				}
				time.Sleep(time.Second)
			}
			if said != 4 {
				t.Errorf("said %d times in three minutes", said)
			}
			if !x.Over() || x.Over() {
				t.Error("that it is over is said once")
			}
		}
	})
}
