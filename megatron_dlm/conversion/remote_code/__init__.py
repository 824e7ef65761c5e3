"""Modelling code that exported folders carry with them; needs transformers alone."""
