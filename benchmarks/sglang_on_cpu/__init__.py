"""Our rollouts beside SGLang's own, on a machine without a GPU."""
