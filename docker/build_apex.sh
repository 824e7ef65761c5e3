#!/usr/bin/env bash
# Compile Apex, with its kernels for lists of tensors and norms, and write its wheel into a folder:
#
#   bash docker/build_apex.sh WHEELS
set -euo pipefail
wheels=${1:?name a folder for the wheel}
# shellcheck source=docker/versions.env
source "$(dirname "${BASH_SOURCE[0]}")/versions.env"

export APEX_CPP_EXT=1 APEX_CUDA_EXT=1
export TORCH_CUDA_ARCH_LIST=$CUDA_ARCHITECTURES
python3 -m pip wheel --no-build-isolation --no-deps --wheel-dir "$wheels" \
    "git+https://github.com/NVIDIA/apex.git@$APEX_COMMIT"
