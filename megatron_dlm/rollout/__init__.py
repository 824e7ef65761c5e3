"""Rollouts: block-diffusion decoding with a KV cache and continuous batching."""
