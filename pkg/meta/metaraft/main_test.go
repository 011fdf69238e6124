package metaraft

import (
	"flag"
	"os"
	"testing"
)

// The tests mostly wait for elections: more of them at a time than there are cores take no longer.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("4"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}
