"""An OpenAI-compatible server over the rollout engine."""
