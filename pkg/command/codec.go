package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

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
var kinds = map[string]func(json.RawMessage) (Command, error){
	"register-node":          decodeAs[RegisterNode],
	"report-usage":           decodeAs[ReportUsage],
	"create-volume":          decodeAs[CreateVolume],
	"finish-create":          decodeAs[FinishCreate],
	"begin-delete":           decodeAs[BeginDelete],
	"finish-delete":          decodeAs[FinishDelete],
	"attach":                 decodeAs[Attach],
	"begin-detach":           decodeAs[BeginDetach],
	"finish-detach":          decodeAs[FinishDetach],
	"begin-expand":           decodeAs[BeginExpand],
	"finish-expand":          decodeAs[FinishExpand],
	"abort-expand":           decodeAs[AbortExpand],
	"modify-qos":             decodeAs[ModifyQoS],
	"set-filesystem":         decodeAs[SetFilesystem],
	"begin-snapshot":         decodeAs[BeginSnapshot],
	"finish-snapshot":        decodeAs[FinishSnapshot],
	"begin-delete-snapshot":  decodeAs[BeginDeleteSnapshot],
	"finish-delete-snapshot": decodeAs[FinishDeleteSnapshot],
	"set-quota":              decodeAs[SetQuota],
	"delete-quota":           decodeAs[DeleteQuota],
}

func kindOf(c Command) string {
	switch c.(type) {
	case RegisterNode:
		return "register-node"
	case ReportUsage:
		return "report-usage"
	case CreateVolume:
		return "create-volume"
	case FinishCreate:
		return "finish-create"
	case BeginDelete:
		return "begin-delete"
	case FinishDelete:
		return "finish-delete"
	case Attach:
		return "attach"
	case BeginDetach:
		return "begin-detach"
	case FinishDetach:
		return "finish-detach"
	case BeginExpand:
		return "begin-expand"
	case FinishExpand:
		return "finish-expand"
	case AbortExpand:
		return "abort-expand"
	case ModifyQoS:
		return "modify-qos"
	case SetFilesystem:
		return "set-filesystem"
	case BeginSnapshot:
		return "begin-snapshot"
	case FinishSnapshot:
		return "finish-snapshot"
	case BeginDeleteSnapshot:
		return "begin-delete-snapshot"
	case FinishDeleteSnapshot:
		return "finish-delete-snapshot"
	case SetQuota:
		return "set-quota"
	case DeleteQuota:
		return "delete-quota"
	}
	return ""
}

// Encode makes a command's durable form. It returns volume.ErrInvalid or volume.ErrOutOfRange where Check does, or where
// the encoding would be longer than MaxEncoded.
func Encode(c Command) ([]byte, error) {
	kind := kindOf(c)
	if kind == "" {
		return nil, fmt.Errorf("command of type %T has no encoding: %w", c, volume.ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	body, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %v: %w", kind, err, volume.ErrInvalid)
	}
	b, err := json.Marshal(envelope{Version: Version, Type: kind, Command: body})
	if err != nil {
		return nil, fmt.Errorf("encode %s: %v: %w", kind, err, volume.ErrInvalid)
	}
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d: %w", kind, len(b), MaxEncoded, volume.ErrInvalid)
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
	decode, ok := kinds[e.Type]
	if !ok {
		return nil, fmt.Errorf("command type %.64q is unknown: %w", e.Type, volume.ErrInvalid)
	}
	c, err := decode(e.Command)
	if err != nil {
		return nil, fmt.Errorf("command %s: %v: %w", e.Type, err, volume.ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return nil, err
	}
	return c, nil
}

func decodeAs[T Command](b json.RawMessage) (Command, error) {
	var c T
	if err := strict(b, &c); err != nil {
		return nil, err
	}
	return c, nil
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
