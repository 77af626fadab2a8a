"""Answers of a model, and the settings that it may be asked with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.text.streaming import TextStream
from rlhfjax.types import Rollout


@dataclass(frozen=True)
class Completion:
    """One sampled response. `log_probs` are nats of each token; `finish_reason` is "stop" (it ended) or "length", and
    of a stream "cancelled", or None while it goes on.

    Where a stop string ended it, `text` is what was before that, and `tokens` are all that were drawn, of which the
    last completed the string. `top_log_probs` has the likeliest ids of each position with theirs, likeliest first,
    where they were asked for. `calls` counts how often the model was asked after the prompt, where it read draft
    tokens; else once per token.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: str | None
    top_log_probs: tuple[dict[int, float], ...] = ()
    calls: int | None = None


def completions(rollout: Rollout, tokenizer: AnyTokenizer | None) -> list[Completion]:
    """The responses of a rollout."""
    made = jax.device_get(rollout)
    answers = []
    for row, (response, kept, log_probs) in enumerate(
        zip(made.response, made.response_mask, made.sampled_log_probs, strict=True)
    ):
        ids, reason, top = response[kept].tolist(), "stop" if made.finished[row] else "length", ()
        if made.top_ids is not None:
            pairs = zip(made.top_ids[row][kept].tolist(), made.top_log_probs[row][kept].tolist(), strict=True)
            top = tuple(dict(zip(*pair, strict=True)) for pair in pairs)
        text = "" if tokenizer is None else tokenizer.decode_continuation(ids, int(made.prompt[row][-1]))
        calls = None if made.counts is None else int(made.counts[row, 0])
        answers.append(Completion(text, ids, log_probs[kept].tolist(), reason, top, calls))
    return answers


def cut_at(made: Completion, tokenizer: AnyTokenizer, after: int, stop: Sequence[str]) -> Completion:
    """A response that goes on after the id `after` as if it had ended at the first stop string in its text."""
    text, pieces = TextStream(tokenizer, after, stop), []
    for count, token in enumerate(made.tokens, 1):
        pieces.append(text.add(token))
        if text.stopped:
            kept = made.tokens[:count], made.log_probs[:count], "stop", made.top_log_probs[:count]
            return Completion("".join(pieces), *kept, calls=made.calls)
    return replace(made, text="".join([*pieces, text.end()]))
