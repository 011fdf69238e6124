package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"

	"github.com/ballast-csi/ballast/pkg/volume"
)

const (
	// Version of the encoding. A decoder refuses any other.
	Version = 1
	// MaxEncoded bounds an encoded command, in bytes.
	MaxEncoded = 256 << 10
)

type envelope struct {
	Version int             `json:"v"`
	Type    string          `json:"t"`
	Command json.RawMessage `json:"c"`
}

// kinds is the stable name of every type. A name is never given to another type.
var kinds = map[string]kindOfCommand{
	"register-node":          kind[RegisterNode](),
	"report-usage":           kind[ReportUsage](),
	"create-volume":          kind[CreateVolume](),
	"finish-create":          kind[FinishCreate](),
	"begin-delete":           kind[BeginDelete](),
	"finish-delete":          kind[FinishDelete](),
	"attach":                 kind[Attach](),
	"begin-detach":           kind[BeginDetach](),
	"finish-detach":          kind[FinishDetach](),
	"begin-expand":           kind[BeginExpand](),
	"finish-expand":          kind[FinishExpand](),
	"abort-expand":           kind[AbortExpand](),
	"modify-volume":          kind[ModifyVolume](),
	"set-filesystem":         kind[SetFilesystem](),
	"begin-snapshot":         kind[BeginSnapshot](),
	"finish-snapshot":        kind[FinishSnapshot](),
	"begin-delete-snapshot":  kind[BeginDeleteSnapshot](),
	"finish-delete-snapshot": kind[FinishDeleteSnapshot](),
	"set-node-state":         kind[SetNodeState](),
	"remove-node":            kind[RemoveNode](),
	"create-join-token":      kind[CreateJoinToken](),
	"revoke-join-token":      kind[RevokeJoinToken](),
	"redeem-join-token":      kind[RedeemJoinToken](),
	"free-replica":           kind[FreeReplica](),
	"commit":                 kind[Commit](),
	"force-detach":           kind[ForceDetach](),
	"open-engine":            kind[OpenEngine](),
	"close-engine":           kind[CloseEngine](),
	"add-replica":            kind[AddReplica](),
	"drop-replica":           kind[DropReplica](),
	"lose-replica":           kind[LoseReplica](),
	"forget-pool":            kind[ForgetPool](),
	"salvage":                kind[Salvage](),
	"add-holder":             kind[AddHolder](),
	"drop-holder":            kind[DropHolder](),
	"free-holder":            kind[FreeHolder](),
	"copy-snapshot":          kind[CopySnapshot](),
	"note-difference":        kind[NoteDifference](),
	"begin-group":            kind[BeginGroup](),
	"finish-group":           kind[FinishGroup](),
	"begin-delete-group":     kind[BeginDeleteGroup](),
	"set-quota":              kind[SetQuota](),
	"delete-quota":           kind[DeleteQuota](),
}

// kindOf is the name of a command's type, or "".
func kindOf(c Command) string { return names[reflect.TypeOf(c)] }

var names = func() map[reflect.Type]string {
	m := map[reflect.Type]string{}
	for name, k := range kinds {
		m[k.of] = name
	}
	return m
}()

// Encode makes a command's durable form. It returns volume.ErrInvalid or volume.ErrOutOfRange where Check does, or where
// the encoding would be longer than MaxEncoded.
func Encode(c Command) ([]byte, error) {
	name := kindOf(c)
	if name == "" {
		return nil, fmt.Errorf("command of type %T has no encoding: %w", c, volume.ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	body, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %v: %w", name, err, volume.ErrInvalid)
	}
	b, err := json.Marshal(envelope{Version: Version, Type: name, Command: body})
	if err != nil {
		return nil, fmt.Errorf("encode %s: %v: %w", name, err, volume.ErrInvalid)
	}
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d: %w", name, len(b), MaxEncoded, volume.ErrInvalid)
	}
	return b, nil
}

// Decode reads what Encode made. Unknown versions, types and fields, trailing bytes and values that Check refuses are
// volume.ErrInvalid or volume.ErrOutOfRange.
func Decode(b []byte) (Command, error) {
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("command has %d bytes, the limit is %d: %w", len(b), MaxEncoded, volume.ErrInvalid)
	}
	var e envelope
	if err := strict(b, &e); err != nil {
		return nil, fmt.Errorf("command: %v: %w", err, volume.ErrInvalid)
	}
	if e.Version != Version {
		return nil, fmt.Errorf("command has version %d, this program knows %d: %w", e.Version, Version, volume.ErrInvalid)
	}
	k, ok := kinds[e.Type]
	if !ok {
		return nil, fmt.Errorf("command type %.64q is unknown: %w", e.Type, volume.ErrInvalid)
	}
	c, err := k.decode(e.Command)
	if err != nil {
		return nil, fmt.Errorf("command %s: %v: %w", e.Type, err, volume.ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	return c, nil
}

type kindOfCommand struct {
	of     reflect.Type
	decode func(json.RawMessage) (Command, error)
}

func kind[T Command]() kindOfCommand {
	return kindOfCommand{reflect.TypeFor[T](), func(b json.RawMessage) (Command, error) {
		var c T
		if err := strict(b, &c); err != nil {
			return nil, err
		}
		return c, nil
	}}
}

func strict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("bytes after the value")
	}
	return nil
}
