#!/usr/bin/env bash
# Tests and benchmarks on a GPU: the arguments and the result file are those of benchmarks/gpu.py.
# Where nothing can be downloaded, a folder WHEELS (.whl) brings the packages that the machine lacks.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels="${WHEELS:-.whl}"
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python3 -m benchmarks.gpu "$@"
