"""Runs that are hit by signals at chosen or random moments, and compared with undisturbed ones."""
