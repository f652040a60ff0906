"""Generated protobuf messages and gRPC stubs of `latentd.v1`; run `make protos` to make them anew."""
