package metaraft

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// identity is what a controller's directory says of itself.
type identity struct {
	Version     int           `json:"version"`
	ID          volume.NodeID `json:"id"`
	Incarnation string        `json:"incarnation"`
	// Starts counts the times the directory was opened; Session names this time.
	Starts  uint64 `json:"starts"`
	Session string `json:"session"`
}

const (
	identityFile    = "controller.json"
	identityVersion = 1
)

// openIdentity counts a start of the controller in dir, durably, and makes its identity at the first.
func openIdentity(dir string, id volume.NodeID) (identity, error) {
	path := filepath.Join(dir, identityFile)
	var me identity
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(filepath.Join(dir, logFile)); !errors.Is(err, fs.ErrNotExist) {
			return me, fmt.Errorf("%s has a log and no %s: it is not a whole controller: %w", dir, identityFile, volume.ErrDataLoss)
		}
		me = identity{Version: identityVersion, ID: id, Incarnation: randomName()}
	case err != nil:
		return me, err
	default:
		if err := json.Unmarshal(b, &me); err != nil {
			return me, fmt.Errorf("%s: %v: %w", path, err, volume.ErrDataLoss)
		}
		if me.Version != identityVersion {
			return me, fmt.Errorf("%s has version %d, this program knows %d", path, me.Version, identityVersion)
		}
		if me.ID != id {
			return me, fmt.Errorf("%s is of controller %s, not of %s", path, me.ID, id)
		}
	}
	me.Starts++
	me.Session = randomName()
	if b, err = json.MarshalIndent(me, "", "  "); err != nil {
		return me, err
	}
	return me, writeFile(path, append(b, '\n'))
}

func randomName() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// writeFile replaces a file, durably.
func writeFile(path string, b []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
