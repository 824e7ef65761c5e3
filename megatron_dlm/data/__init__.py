"""Prompts, training examples, tokenizers, synthetic tasks and resumable sampling."""
