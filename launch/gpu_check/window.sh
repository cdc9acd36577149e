#!/bin/sh
# On the GPU's machine: sh window.sh OUT [MINUTES [FLAGS]]. Unpacks what `make gpu-window` has packed beside it, and checks.
# Results lie in OUT after each part; called again (OUT, or results/ beside this file, kept) it goes on with the rest.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
minutes=${2:-9}
work=${WORK:-/tmp/gpu-window}
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$work/code" "$work/results"
tar -xzf "$here/code.tar.gz" -C "$work/code"
tar -xf "$here/data.tar.xz" -C "$work"
python3 -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$here"/wheels/*.whl || echo "no wheels"
for kept in "$work"/results/* "$here"/results/*; do [ -e "$kept" ] && cp -n "$kept" "$out"; done || true
cd "$work/code"
status=0
COMMIT=$(cat "$here/commit") PYTHONPATH="$work/site" python3 -m launch.gpu_check --minutes "$minutes" \
  --data "$work/photos" --out "$out" --work "$work/runs" "$@" || status=$?
cp "$out"/* "$work/results"
exit $status
