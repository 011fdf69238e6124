// Package adminpb is the generated code of the admin API; admin.proto documents it. `go generate ./pkg/admin` makes it
// anew with protoc, protoc-gen-go and protoc-gen-go-grpc.
package adminpb
