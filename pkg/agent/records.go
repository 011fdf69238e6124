package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	recordVersion = 1
	recordSuffix  = ".json"
	// maxRecord bounds a record file, in bytes: a volume has a few paths, each at most 4 KiB, with as much of flags.
	maxRecord = 8 << 20
)

// record is what is staged and published of one volume on this node.
type record struct {
	Version int       `json:"version"`
	Volume  volume.ID `json:"volume"`
	// Epoch is that of the newest engine that served the volume here while it was staged.
	Epoch volume.Epoch `json:"epoch,omitempty"`
	// Frozen is set while the filesystem is frozen, so that a start after a crash thaws it.
	Frozen  bool     `json:"frozen,omitempty"`
	Stages  []stage  `json:"stages,omitempty"`
	Targets []target `json:"targets,omitempty"`
	// Devices are what targets show, or showed, as raw block devices. Whoever uses a target may know them by number.
	Devices []given `json:"devices,omitempty"`
}

// given is a kernel device that a workload was given.
type given struct {
	// Name is the frontend's.
	Name string `json:"name"`
	Path string `json:"path"`
}

type stage struct {
	Path       string            `json:"path"`
	Capability volume.Capability `json:"capability"`
	// Created is whether the directory was made here, and so is removed here.
	Created bool `json:"created,omitempty"`
	// Dead is a mount whose device was taken away for good; it is only waiting to be cleaned up.
	Dead bool `json:"dead,omitempty"`
}

type target struct {
	Path       string            `json:"path"`
	Staging    string            `json:"staging"`
	Capability volume.Capability `json:"capability"`
	ReadOnly   bool              `json:"readOnly,omitempty"`
	Dead       bool              `json:"dead,omitempty"`
}

func (r *record) empty() bool { return len(r.Stages) == 0 && len(r.Targets) == 0 }

func (r *record) stage(path string) *stage {
	if i := slices.IndexFunc(r.Stages, func(s stage) bool { return s.Path == path }); i >= 0 {
		return &r.Stages[i]
	}
	return nil
}

func (r *record) target(path string) *target {
	if i := slices.IndexFunc(r.Targets, func(t target) bool { return t.Path == path }); i >= 0 {
		return &r.Targets[i]
	}
	return nil
}

func (r *record) forgetStage(path string) {
	r.Stages = slices.DeleteFunc(r.Stages, func(s stage) bool { return s.Path == path })
}

func (r *record) forgetTarget(path string) {
	r.Targets = slices.DeleteFunc(r.Targets, func(t target) bool { return t.Path == path })
}

// live tells whether something of the volume is, or should be, in use here.
func (r *record) live() bool {
	return slices.ContainsFunc(r.Stages, func(s stage) bool { return !s.Dead }) || r.published()
}

func (r *record) published() bool {
	return slices.ContainsFunc(r.Targets, func(t target) bool { return !t.Dead })
}

// uses is how many paths need the volume's device.
func (r *record) uses() int {
	n := 0
	for _, s := range r.Stages {
		if !s.Dead {
			n++
		}
	}
	for _, t := range r.Targets {
		if !t.Dead {
			n++
		}
	}
	return n
}

// paths are all that may carry a mount.
func (r *record) paths() []string {
	var out []string
	for _, t := range r.Targets {
		out = append(out, t.Path)
	}
	for _, s := range r.Stages {
		out = append(out, s.Path)
	}
	return out
}

func (r *record) clone() record {
	c := *r
	c.Stages, c.Targets, c.Devices = slices.Clone(r.Stages), slices.Clone(r.Targets), slices.Clone(r.Devices)
	return c
}

// records keeps one file per volume in a directory. A change replaces the file at once, durably.
type records struct{ dir string }

func openRecords(dir string) (records, []record, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return records{}, nil, fmt.Errorf("open node records: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return records{}, nil, fmt.Errorf("open node records: %w", err)
	}
	var out []record
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if strings.HasSuffix(name, ".tmp") {
			if err := os.Remove(name); err != nil {
				return records{}, nil, fmt.Errorf("open node records: %w", err)
			}
			continue
		}
		if !strings.HasSuffix(name, recordSuffix) {
			continue
		}
		r, err := readRecord(name)
		if err != nil {
			return records{}, nil, fmt.Errorf("node record %s is damaged; unmount what it names and remove it: %w", name, err)
		}
		out = append(out, r)
	}
	return records{dir: dir}, out, nil
}

func readRecord(name string) (record, error) {
	info, err := os.Stat(name)
	if err != nil {
		return record{}, err
	}
	if info.Size() > maxRecord {
		return record{}, fmt.Errorf("%d bytes, the limit is %d", info.Size(), maxRecord)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("version %d, this program knows %d", r.Version, recordVersion)
	}
	if r.Volume == "" {
		return record{}, errors.New("it names no volume")
	}
	return r, nil
}

// save makes the record durable, or its absence when it is empty.
func (s records) save(r *record) error {
	name := filepath.Join(s.dir, url.PathEscape(string(r.Volume))+recordSuffix)
	if r.empty() {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove node record: %w", err)
		}
		return s.sync()
	}
	r.Version = recordVersion
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode node record: %w", err)
	}
	if len(data) > maxRecord {
		return fmt.Errorf("volume %s is staged and published at too many paths: %w", r.Volume, volume.ErrBusy)
	}
	if err := writeSynced(name+".tmp", data); err != nil {
		return fmt.Errorf("write node record: %w", err)
	}
	if err := os.Rename(name+".tmp", name); err != nil {
		return fmt.Errorf("write node record: %w", err)
	}
	return s.sync()
}

func writeSynced(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (s records) sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return fmt.Errorf("sync node records: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync node records: %w", err)
	}
	return nil
}
