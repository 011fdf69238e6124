package driver

import (
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

const stripped = "***stripped***"

// opaque are fields that the specification does not mark as secret, but that may carry secrets: mount options have
// passwords, and kubelet puts service account tokens into the volume context.
var opaque = map[protoreflect.Name]bool{
	"mount_flags":     true,
	"volume_context":  true,
	"publish_context": true,
}

// sanitize is a request as one line of JSON for the log, without secrets and without the values of opaque fields.
func sanitize(req any) string {
	m, ok := req.(proto.Message)
	if !ok {
		return ""
	}
	m = proto.Clone(m)
	hide(m.ProtoReflect())
	return protosanitizer.StripSecrets(m).String()
}

func hide(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() && opaque[f.Name()]:
			v.Map().Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
				v.Map().Set(k, protoreflect.ValueOfString(stripped))
				return true
			})
		case f.IsList() && opaque[f.Name()]:
			for i := range v.List().Len() {
				v.List().Set(i, protoreflect.ValueOfString(stripped))
			}
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				hide(v.List().Get(i).Message())
			}
		case !f.IsList() && !f.IsMap() && f.Kind() == protoreflect.MessageKind:
			hide(v.Message())
		}
		return true
	})
}
