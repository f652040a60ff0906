#!/usr/bin/env bash
# Resolves what the server's images install, by hash, into deploy/docker/server-{cpu,gpu}.lock.
# Run it after changing dependencies in pyproject.toml, or to take up newer releases; tests/deploy checks that the
# locks still satisfy pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."

tool=uv==0.13.9
venv=.venv-locks
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$tool" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet --no-input --disable-pip-version-check "$tool"
  echo "$tool" >"$venv/.installed"
fi

for flavour in cpu gpu; do
  "$venv/bin/uv" pip compile pyproject.toml --extra server --extra "$flavour" --python-version 3.11 \
    --python-platform linux --generate-hashes --no-header --upgrade --quiet \
    --output-file "deploy/docker/server-$flavour.lock"
done
