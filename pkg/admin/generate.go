package admin

//go:generate protoc --proto_path=adminpb --go_out=adminpb --go_opt=paths=source_relative --go-grpc_out=adminpb --go-grpc_opt=paths=source_relative admin.proto
