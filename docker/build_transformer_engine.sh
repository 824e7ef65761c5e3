#!/usr/bin/env bash
# Write the wheels of Transformer Engine into a folder:
#
#   bash docker/build_transformer_engine.sh WHEELS
#
# Its kernels come compiled; what connects them to PyTorch is compiled here, for the PyTorch that is
# installed.
set -euo pipefail
wheels=${1:?name a folder for the wheels}
# shellcheck source=docker/versions.env
source "$(dirname "${BASH_SOURCE[0]}")/versions.env"
cuda=$(python3 -c 'import torch; print(torch.version.cuda.split(".")[0])')
version=$TRANSFORMER_ENGINE_VERSION

# Compiled in any case: a wheel that is found on the network may be for another PyTorch.
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
# Its own exchange of experts' tokens needs a newer NCCL and is not used.
export NVTE_WITH_NCCL_EP=0
python3 -m pip wheel --no-build-isolation --no-deps --wheel-dir "$wheels" \
    "transformer-engine==$version" \
    "transformer-engine-cu$cuda==$version" \
    "transformer-engine-torch==$version"
