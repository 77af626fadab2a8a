"""Expected failures. Each carries the exit code that the command line returns for it.

The message of an expected error is one or two lines: what was expected, what was got, where, and what to do.
"""


class RlhfjaxError(Exception):
    """Base of all expected errors; `exit_code` is what the command line exits with, `status` what the manifest says."""

    exit_code = 1
    status = "failed"


class ConfigError(RlhfjaxError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(RlhfjaxError):
    """A data file or record that cannot be used (exit code 3)."""

    exit_code = 3


class RewardError(DataError):
    """A reward that gave no numbers for a response where that ends the run (exit code 3)."""


class IntegrityError(RlhfjaxError):
    """A digest or a checkpoint that does not match what was written (exit code 4)."""

    exit_code = 4


class Diverged(RlhfjaxError):
    """Training that a guard ended; the same command would end there again, so nothing repeats it (exit code 4)."""

    exit_code = 4
    status = "diverged"


class Stopped(RlhfjaxError):
    """Stopped early with everything saved; the same command continues (exit code 42)."""

    exit_code = 42
    status = "preempted"
