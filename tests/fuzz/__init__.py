"""Odd inputs in large numbers: whatever is read, there is a result or one line, and an end."""
