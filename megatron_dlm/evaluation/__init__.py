"""Scoring of generated responses."""
