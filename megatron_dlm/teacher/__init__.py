"""Teachers: frozen, self, stored, remote; their inputs, targets and responses."""
