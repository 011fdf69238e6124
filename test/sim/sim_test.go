package sim

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ballast-csi/ballast/pkg/replication"
)

var (
	firstSeed = flag.Int64("first", envInt("SIM_FIRST", 1), "the first seed of TestSeeds")
	seeds     = flag.Int64("seeds", envInt("SIM_SEEDS", 3000), "how many seeds TestSeeds runs")
	replay    = flag.Int64("seed", -1, "the seed that TestReplay shows")
	without   = flag.String("without", "", "the rule that TestReplay switches off, or the only ones, with commas, that TestMutation does")
	focus     = flag.String("focus", "", "the kind of world that TestSeeds and TestReplay narrow theirs to")
	survey    = flag.Bool("survey", false, "TestSeeds goes on after failures, and lists them by kind")
	tail      = flag.Int("tail", 60, "how many of the last lines of a failing seed's trace are shown; 0: all")
)

func envInt(name string, value int64) int64 {
	if s := os.Getenv(name); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			panic(fmt.Sprintf("%s=%s: %v", name, s, err))
		}
		return n
	}
	return value
}

// search runs seeds from first on, on all cores, until count were run, one fails, or the time is up. Of several that fail
// at once it returns the lowest.
func search(opt Options, first, count int64, most time.Duration) (failed int64, failure *Failure, total Counters, ran, events int64) {
	var next atomic.Int64
	next.Store(first)
	var stop atomic.Bool
	var mu sync.Mutex
	var group sync.WaitGroup
	end := time.Now().Add(most)
	failed = -1
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for !stop.Load() {
				seed := next.Add(1) - 1
				if seed >= first+count || time.Now().After(end) {
					return
				}
				o := opt
				o.Seed = seed
				out := Run(o)
				if out.Failure != nil && opt.Rules != (replication.Rules{}) {
					// It counts only where it is the missing rule's doing.
					whole := o
					whole.Rules = replication.Rules{}
					if Run(whole).Failure != nil {
						out.Failure = nil
					}
				}
				mu.Lock()
				ran++
				events += int64(out.Events)
				total.Add(&out.Count)
				if out.Failure != nil {
					stop.Store(true)
					if failed < 0 || seed < failed {
						failed, failure = seed, out.Failure
					}
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	return failed, failure, total, ran, events
}

// show prints the end of a seed's trace.
func show(t *testing.T, opt Options, lines int) {
	t.Helper()
	opt.Trace = true
	out := Run(opt)
	from := 0
	if lines > 0 && len(out.Trace) > lines {
		from = len(out.Trace) - lines
	}
	for _, l := range out.Trace[from:] {
		fmt.Println(l)
	}
	if out.Failure != nil {
		t.Errorf("seed %d: %s", opt.Seed, out.Failure)
	}
}

// TestSeeds runs many seeds with all rules on: none may violate anything, and together they must have come across
// everything that there is to come across.
func TestSeeds(t *testing.T) {
	if *survey {
		list(t)
		return
	}
	began := time.Now()
	failed, failure, total, ran, events := search(Options{Focus: Focus(*focus)}, *firstSeed, *seeds, 24*time.Hour)
	took := time.Since(began)
	if failure != nil {
		show(t, Options{Seed: failed, Focus: Focus(*focus)}, *tail)
		t.Fatalf("seed %d: %s\nreplay: go test ./test/sim -run TestReplay -seed %d", failed, failure, failed)
	}
	fmt.Printf("%d seeds, %d events, %.1f s, %.0f seeds/s\n%s\n", ran, events, took.Seconds(), float64(ran)/took.Seconds(), &total)
	if never := total.Never(); len(never) > 0 && ran >= 1000 {
		t.Errorf("never happened: %v", never)
	}
}

// list runs all seeds and lists the failures by kind.
func list(t *testing.T) {
	kinds := map[string][]int64{}
	first := map[string]string{}
	for seed := *firstSeed; seed < *firstSeed+*seeds; {
		failed, failure, _, _, _ := search(Options{Focus: Focus(*focus)}, seed, *firstSeed+*seeds-seed, 24*time.Hour)
		if failure == nil {
			break
		}
		kinds[failure.Invariant] = append(kinds[failure.Invariant], failed)
		if first[failure.Invariant] == "" {
			first[failure.Invariant] = failure.Detail
		}
		seed = failed + 1
	}
	for k, s := range kinds {
		t.Errorf("%s: %d seeds, %v: %s", k, len(s), s[:min(len(s), 12)], first[k])
	}
}

// TestReplay shows one seed in full.
func TestReplay(t *testing.T) {
	seed := *replay
	if seed < 0 {
		seed = 1
	}
	opt := Options{Seed: seed, Focus: Focus(*focus)}
	if *without != "" {
		opt.Rules = ruleOff(t, *without)
	}
	if *replay >= 0 {
		show(t, opt, 0)
		return
	}
	// Without a seed: the same seed gives the same run.
	opt.Trace = true
	a, b := Run(opt), Run(opt)
	if len(a.Trace) == 0 || len(a.Trace) != len(b.Trace) {
		t.Fatalf("%d and %d lines of trace", len(a.Trace), len(b.Trace))
	}
	for i := range a.Trace {
		if a.Trace[i] != b.Trace[i] {
			t.Fatalf("line %d: %s\nwas: %s", i, b.Trace[i], a.Trace[i])
		}
	}
}
