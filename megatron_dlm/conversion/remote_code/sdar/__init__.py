"""The `sdar` and `sdar_moe` architectures for plain transformers."""
