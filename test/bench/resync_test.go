package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWritesIn(t *testing.T) {
	for _, c := range []struct {
		name, log        string
		written, changed int64
		bad              bool
	}{
		{"blocks of two extents", "fio version 3 iolog\n3 /dev/x add\n5 /dev/x open\n7 /dev/x write 4096 4096\n8 /dev/x write 8192 4096\n9 /dev/x write 131072 4096\n9 /dev/x sync 0 0\n",
			12 << 10, 2 * extentSize, false},
		{"over a border", "fio version 2 iolog\n/dev/x write 61440 8192\n", 8 << 10, 2 * extentSize, false},
		{"whole extents, one of them twice", "/dev/x write 0 65536\n/dev/x write 65536 65536\n/dev/x write 0 65536\n", 3 * extentSize, 2 * extentSize, false},
		{"no writes", "fio version 3 iolog\n3 /dev/x add\n", 0, 0, true},
		{"cut off", "/dev/x write 0\n", 0, 0, true},
		{"no number", "/dev/x write a 4096\n", 0, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(log, []byte(c.log), 0o600); err != nil {
				t.Fatal(err)
			}
			written, changed, err := writesIn(log)
			if (err != nil) != c.bad || written != c.written && !c.bad || changed != c.changed && !c.bad {
				t.Fatalf("%d written, %d changed, %v; want %d, %d, error %v", written, changed, err, c.written, c.changed, c.bad)
			}
		})
	}
}
