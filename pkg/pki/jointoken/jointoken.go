// Package jointoken is what lets a new node into the cluster: the token that an admin carries to it, the record that the
// controllers keep of it, and the rules by which it is redeemed. The secret is in the token only; the record has its hash.
//
// A token also carries the hash of the CA's public key, so the node knows the cluster before it shows anything to it.
package jointoken

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Bounds of a record.
const (
	// MaxUses bounds how many nodes one token lets in.
	MaxUses = 100
	// DefaultLifetime is how long a token is valid, unless asked otherwise, in nanoseconds: 24 h.
	DefaultLifetime int64 = 24 * 3600 * 1e9
	// MaxLifetime bounds it: 30 days.
	MaxLifetime int64 = 30 * DefaultLifetime
)

const (
	prefix    = "ballast-join-"
	idLen     = 8
	secretLen = 32
	sumLen    = 3
	rawLen    = idLen + secretLen + sha256.Size + sumLen
)

// Token is the secret that an admin carries to a node.
type Token struct {
	id     [idLen]byte
	secret [secretLen]byte
	// CA is the SHA-256 of the CA's public key (its SubjectPublicKeyInfo).
	CA [sha256.Size]byte
}

// New makes a token from a source of random bytes.
func New(random io.Reader, ca [sha256.Size]byte) (Token, error) {
	t := Token{CA: ca}
	if _, err := io.ReadFull(random, t.id[:]); err != nil {
		return Token{}, err
	}
	_, err := io.ReadFull(random, t.secret[:])
	return t, err
}

// Parse reads the text of a token. It returns volume.ErrInvalid for what is none, or was not copied whole.
func Parse(text string) (Token, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(text), prefix)
	raw, err := base64.RawURLEncoding.DecodeString(rest)
	if !ok || err != nil || len(raw) != rawLen || len(rest) != base64.RawURLEncoding.EncodedLen(rawLen) {
		return Token{}, fmt.Errorf("this is no join token: one begins with %q and has %d characters: %w",
			prefix, len(prefix)+base64.RawURLEncoding.EncodedLen(rawLen), volume.ErrInvalid)
	}
	if s := sum(raw[:rawLen-sumLen]); [sumLen]byte(raw[rawLen-sumLen:]) != s {
		return Token{}, fmt.Errorf("the join token was not copied correctly: %w", volume.ErrInvalid)
	}
	var t Token
	n := copy(t.id[:], raw)
	n += copy(t.secret[:], raw[n:])
	copy(t.CA[:], raw[n:])
	return t, nil
}

// Text is what the admin carries: a secret.
func (t Token) Text() string {
	raw := slices.Concat(t.id[:], t.secret[:], t.CA[:])
	s := sum(raw)
	return prefix + base64.RawURLEncoding.EncodeToString(append(raw, s[:]...))
}

// String names the token without its secret.
func (t Token) String() string { return "join token " + t.ID() }

// GoString keeps the secret out of %#v too.
func (t Token) GoString() string { return t.String() }

func sum(raw []byte) [sumLen]byte {
	c := crc32.ChecksumIEEE(raw)
	return [sumLen]byte{byte(c >> 16), byte(c >> 8), byte(c)}
}

// ID names the token in the cluster's state, 16 hex digits.
func (t Token) ID() string { return hex.EncodeToString(t.id[:]) }

// Hash is what the cluster keeps of the secret, 64 hex digits. The secret has 256 random bits: nobody gets from one to
// the other.
func (t Token) Hash() string {
	h := sha256.New()
	h.Write([]byte("ballast join token 1\x00"))
	h.Write(t.id[:])
	h.Write(t.secret[:])
	return hex.EncodeToString(h.Sum(nil))
}

// Record is the controllers' record of a token.
type Record struct {
	ID   string `json:"id"`
	Hash string `json:"hash"`
	// Roles are what a node that joins with it becomes: "controller", "storage".
	Roles []string `json:"roles"`
	// Node is the only node that may use it; "" is any that is not a member yet.
	Node volume.NodeID `json:"node,omitempty"`
	// Uses is how many nodes it lets in.
	Uses      int              `json:"uses"`
	CreatedAt volume.Timestamp `json:"createdAt"`
	ExpiresAt volume.Timestamp `json:"expiresAt"`
	CreatedBy string           `json:"createdBy,omitempty"`
	// Redeemed are those it let in.
	Redeemed []Redemption `json:"redeemed,omitempty"`
}

// Redemption is one use of a token.
type Redemption struct {
	Node volume.NodeID `json:"node"`
	// Key is the SHA-256 of the node's public key, 64 hex digits.
	Key string           `json:"key"`
	At  volume.Timestamp `json:"at"`
	// Generation counts the joins under the node's name, whatever the token; whoever keeps the record sets it.
	Generation uint64 `json:"generation,omitempty"`
}

