"""What travels between packages; imports nothing above it."""
