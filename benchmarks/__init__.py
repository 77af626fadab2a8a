"""Measurements of the package that tests do not make: results of whole runs, beside the commands that made them."""
