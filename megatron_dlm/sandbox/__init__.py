"""Run Python code that nobody has read, and tests of such code whose verdict it cannot forge."""
