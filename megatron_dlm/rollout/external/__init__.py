"""Rollouts by servers outside the run that speak SGLang's native HTTP API."""
