package command

import (
	"encoding/json"
	"fmt"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// results is the stable name of every type of result. A name is never given to another type.
var results = []struct {
	name   string
	is     func(Result) bool
	decode func(json.RawMessage) (Result, error)
}{
	{"done", isA[Done], resultAs[Done]},
	{"volume", isA[Volume], resultAs[Volume]},
	{"snapshot", isA[Snapshot], resultAs[Snapshot]},
	{"group", isA[Group], resultAs[Group]},
	{"join-token", isA[JoinToken], resultAs[JoinToken]},
	{"refused", isA[Refused], resultAs[Refused]},
}

func isA[T Result](r Result) bool {
	_, ok := r.(T)
	return ok
}

func resultAs[T Result](b json.RawMessage) (Result, error) {
	var r T
	if err := strict(b, &r); err != nil {
		return nil, err
	}
	return r, nil
}

type resultEnvelope struct {
	Version int             `json:"v"`
	Type    string          `json:"t"`
	Result  json.RawMessage `json:"r"`
}

// EncodeResult makes a result's durable form. It returns volume.ErrInvalid for a type that has none.
func EncodeResult(r Result) ([]byte, error) {
	for _, x := range results {
		if !x.is(r) {
			continue
		}
		body, err := json.Marshal(r)
		if err != nil {
			return nil, fmt.Errorf("encode result %s: %v: %w", x.name, err, volume.ErrInvalid)
		}
		return json.Marshal(resultEnvelope{Version: Version, Type: x.name, Result: body})
	}
	return nil, fmt.Errorf("result of type %T has no encoding: %w", r, volume.ErrInvalid)
}

// DecodeResult reads what EncodeResult made; anything else is volume.ErrInvalid.
func DecodeResult(b []byte) (Result, error) {
	var e resultEnvelope
	if err := strict(b, &e); err != nil {
		return nil, fmt.Errorf("result: %v: %w", err, volume.ErrInvalid)
	}
	if e.Version != Version {
		return nil, fmt.Errorf("result has version %d, this program knows %d: %w", e.Version, Version, volume.ErrInvalid)
	}
	for _, x := range results {
		if x.name != e.Type {
			continue
		}
		r, err := x.decode(e.Result)
		if err != nil {
			return nil, fmt.Errorf("result %s: %v: %w", x.name, err, volume.ErrInvalid)
		}
		return r, nil
	}
	return nil, fmt.Errorf("result type %.64q is unknown: %w", e.Type, volume.ErrInvalid)
}
