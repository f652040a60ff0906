#!/usr/bin/env bash
# Fails if protos/ breaks the contract of the main branch and, where HEAD is the tip of main, of the commit before.
set -euo pipefail
cd "$(dirname "$0")/.."

commit() { git rev-parse --quiet --verify "$1^{commit}" 2>/dev/null; }

main=$(commit origin/main || commit main || true)
bases=${main:+main=$main}
if [ -z "$main" ] || [ "$main" = "$(commit HEAD)" ]; then
  bases="$bases $(commit HEAD~1 | sed 's/^/parent=/' || true)"
fi
if [ -z "${bases// /}" ]; then
  echo "buf breaking: skipped, this checkout knows neither a main branch nor the parent of HEAD to compare with"
  exit 0
fi

before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
for base in $bases; do
  echo "buf breaking: against the contract of ${base%%=*} (${base##*=})"
  mkdir "$before/${base%%=*}"
  git archive "${base##*=}" -- protos | tar -x -C "$before/${base%%=*}"
  buf breaking protos --against "$before/${base%%=*}/protos"
done