// Of is the use that a claim was, or nothing.
func (r Record) Of(c Claim) Redemption {
	for _, d := range r.Redeemed {
		if d.Node == c.Node && d.Key == c.Key {
			return d
		}
	}
	return Redemption{}
}

// Check returns volume.ErrInvalid or volume.ErrOutOfRange where a new record is outside its bounds.
func (r Record) Check() error {
	if !isHex(r.ID, idLen) || !isHex(r.Hash, sha256.Size) {
		return fmt.Errorf("join token %q: malformed id or hash: %w", r.ID, volume.ErrInvalid)
	}
	if len(r.Roles) == 0 || len(r.Roles) > 2 {
		return fmt.Errorf("join token %s: a node has one or two roles, not %d: %w", r.ID, len(r.Roles), volume.ErrInvalid)
	}
	for i, role := range r.Roles {
		if role != "controller" && role != "storage" || slices.Contains(r.Roles[:i], role) {
			return fmt.Errorf("role %.64q of a join token is neither controller nor storage, or there twice: %w", role, volume.ErrInvalid)
		}
	}
	if len(r.Node) > volume.MaxNodeIDLen || len(r.CreatedBy) > volume.MaxNameLen {
		return fmt.Errorf("join token %s: a name is too long: %w", r.ID, volume.ErrInvalid)
	}
	if r.Uses < 1 || r.Uses > MaxUses || r.Node != "" && r.Uses != 1 {
		return fmt.Errorf("join token %s: %d uses; there are 1 to %d, and 1 for a node that is named: %w",
			r.ID, r.Uses, MaxUses, volume.ErrOutOfRange)
	}
	if life := int64(r.ExpiresAt - r.CreatedAt); life <= 0 || life > MaxLifetime {
		return fmt.Errorf("join token %s: it must expire within 30 days of its making: %w", r.ID, volume.ErrOutOfRange)
	}
	if len(r.Redeemed) > 0 {
		return fmt.Errorf("join token %s is used before it is made: %w", r.ID, volume.ErrInvalid)
	}
	return nil
}

// Claim is a node's wish to join with a token.
type Claim struct {
	Token string        `json:"token"` // its ID
	Hash  string        `json:"hash"`
	Node  volume.NodeID `json:"node"`
	// Key is as in Redemption.
	Key string `json:"key"`
}

// Check returns volume.ErrInvalid where a claim is malformed.
func (c Claim) Check() error {
	if !isHex(c.Token, idLen) || !isHex(c.Hash, sha256.Size) || !isHex(c.Key, sha256.Size) {
		return fmt.Errorf("malformed claim to join: %w", volume.ErrInvalid)
	}
	if c.Node == "" || len(c.Node) > volume.MaxNodeIDLen {
		return fmt.Errorf("a node id has 1 to %d bytes: %w", volume.MaxNodeIDLen, volume.ErrInvalid)
	}
	return nil
}

// Redeem uses a token and returns its record as it is then; member says that the cluster has a node of that id. The same node with the same key may ask again until the
// token expires, since it may not have got the answer. It returns volume.ErrNotFound for a wrong secret, in the words for
// a token that does not exist, volume.ErrStale for one that has expired, volume.ErrInUse for one that is used up, and
// volume.ErrExists for a node that is a member already, unless the token is for it by name.
func (r Record) Redeem(now volume.Timestamp, c Claim, member bool) (Record, error) {
	if r.ID != c.Token || subtle.ConstantTimeCompare([]byte(r.Hash), []byte(c.Hash)) != 1 {
		return r, Unknown(c.Token)
	}
	if now >= r.ExpiresAt {
		return r, fmt.Errorf("join token %s has expired; make another: %w", r.ID, volume.ErrStale)
	}
	if r.Node != "" && r.Node != c.Node {
		return r, fmt.Errorf("join token %s is for another node: %w", r.ID, volume.ErrInUse)
	}
	if r.Of(c).Node != "" {
		return r, nil
	}
	if len(r.Redeemed) >= r.Uses {
		return r, fmt.Errorf("join token %s is used up; make another: %w", r.ID, volume.ErrInUse)
	}
	if member && r.Node == "" {
		return r, fmt.Errorf("node %s is a member already; a token that is made for it by name lets it in again: %w",
			c.Node, volume.ErrExists)
	}
	r.Redeemed = append(slices.Clone(r.Redeemed), Redemption{Node: c.Node, Key: c.Key, At: now})
	return r, nil
}

// Unknown is the error for a token that there is not, or whose secret is wrong: one cannot be told from the other.
func Unknown(id string) error {
	return fmt.Errorf("no join token %s with that secret: %w", id, volume.ErrNotFound)
}

// Spent tells whether a record may be forgotten: nothing can be had with it any more.
func (r Record) Spent(now volume.Timestamp) bool { return now >= r.ExpiresAt }

func isHex(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == n && s == strings.ToLower(s)
}
