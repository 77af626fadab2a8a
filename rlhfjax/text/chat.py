"""Conversations as ids, and history that fits.

With a tokenizer of this project a conversation is BOS, then for each message its role token, its content and EOS; a
prompt ends with the role token of the assistant, whose answer follows. With a published model's tokenizer its own chat
template writes all that. A record may instead be plain text: BOS, if the model has one, and the prompt, then the
response. A response is tokenised by itself and its ids are joined, so a prompt has the same ids whatever follows it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}
Record = Mapping[str, Any]


def beginning(tokenizer: AnyTokenizer) -> list[int]:
    """What comes before every plain text: BOS, or nothing where the model has none."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def encode_prompt(tokenizer: AnyTokenizer, record: Record) -> list[int]:
    """Ids after which a response is generated, from {"prompt": text} or {"messages": […]}.

    Raises DataError on an empty prompt, or messages that end with the assistant (there is nothing to answer).
    """
    if record.get("messages") is None:
        return [*beginning(tokenizer), *tokenizer.encode(_plain_prompt(record))]
    messages = _messages(record)
    if messages[-1]["role"] == "assistant":
        raise DataError("expected messages that end with something to answer, got the assistant's own message last")
    return _conversation_prompt(tokenizer, messages)


def encode_response(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Ids of a whole response: its text, then EOS, which is trained like any other token."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


def encode_demonstration(tokenizer: AnyTokenizer, record: Record) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids of a demonstration, apart: training on the last answer alone.

    From {"prompt", "completion"}, or from {"messages"}: the last assistant message is the response, all before it the
    prompt, and what follows it is left out. Raises DataError on an empty prompt, or without an assistant message.
    """
    if record.get("messages") is None:
        return encode_prompt(tokenizer, record), encode_response(tokenizer, _text(record, "completion"))
    *before, answer = _up_to_last_answer(record)
    return _conversation_prompt(tokenizer, before), encode_response(tokenizer, answer["content"])


def encode_all_turns(tokenizer: AnyTokenizer, record: Record) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration and, beside each, whether it is trained: every answer and its EOS.

    The ids are those of `encode_demonstration`, joined. Since p(T_K, …, T_2 | T_1) = Π p(T_i | T_1, …, T_i−1), the loss
    under this mask is the sum of the losses of the conversations cut after each answer (Zhang et al. 2020, DialoGPT).
    A message that opens the conversation answers nothing and is not trained. Raises DataError where there is no answer,
    or where a chat template writes an earlier answer otherwise than it was generated.
    """
    if record.get("messages") is None:
        prompt, response = encode_demonstration(tokenizer, record)
        return prompt + response, [False] * len(prompt) + [True] * len(response)
    messages = _up_to_last_answer(record)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _answers_in_template(tokenizer, messages)
    tokens, trained = [tokenizer.bos_id], [False]
    for place, message in enumerate(messages):
        turn = _turn(tokenizer, message)
        is_answer = message["role"] == "assistant" and place > 0
        tokens += turn
        trained += [False] + [is_answer] * (len(turn) - 1)  # the role token is given, never predicted
    return tokens, trained


def _answers_in_template(tokenizer: HuggingFaceTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """An answer is what follows the ids of the prompt before it, to the id that ends a response."""
    tokens = [*_conversation(tokenizer, messages[:-1]), *encode_response(tokenizer, messages[-1]["content"])]
    trained = [False] * len(tokens)
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place > 0:
            before = _conversation(tokenizer, messages[:place])
            if tokens[: len(before)] != before or tokenizer.eos_id not in tokens[len(before) :]:
                raise DataError(
                    f"messages[{place}]: expected a chat template that writes an earlier answer as it was generated, "
                    "got one that changes it; train on the last answer alone (loss.train_on: last)"
                )
            end = tokens.index(tokenizer.eos_id, len(before)) + 1
            trained[len(before) : end] = [True] * (end - len(before))
    return tokens, trained


def truncate_history(
    messages: Sequence[Message], tokenizer: AnyTokenizer, budget: int, reserve: int
) -> tuple[list[Message], int]:
    """The messages that fit, and how many were dropped: the prompt of what stays has at most budget − reserve tokens.

    Whole exchanges go, oldest first: a user message with the answers to it. System messages and the last exchange stay,
    and no message is ever cut. Raises ConfigError when those alone do not fit, DataError on malformed messages.
    """
    checked = _messages({"messages": messages})
    exchange, exchanges = 0, []
    for message in checked:
        exchange += message["role"] == "user"
        exchanges.append(exchange)
    for oldest in sorted(set(exchanges)):
        kept = [
            index for index, message in enumerate(checked) if message["role"] == "system" or exchanges[index] >= oldest
        ]
        size = len(_conversation(tokenizer, [checked[index] for index in kept]))
        if size <= budget - reserve:
            return [checked[index] for index in kept], len(checked) - len(kept)
    raise ConfigError(
        f"expected the system messages and the last turn to fit in {budget} − {reserve} tokens, got {size}; "
        "shorten the message, or reserve fewer tokens for the answer"
    )


def _conversation_prompt(tokenizer: AnyTokenizer, messages: Sequence[Message]) -> list[int]:
    if not messages[-1]["content"].strip():
        raise DataError("expected a prompt with text in it, got an empty message before the answer; drop the record")
    return _conversation(tokenizer, messages)


def _conversation(tokenizer: AnyTokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of messages and of what an answer begins with."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_chat(messages, add_generation_prompt=True)
    turns = [token for message in messages for token in _turn(tokenizer, message)]
    return [tokenizer.bos_id, *turns, tokenizer.role_ids["assistant"]]


def _turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    return [tokenizer.role_ids[message["role"]], *tokenizer.encode(message["content"]), tokenizer.eos_id]


def _up_to_last_answer(record: Record) -> list[Message]:
    messages = _messages(record)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(
            f"expected a conversation with an answer in it, got roles {[message['role'] for message in messages]}"
        )
    return messages[: answers[-1] + 1]


def _messages(record: Record) -> list[Message]:
    messages = record["messages"]
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise DataError(f"expected `messages` to be a list of {{role, content}}, got {type(messages).__name__}")
    if not messages:
        raise DataError("expected `messages` with at least one message, got an empty prompt; drop the record")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant"):
            raise DataError(f"messages[{index}]: expected role system, user or assistant, got {role!r}")
        _text(message, "content", f"messages[{index}]: ")
    return list(messages)


def _plain_prompt(record: Record) -> str:
    prompt = _text(record, "prompt")
    if not prompt.strip():
        raise DataError("expected a prompt with text in it, got an empty prompt; drop the record")
    return prompt


def _text(record: Record, field: str, where: str = "") -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where}expected text in `{field}`, got {type(value).__name__}")
    return value
