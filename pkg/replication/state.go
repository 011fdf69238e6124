package replication

import (
	"encoding/json"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// replicaState is what a replica keeps durably beside its data, its write-intent log and what others missed.
type replicaState struct {
	Format        int                  `json:"format"`
	Epoch         volume.Epoch         `json:"epoch"`
	Lineage       Lineage              `json:"lineage"`
	ConfigVersion volume.ConfigVersion `json:"configVersion"`
	Role          Role                 `json:"role"`
	Poisoned      bool                 `json:"poisoned,omitempty"`
	ISR           []volume.ReplicaID   `json:"isr,omitempty"`
}

const stateFormat = 1

func (s *replicaState) encode() []byte {
	s.Format = stateFormat
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // the type has nothing that cannot be encoded
	}
	return b
}

// decodeState reads what encode wrote; nothing at all is a replica that was never configured.
func decodeState(b []byte) (replicaState, error) {
	s := replicaState{Role: RoleNEW}
	if len(b) == 0 {
		return s, nil
	}
	if len(b) > MaxState {
		return s, fmt.Errorf("protocol state has %d bytes, the limit is %d: %w", len(b), MaxState, volume.ErrDataLoss)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("protocol state: %v: %w", err, volume.ErrDataLoss)
	}
	if s.Format != stateFormat || s.Role < RoleNEW || s.Role > RoleSTALE || len(s.ISR) > MaxMembers {
		return s, fmt.Errorf("protocol state of format %d is not known: %w", s.Format, volume.ErrDataLoss)
	}
	return s, nil
}

// Salvageable describes a replica's durable state to an admin who has to choose one.
type Salvageable struct {
	Epoch         volume.Epoch
	Lineage       Lineage
	ConfigVersion volume.ConfigVersion
	Role          Role
	Poisoned      bool
	ISR           []volume.ReplicaID
}

// ReadState decodes a replica's durable protocol state; volume.ErrDataLoss where it is damaged.
func ReadState(b []byte) (Salvageable, error) {
	s, err := decodeState(b)
	return Salvageable{Epoch: s.Epoch, Lineage: s.Lineage, ConfigVersion: s.ConfigVersion, Role: s.Role, Poisoned: s.Poisoned, ISR: s.ISR}, err
}
