"""A worker's work on examples: call a function, run a command, match a pattern, ask a moderation policy.

It is the standard library alone, but for what a policy needs. Each kind is loaded once and gives a function from
examples to an answer: `values`, for each a number, or a text that says what came instead of one; or `error`, what went
wrong with all of them.
"""

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhfjax.rewards.example import Example

Answer = dict[str, Any]
Score = Callable[[list[Example]], Answer]
_LONGEST = 300  # characters of a message of others
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 400  # characters of standard error in a message


class _Source(importlib.abc.ExecutionLoader):
    """Loads a module from text that is in memory, whatever its file has become since."""

    def __init__(self, path: str, text: str):
        self._path, self._text = path, text

    def get_source(self, fullname: str) -> str:
        return self._text

    def get_filename(self, fullname: str) -> str:
        return self._path


def function(path: str, name: str, source: str) -> tuple[Score | None, Answer]:
    """The function `name` of a Python file; modules beside the file can be imported."""
    folder, file = os.path.split(os.path.abspath(path))
    sys.path.insert(0, folder)
    # Tracebacks show the text that runs.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    title = f"reward_{os.path.splitext(file)[0]}"  # a file may be called random.py
    spec = importlib.machinery.ModuleSpec(title, _Source(path, source), origin=path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        assert spec.loader
        spec.loader.exec_module(module)
        called = getattr(module, name, None)
    except BaseException as error:  # sys.exit, too
        return None, {"error": described(error, path)}
    if not callable(called):
        there = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        return None, {"error": f"expected a function {name} in {path}, got {', '.join(there) or 'none'}"}

    def score(examples: list[Example]) -> Answer:
        try:
            return _numbers(called(examples))
        except BaseException as error:
            return {"error": described(error, path)}

    return score, {}


def _numbers(given: Any) -> Answer:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return {"error": f"expected a list of numbers, one for each example, got {type(given).__name__}"}
    return {"values": [_number(value) for value in given]}


def _number(value: Any) -> float | str:
    """A number of Python, numpy or any library that has numbers (a boolean is 0 or 1); else what it is instead."""
    if not isinstance(value, str | bytes) and hasattr(value, "__float__"):
        try:
            return float(value)
        except Exception:  # an array of several, a number beyond all floats
            pass
    return f"expected a number, got {type(value).__name__}"


def described(error: BaseException, path: str) -> str:
    """An error in one line, with the last line of the user's file that it went through."""
    words = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == path] or frames[-1:]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    shown = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
    return f"{type(error).__name__}{': ' if shown else ''}{shown}{where}"


def command(argv: list[str]) -> tuple[Score, Answer]:
    """A program that is run once for each list of examples."""

    def score(examples: list[Example]) -> Answer:
        lines = "".join(json.dumps(example.as_json()) + "\n" for example in examples)
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writing)
        except OSError as error:
            os.close(reading)
            return {"error": f"{argv[0]}: expected a program, got {error.strerror}"}
        finally:
            os.close(writing)
        said = _LastWords(reading)
        out, _ = process.communicate(lines.encode())
        words = said.words()
        if process.returncode:
            return {"error": f"{argv[0]} ended with {ending(process.returncode)}{words}"}
        return _lines(out, len(examples), words)

    return score, {}


class _LastWords:
    """Passes on what a program writes to standard error as it comes, and keeps the end of it."""

    def __init__(self, reading: int):
        self._reading, self._tail = reading, b""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self._reading, 1 << 16):
            os.write(2, chunk)
            self._tail = (self._tail + chunk)[-_LAST_WORDS:]
        os.close(self._reading)

    def words(self) -> str:
        self._thread.join()  # the program's own children may still write
        text = " ".join(self._tail.decode("utf-8", "replace").split())
        return f"; its last words: {text}" if text else ""


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _lines(out: bytes, count: int, words: str) -> Answer:
    lines = out.decode("utf-8", "replace").splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = "text"
        if value is not None and not isinstance(value, int | float):
            got = repr(line[:40]) if isinstance(value, str) else type(value).__name__
            return {"error": f"line {number} of its output: expected a number or null, got {got}{words}"}
        values.append(_number(value))
    return {"values": values, "said": words} if len(values) != count else {"values": values}


def pattern(pattern: str, full: bool) -> tuple[Score, Answer]:
    """1 where a regular expression matches the response, as a whole or somewhere."""
    _die_with_parent()
    compiled = re.compile(pattern)
    match = compiled.fullmatch if full else compiled.search
    return (lambda examples: {"values": [float(match(example.response) is not None) for example in examples]}), {}


def moderation(policy: str) -> tuple[Score | None, Answer]:
    """-1 where a policy flags the response, else 0; its audit log is not written."""
    from rlhfjax.errors import RlhfjaxError
    from rlhfjax.moderation import open_policy

    try:
        moderator = open_policy(policy, audited=False)
    except RlhfjaxError as error:
        return None, {"error": str(error)}

    def score(examples: list[Example]) -> Answer:
        verdicts = moderator.outputs([example.response for example in examples])
        return {"values": [verdict.failed or (-1.0 if verdict.flagged else 0.0) for verdict in verdicts]}

    return score, {}


def _die_with_parent() -> None:
    """Where the system can: a search that holds the interpreter lets no thread kill it. It has no children to leave."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
