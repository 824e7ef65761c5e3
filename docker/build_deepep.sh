#!/usr/bin/env bash
# Compile DeepEP, and write its wheel and that of NVSHMEM, which it calls, into a folder:
#
#   bash docker/build_deepep.sh WHEELS
#
# Needs the headers of libibverbs (Debian and Ubuntu: libibverbs-dev).
set -euo pipefail
wheels=${1:?name a folder for the wheels}
# shellcheck source=docker/versions.env
source "$(dirname "${BASH_SOURCE[0]}")/versions.env"
cuda=$(python3 -c 'import torch; print(torch.version.cuda.split(".")[0])')

# DeepEP's library remembers where NVSHMEM is: install both into an environment of the same path.
python3 -m pip wheel --no-deps --wheel-dir "$wheels" "nvidia-nvshmem-cu$cuda==$NVSHMEM_VERSION"
python3 -m pip install --no-deps "nvidia-nvshmem-cu$cuda==$NVSHMEM_VERSION"

export TORCH_CUDA_ARCH_LIST=$CUDA_ARCHITECTURES
# CUDA 13 has the headers of its C++ library in a folder of their own.
export CPATH="/usr/local/cuda/include/cccl${CPATH:+:$CPATH}"
python3 -m pip wheel --no-build-isolation --no-deps --wheel-dir "$wheels" \
    "git+https://github.com/deepseek-ai/DeepEP.git@$DEEPEP_COMMIT"
