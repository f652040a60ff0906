#!/usr/bin/env bash
# Regenerates the committed stubs with pinned tools in a throw-away environment.
# Old tools on purpose: code made by protobuf 6.31 loads on every runtime from 6.31 to 7.x, the newest's does not.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-protos
if [ ! -x "$venv/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.80.0 mypy-protobuf==3.7.0
fi
export PATH="$PWD/$venv/bin:$PATH"
"$venv/bin/python" -m grpc_tools.protoc -I protos --python_out=protos --mypy_out=quiet:protos protos/latentd/v1/*.proto
"$venv/bin/python" -m grpc_tools.protoc -I protos --grpc_python_out=protos --mypy_grpc_out=quiet:protos \
  protos/latentd/v1/*_service.proto
