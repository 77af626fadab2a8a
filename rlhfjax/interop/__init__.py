"""Models of other libraries: what their configurations and weights are called here."""
