"""How much of everything a server takes."""

from dataclasses import dataclass

MOST_BIASES = 300  # tokens of a request's logit_bias


@dataclass(frozen=True)
class Limits:
    """Tokens of a prompt and of a response with it, responses that wait, bytes and seconds of a request.

    `context` None is what each model can read. A response that takes longer than `seconds` ends where it is.
    """

    slots: int = 16
    context: int | None = None
    new_tokens: int | None = None
    queue: int = 64
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    seconds: float = 600.0
