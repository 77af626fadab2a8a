"""Fixtures of the stages: a finished run, and the command line."""

from stages.conftest import command, config, copied, environment, files, finished, for_all, start

__all__ = ["command", "config", "copied", "environment", "files", "finished", "for_all", "start"]
