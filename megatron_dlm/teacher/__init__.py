"""Teachers: frozen, self, stored; their inputs, targets and responses."""
