"""Hugging Face checkpoints to Megatron models and back."""
