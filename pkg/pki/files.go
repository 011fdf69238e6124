package pki

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// SaveCA keeps a CA with its secret key in a file of mode 0600. It is durable, and whole or not there at all, when the
// machine stops at any moment.
func SaveCA(file string, ca *CA) error {
	data, err := ca.Marshal()
	if err != nil {
		return err
	}
	return writeFile(file, data)
}

// LoadCA reads what SaveCA kept; volume.ErrNotFound without the file.
func LoadCA(file string) (*CA, error) {
	data, err := readFile(file)
	if err != nil {
		return nil, err
	}
	ca, err := ParseCA(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return ca, nil
}

// Save keeps a certificate and its key together in one file, as SaveCA does: no crash leaves one without the other.
func Save(file string, chain []byte, key Key) error {
	secret, err := key.Marshal()
	if err != nil {
		return err
	}
	if _, err := newCurrent(chain, key); err != nil {
		return err
	}
	return writeFile(file, append(chain[:len(chain):len(chain)], secret...))
}

// Load reads what Save kept; volume.ErrNotFound without the file. now is as for NewCredentials.
func Load(file string, now func() time.Time) (*Credentials, error) {
	data, err := readFile(file)
	if err != nil {
		return nil, err
	}
	certs, key, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var chain []byte
	for _, c := range certs {
		chain = append(chain, encode("CERTIFICATE", c.Raw)...)
	}
	c, err := NewCredentials(chain, Key{key}, now)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// JoinKey is the key with which a node asks to join. It is made once and kept: a join whose answer was lost is asked for
// again with the same key, which a used-up token still grants.
func JoinKey(file string) (Key, error) {
	data, err := readFile(file)
	if err == nil {
		return ParseKey(data)
	}
	if !errors.Is(err, volume.ErrNotFound) {
		return Key{}, err
	}
	key, err := NewKey()
	if err != nil {
		return Key{}, err
	}
	if data, err = key.Marshal(); err != nil {
		return Key{}, err
	}
	return key, writeFile(file, data)
}

// readFile reads a bounded file that holds a secret.
func readFile(file string) ([]byte, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", file, volume.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %04o and a secret key in it: chmod 0600, and think of who has read it: %w",
			file, mode, volume.ErrInvalid)
	}
	return io.ReadAll(io.LimitReader(f, maxPEM+1))
}

// writeFile replaces a file, mode 0600, at once and durably.
func writeFile(file string, data []byte) error {
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, "."+filepath.Base(file)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
