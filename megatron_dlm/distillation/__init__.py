"""Divergence from the teacher, and cross entropy, without ever holding the logits whole."""
