package driver

import (
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/ballast-csi/ballast/pkg/volume"
)

// Bounds of a request. The first two are the specification's general size limits, the third is the kernel's.
const (
	maxString       = volume.MaxNameLen
	maxMap          = 4 << 10
	maxPath         = 4096
	maxCapabilities = 32
	maxTopologies   = 10000
)

// required returns volume.ErrInvalid for an empty field of a request.
func required(field, value string) error {
	if value == "" {
		return fmt.Errorf("%s is missing: %w", field, volume.ErrInvalid)
	}
	return nil
}

// checkRange returns the two ends of a capacity range. Zero is not given; volume.ErrInvalid where they contradict
// each other, volume.ErrOutOfRange where no volume can have such a size.
func checkRange(r *csi.CapacityRange) (requiredBytes, limitBytes int64, err error) {
	req, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case req < 0 || limit < 0:
		return 0, 0, fmt.Errorf("capacity_range is negative: %w", volume.ErrInvalid)
	case limit > 0 && limit < req:
		return 0, 0, fmt.Errorf("capacity_range: limit_bytes %d is less than required_bytes %d: %w", limit, req, volume.ErrInvalid)
	case req > volume.MaxSize:
		return 0, 0, fmt.Errorf("required_bytes %d, the largest volume has %d: %w", req, volume.MaxSize, volume.ErrOutOfRange)
	case limit > 0 && limit < volume.MinSize:
		return 0, 0, fmt.Errorf("limit_bytes %d, the smallest volume has %d: %w", limit, volume.MinSize, volume.ErrOutOfRange)
	}
	return req, limit, nil
}

// longFields are the fields whose own limit overrides the general one for strings.
var longFields = map[protoreflect.Name]int{
	"node_id":             volume.MaxNodeIDLen,
	"staging_target_path": maxPath,
	"target_path":         maxPath,
	"volume_path":         maxPath,
	"volume_publish_path": maxPath,
}

// checkLimits returns volume.ErrInvalid where a field of a request, at any depth, exceeds the specification's size
// limit for its type. Every request passes it before a service sees it.
func checkLimits(m proto.Message) error {
	return checkMessage(m.ProtoReflect())
}

func checkMessage(m protoreflect.Message) (err error) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		err = checkField(f, v)
		return err == nil
	})
	return err
}

func checkField(f protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch {
	case f.IsMap():
		total := 0
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			total += len(k.String()) + len(v.String())
			return true
		})
		return checkSize(f, total, maxMap)
	case f.IsList() && f.Kind() == protoreflect.StringKind:
		total := 0
		for i := range v.List().Len() {
			total += len(v.List().Get(i).String())
		}
		return checkSize(f, total, maxMap)
	case f.IsList() && f.Kind() == protoreflect.MessageKind:
		for i := range v.List().Len() {
			if err := checkMessage(v.List().Get(i).Message()); err != nil {
				return err
			}
		}
	case f.Kind() == protoreflect.StringKind:
		limit, ok := longFields[f.Name()]
		if !ok {
			limit = maxString
		}
		return checkSize(f, len(v.String()), limit)
	case f.Kind() == protoreflect.MessageKind:
		return checkMessage(v.Message())
	}
	return nil
}

func checkSize(f protoreflect.FieldDescriptor, n, limit int) error {
	if n > limit {
		return fmt.Errorf("%s has %d bytes, the limit is %d: %w", f.Name(), n, limit, volume.ErrInvalid)
	}
	return nil
}
