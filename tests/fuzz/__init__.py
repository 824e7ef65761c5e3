"""Odd inputs in large numbers: each ends in a result or in a one-line error."""
