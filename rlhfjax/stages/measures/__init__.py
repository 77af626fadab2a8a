"""Measures of models: on held-out data while they train, and of their responses at the end."""
