#!/usr/bin/env bash
# Regenerates the committed stubs with pinned tools in a throw-away environment.
# With --check it writes nothing and fails if the committed stubs are not what the .proto files give.
# Old tools on purpose: code made by protobuf 6.31 loads on every runtime from 6.31 to 7.x, the newest's does not.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=(grpcio-tools==1.80.0 mypy-protobuf==3.7.0)
venv=.venv-protos
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "${tools[*]}" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet --no-input --disable-pip-version-check "${tools[@]}"
  echo "${tools[*]}" >"$venv/.installed"
fi

generate() { # into the directory $1
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos \
    --python_out="$1" --mypy_out=quiet:"$1" protos/latentd/v1/*.proto
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I protos \
    --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1" protos/latentd/v1/*_service.proto
}

if [ "${1:-}" != --check ]; then
  generate protos
  exit
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
if ! diff -r -q -x '*.proto' -x __init__.py -x __pycache__ "$fresh/latentd/v1" protos/latentd/v1; then
  echo "the committed stubs are not what protos/ gives; run 'make protos' and commit the result" >&2
  exit 1
fi
