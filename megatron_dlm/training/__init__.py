"""Training: set-up, loop, optimizer, schedules, checkpoints and metrics."""
