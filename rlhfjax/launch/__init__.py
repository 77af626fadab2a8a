"""Processes of one run, started and watched together."""
