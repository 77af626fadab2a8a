"""Where the time of a run went, as tables for the page and the terminal."""

from rlhfjax.evaluation.report.display import duration, percent
from rlhfjax.host.goodput import FAILURE, KINDS, PREEMPTION, PRODUCTIVE, Account

_ENDS = {None: "killed", 0: "finished", 42: "preempted or stopped", 130: "interrupted"}


def spent_rows(account: Account) -> list[list[str]]:
    """Kind, wall time and share, of each kind that took time, and of all."""
    wall = account.wall
    if not wall:
        return []
    rows = [[kind, duration(account.seconds[kind]), percent(account.seconds[kind] / wall)] for kind in KINDS]
    rows = [row for row, kind in zip(rows, KINDS, strict=True) if account.seconds[kind] or kind == PRODUCTIVE]
    return [*rows, ["wall time", duration(wall), percent(1.0)]]


def restart_rows(account: Account) -> list[list[str]]:
    """Number of the attempt, how the one before ended, and the time from there to the first new work."""
    recovered = account.to_recover()
    return [
        [str(number), ended(before.code), duration(seconds)]
        for number, (before, seconds) in enumerate(zip(account.attempts, recovered, strict=False), 2)
    ]


def ended(code: int | None) -> str:
    """How an attempt ended, in words."""
    return _ENDS.get(code, f"exit code {code}")


def steps_line(account: Account) -> str:
    """How many steps were new, and how many were done again after what."""
    again = {kind: account.steps[kind] for kind in (PREEMPTION, FAILURE) if account.steps[kind]}
    told = ", ".join(f"{count} done again ({kind})" for kind, count in again.items())
    return f"{account.steps[PRODUCTIVE]} steps" + (f", {told}" if told else "")


def goodput_line(account: Account | None) -> str:
    """The one line of a run's summary; nothing of a run that kept no time."""
    if account is None or not account.wall:
        return ""
    starts = len(account.attempts)
    begun = "one start" if starts == 1 else f"{starts} starts"
    share = percent(account.seconds[PRODUCTIVE] / account.wall)
    return f"{share} of {duration(account.wall)} productive, {begun}"
