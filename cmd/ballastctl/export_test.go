package main

import (
	"strings"
	"testing"

	"github.com/ballast-csi/ballast/test/admintest"
)

func TestExport(t *testing.T) {
	c := admintest.Sample()
	socket := admintest.Serve(t, c)
	for args, want := range map[string]string{
		"orders":                          "Serving orders (vol-00000000000000000001, 10 GiB), read-only, until interrupted:\n",
		"orders --writable":               "Serving orders (vol-00000000000000000001, 10 GiB), writable, until interrupted:\n",
		"orders@monday":                   "Serving monday (snap-00000000000000000001, 10 GiB), read-only, until interrupted:\n",
		"@monday":                         "Serving monday (snap-00000000000000000001, 10 GiB), read-only, until interrupted:\n",
		"vol-00000000000000000009@orphan": "Serving orphan (snap-00000000000000000002, 1.0 GiB), read-only, until interrupted:\n",
	} {
		x := startCtl(t, socket, append([]string{"volume", "export"}, strings.Fields(args)...)...)
		x.until(t, ".sock\n")
		x.stop()
		code, errs := x.end(t)
		if code != exitOK || errs != want {
			t.Errorf("export %s: exit %d, %q; want %q", args, code, errs, want)
		}
		if out := x.output(); !strings.HasPrefix(out, "nbd+unix:///?socket=/") || strings.Count(out, "\n") != 1 {
			t.Errorf("export %s prints %q", args, out)
		}
	}
	x := startCtl(t, socket, "volume", "export", "orders-restored", "-o", "json")
	x.until(t, `"readOnly": true`)
	if err := c.DeleteVolume(t.Context(), c.Vols[1].ID); err != nil {
		t.Fatal(err)
	}
	if code, errs := x.end(t); code != exitRefused || !strings.Contains(errs, "has ended: the volume was deleted") {
		t.Errorf("taken away: exit %d, %s", code, errs)
	}
	for args, want := range map[string]struct {
		code int
		text string
	}{
		"nothing":                  {exitNotFound, "no volume"},
		"orders@nothing":           {exitNotFound, "no snapshot"},
		"orders@orphan":            {exitNotFound, "is of volume vol-00000000000000000009"},
		"orders@":                  {exitUsage, "missing after @"},
		"orders@monday --writable": {exitUsage, "cannot be written"},
	} {
		r := ctl(socket, append([]string{"volume", "export"}, strings.Fields(args)...)...)
		if r.code != want.code || !strings.Contains(r.err, want.text) || r.out != "" {
			t.Errorf("export %s: exit %d, stdout %q, %s", args, r.code, r.out, r.err)
		}
	}
	if r := ctl(socket, "__complete", "volume", "export", "or"); !strings.Contains(r.out, "orders\t") || !strings.Contains(r.out, "orders@monday\t") {
		t.Errorf("completion: %s", r.out)
	}
	audit := ctl(socket, "audit", "-o", "json").out
	for _, w := range []string{`"what":"volume.export"`, `"detail":"name \"orders\", writable true"`, `"what":"snapshot.export"`} {
		if !strings.Contains(audit, w) {
			t.Errorf("%s is not in the audit log: %s", w, audit)
		}
	}
}
