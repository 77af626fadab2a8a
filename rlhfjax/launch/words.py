"""Words of people in files of other programs: what may stand there, and how it is quoted so that it stays one word.

A template knows nothing of what is put in. Each value goes through one of the filters here, which is the one of its
place: a word of bash, a scalar of YAML, an argument that Kubernetes looks through for `$(NAME)`.
"""

import json
import re
import shlex

from rlhfjax.errors import ConfigError

_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:[:/][A-Za-z0-9_][A-Za-z0-9._-]*)*(?:@sha256:[0-9a-f]{64})?")
_LONGEST_NAME = 40  # a pod is called NAME-workers-0-0-xxxxx, in 63 characters


def plain(what: str, text: str) -> str:
    """A word that may stand in a comment, too, and that no command takes for an option. Raises ConfigError."""
    if not text or not text.isprintable():
        raise ConfigError(f"{what}: expected text of one line that can be printed, got {text!r}")
    if text.startswith("-"):
        raise ConfigError(f"{what}: expected no dash at the beginning, got {text!r}")
    return text


def job_name(name: str) -> str:
    """What schedulers call a run: small letters, digits and dashes. Raises ConfigError where nothing is left."""
    found = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    if not found or not found[0].isalpha():
        raise ConfigError(f"name: expected one that begins with a letter, for a scheduler to use, got {name!r}")
    return found


def image_name(image: str) -> str:
    """The name of a container's image. Raises ConfigError for what no registry has."""
    if not _IMAGE.fullmatch(image):
        raise ConfigError(f"--image: expected REGISTRY/NAME:TAG or NAME@sha256:DIGEST, got {image!r}")
    return image


def is_shared(run_dir: str) -> bool:
    """Whether machines that have no directory in common can all reach it."""
    return re.match(r"(?:gs|s3)://[^/]", run_dir) is not None


def word(value: object) -> str:
    """One word of bash."""
    return shlex.quote(str(value))


def words(values: list[str]) -> str:
    """Words of bash, on one line."""
    return shlex.join(values)


def scalar(value: object) -> str:
    """A scalar of YAML: JSON's text is one, whatever stands in it."""
    return json.dumps(value)


def untouched(text: str) -> str:
    """What Kubernetes makes the text of: in what it starts it replaces `$(NAME)`, and takes `$$` for a plain $."""
    return text.replace("$", "$$")


FILTERS = {"word": word, "words": words, "scalar": scalar, "untouched": untouched}
