"""The objectives side by side on the tiny model: equal prompts, equal updates, several seeds."""
