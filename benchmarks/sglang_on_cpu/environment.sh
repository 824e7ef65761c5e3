#!/usr/bin/env bash
# Make an environment in which SGLang's server runs without a GPU: bash environment.sh FOLDER
# 7 GB: PyTorch for Linux brings CUDA's libraries, which nothing calls here. PYTHON: of 3.11 or 3.12.
set -euo pipefail

folder="${1:?name the folder of the new environment}"
"${PYTHON:-python3.11}" -m venv "$folder"
# The versions that SGLang asks for, of what its server imports on a CPU; its kernels for GPUs stay
# away, as they would not load.
"$folder/bin/pip" install --no-cache-dir \
    torch==2.14.1 torchvision==0.29.1 transformers==5.19.0 tokenizers==0.23.2 \
    apache-tvm-ffi==0.1.11 blobfile==3.0.0 compressed-tensors==0.18.0 numba==0.65.1 openai==2.8.0 \
    openai-harmony==0.0.4 sentencepiece==0.2.1 soundfile==0.13.1 xgrammar==0.2.7 \
    aiohttp datasets distro einops fastapi gguf interegular ipython jsonschema 'llguidance<2,>=1.7.6' \
    modelscope msgspec ninja numpy nvidia-ml-py orjson packaging partial_json_parser pillow \
    prometheus-client psutil pybase64 pydantic python-multipart pyzmq regex requests scipy \
    setproctitle tiktoken tqdm 'uvicorn>=0.51' uvloop watchfiles xxhash zstandard
"$folder/bin/pip" install --no-deps sglang==0.5.23 outlines==0.1.11
