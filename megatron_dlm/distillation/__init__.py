"""Divergence from the teacher, and cross entropy, without the full logits in memory."""
