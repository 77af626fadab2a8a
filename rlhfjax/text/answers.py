"""Answers as a model's chat template writes them: what is trained is what would be generated, or the row is an error.

The prompt is what the template writes of the messages before an answer, with the beginning of an answer (the
generation prompt). The response is what it writes of the whole, less the prompt: a thought that it opens, closes or
adds is in it, and what it trims is not. It ends with the first token that ends a response; white space after that is
no part of it. Where a template writes no such token, EOS follows the answer, or generation would never stop.

Ids are those of transformers' `apply_chat_template` of the whole conversation, up to that end. There is one exception.
Where a token would reach from the prompt into the response (a line break of either), the prompt keeps the ids that
sampling begins with, and the response is tokenised as what goes on after it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhfjax.errors import DataError
from rlhfjax.text.chat_writing import Message
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer

Known = dict[tuple[str, str], list[int]]  # ids of responses, by the prompt that they go on after and their text
_MARK = "\u2047\u2047"  # what no message is, to see whether a template reads one
_THOUGHT = re.compile(r"</?think>")


class Untrained(DataError):
    """A conversation in which every answer has the weight 0."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and what else a chat template is given with them."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def until(self, place: int) -> "Conversation":
        """What stands before the message at a place."""
        return Conversation(self.messages[:place], self.tools, self.chat_template_kwargs)

    def prompt(self, tokenizer: HuggingFaceTokenizer) -> str:
        """What the template writes before an answer to these messages.

        Raises DataError where it leaves out the tools, or a message other than the model's own.
        """
        written = self._write(tokenizer, self.messages, True)
        if self.tools and written == tokenizer.writer.write(self.messages, True, None, self.chat_template_kwargs):
            raise DataError("tools: expected a chat template that writes them, got one that leaves them out")
        shown = tokenizer.seal.shown(written)
        for place, message in enumerate(self.messages):
            if message["role"] != "assistant" and (said := message["content"].strip()) and said not in shown:
                other = [*self.messages[:place], {**message, "content": _MARK}, *self.messages[place + 1 :]]
                if self._write(tokenizer, other, True) == written:
                    raise DataError(
                        f"messages[{place}]: expected a chat template that writes every message, got one that leaves "
                        f"out this one of role {message['role']}; remove it from the record"
                    )
        return written

    def answer(self, tokenizer: HuggingFaceTokenizer, prompt: str, answer: Message) -> tuple[str, bool]:
        """What the template writes of an answer after its prompt, up to the token that ends it, and if there is one.

        Raises DataError where the whole does not begin with the prompt, or what it writes of the answer is less.
        """
        whole = self._write(tokenizer, [*self.messages, answer], False)
        if not whole.startswith(prompt):
            without = self._write(tokenizer, self.messages, False)
            begins = prompt.removeprefix(without) if prompt.startswith(without) else "another prompt"
            raise DataError(
                "expected a chat template that writes the answer as it is generated, after "
                f"{tokenizer.seal.taken_off(begins)[:80]!r}, got one that does not begin it so; give its thought "
                "(reasoning_content), other chat_template_kwargs, or another chat_template.jinja"
            )
        rest = whole[len(prompt) :]
        end = tokenizer.end_names.search(rest)
        written = rest[: end.end()] if end else rest.removesuffix(tokenizer.writer.after_answer)
        if end:
            after = rest[end.end() :]
            usual = tokenizer.end_names.split(tokenizer.writer.after_answer, 1)[-1]
            if after != usual and tokenizer.seal.shown(after).strip():
                raise DataError("expected a chat template that ends an answer once, got one that writes more after it")
        shown = tokenizer.seal.shown(written)
        parts = [*_THOUGHT.split(answer["content"]), answer.get("reasoning_content") or ""]
        if not all(part.strip() in shown for part in parts) and any(
            self._write(tokenizer, [*self.messages, other], False) == whole for other in _others(answer)
        ):
            raise DataError(
                "expected a chat template that writes the whole answer, got one that leaves out its thought or text; "
                "write the answer as the model shall give it"
            )
        return written, end is not None

    def _write(self, tokenizer: HuggingFaceTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return tokenizer.writer.write(messages, add_generation_prompt, self.tools, self.chat_template_kwargs)


def _others(answer: Message) -> list[Message]:
    """The answer with one part of it changed."""
    parts = re.split(f"({_THOUGHT.pattern})", answer["content"])
    places = [i for i in range(0, len(parts), 2) if parts[i].strip()]
    changed = ["".join([*parts[:i], _MARK, *parts[i + 1 :]]) for i in places]
    thought = [{**answer, "reasoning_content": _MARK}] if answer.get("reasoning_content") else []
    return [*({**answer, "content": content} for content in changed), *thought]


def encode_answers(
    tokenizer: HuggingFaceTokenizer, asked: Conversation, answers: Sequence[Message], known: Known
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids, and the ids of each answer with its end; those in `known` are not made again."""
    prompt = asked.prompt(tokenizer)
    written = [asked.answer(tokenizer, prompt, answer) for answer in answers]
    return tokenizer.encode_written(prompt), [_ids(tokenizer, prompt, *each, known) for each in written]


def all_answers(
    tokenizer: HuggingFaceTokenizer, conversation: Conversation, places: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation up to the last of the answers at `places`, and beside each whether it is in one of them.

    Raises DataError where the whole has one of them otherwise than it was generated.
    """
    whole = tokenizer.writer.write(
        conversation.messages[: places[-1] + 1], False, conversation.tools, conversation.chat_template_kwargs
    )
    tokens: list[int] = []
    trained: list[bool] = []
    done = 0
    for place in places:
        before = conversation.until(place)
        prompt = before.prompt(tokenizer)
        answer, ended = before.answer(tokenizer, prompt, conversation.messages[place])
        if not whole.startswith(prompt + answer) or not (ended or place == places[-1]):
            raise DataError(
                f"messages[{place}]: expected a chat template that writes an earlier answer as it was generated, "
                "got one that changes it; train on the last answer alone (loss.train_on: last)"
            )
        between = prompt[done:]
        context = tokenizer.encode_written_after(prompt[:done], between) if done else tokenizer.encode_written(between)
        response = _ids(tokenizer, prompt, answer, ended, {})
        tokens += context + response
        trained += [False] * len(context) + [True] * len(response)
        done = len(prompt) + len(answer)
    return tokens, trained


def _ids(tokenizer: HuggingFaceTokenizer, prompt: str, answer: str, ended: bool, known: Known) -> list[int]:
    key = tokenizer.seal.from_last(prompt), answer
    if key not in known:
        known[key] = tokenizer.encode_written_after(*key) + ([] if ended else [tokenizer.eos_id])
    return known[key]
