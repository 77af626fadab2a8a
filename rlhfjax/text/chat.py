"""Conversations as ids, and history that fits.

With a tokenizer of this project a conversation is BOS, then for each message its role token, its content and EOS; a
prompt ends with the role token of the assistant, whose answer follows. With a published model's tokenizer its own chat
template writes all that (`rlhfjax.text.answers`). A record may instead be plain text: BOS, if the model has one, and
the prompt, then the response. A response is tokenised as what goes on after the prompt, so a prompt has the same ids
whatever follows it, and the text is exactly prompt + response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.answers import Conversation, Known, Untrained, all_answers, encode_answers
from rlhfjax.text.chat_writing import Message
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.text.tokenizer import Tokenizer

__all__ = [
    "Known",
    "Message",
    "Untrained",
    "as_record",
    "beginning",
    "encode_all_turns",
    "encode_demonstration",
    "encode_prompt",
    "encode_response",
    "encode_responses",
    "encode_texts",
    "truncate_history",
]

Record = Mapping[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_OWN_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_OF_A_TEMPLATE = ("tool_calls", "tool_call_id", "reasoning_content")


def beginning(tokenizer: AnyTokenizer) -> list[int]:
    """What comes before every plain text: BOS, or nothing where the model has none."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def as_record(prompt: Any) -> Record:
    """A text, messages, or a record with either, as a record that `encode_prompt` takes."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"messages": prompt}
    if "role" in prompt:
        raise DataError("expected a text, ids, a list of messages or a record, got one message; put it into a list")
    return prompt


def encode_prompt(tokenizer: AnyTokenizer, record: Record) -> list[int]:
    """Ids after which a response is generated, from {"prompt": text} or {"messages": […]}.

    Messages may stand beside `tools` and `chat_template_kwargs`, which a chat template reads. Raises DataError on an
    empty prompt, messages that end with the assistant (there is nothing to answer), or what cannot be written.
    """
    if record.get("messages") is None:
        return [*beginning(tokenizer), *tokenizer.encode(_plain_prompt(record))]
    return _prompt_ids(tokenizer, _require_text(_asked(record)))


def encode_response(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Ids of a whole response to a plain prompt: its text, then EOS, which is trained like any other token."""
    return [*tokenizer.encode_continuation(text), tokenizer.eos_id]


def encode_responses(
    tokenizer: AnyTokenizer, record: Record, texts: Sequence[str], known: Known | None = None
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids of a record and the ids of several responses to it, each whole, with its end.

    What was tokenised already is taken from `known` and added to it. Raises DataError as `encode_prompt`, and where a
    chat template writes a response otherwise than it would be generated.
    """
    known = {} if known is None else known
    if record.get("messages") is not None and isinstance(tokenizer, HuggingFaceTokenizer):
        answers = [{"role": "assistant", "content": text} for text in texts]
        return encode_answers(tokenizer, _require_text(_asked(record)), answers, known)
    for text in texts:
        if ("", text) not in known:
            known["", text] = encode_response(tokenizer, text)
    return encode_prompt(tokenizer, record), [known["", text] for text in texts]


def encode_texts(tokenizer: AnyTokenizer, records: Sequence[Record]) -> Known:
    """Ids of all responses of these records that no chat template writes, for `encode_responses`."""
    templated = isinstance(tokenizer, HuggingFaceTokenizer)
    plain = (record for record in records if not templated or record.get("messages") is None)
    texts = list(dict.fromkeys(text for record in plain for text in record["responses"]))
    ids = tokenizer.encode_continuation_batch(texts)
    return {("", text): [*each, tokenizer.eos_id] for text, each in zip(texts, ids, strict=True)}


def encode_demonstration(tokenizer: AnyTokenizer, record: Record) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids of a demonstration, apart: training on the last answer alone.

    From {"prompt", "completion"}, or from {"messages"}: the last assistant message (of those that a `weight` of 0 does
    not mask) is the response, all before it the prompt, and what follows it is left out. Raises DataError on an empty
    prompt, without an assistant message, or as `encode_responses`; Untrained where all answers are masked.
    """
    if record.get("messages") is None:
        prompt, [response] = encode_responses(tokenizer, record, [_text(record, "completion")])
        return prompt, response
    conversation, places = _answered(record)
    before, answer = conversation.until(places[-1]), conversation.messages[places[-1]]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        prompt, [response] = encode_answers(tokenizer, _require_text(before), [answer], {})
        return prompt, response
    _require_own_form(conversation.until(places[-1] + 1))
    return _prompt_ids(tokenizer, _require_text(before)), _turn(tokenizer, answer)[1:]


def encode_all_turns(tokenizer: AnyTokenizer, record: Record) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration and, beside each, whether it is trained: every answer and its EOS.

    The ids are those of `encode_demonstration`, joined. Since p(T_K, …, T_2 | T_1) = Π p(T_i | T_1, …, T_i−1), the loss
    under this mask is the sum of the losses of the conversations cut after each answer (Zhang et al. 2020, DialoGPT).
    A message that opens the conversation answers nothing and is not trained, nor is one with a `weight` of 0. Raises
    DataError where there is no answer, or where a chat template writes an earlier answer otherwise than it was
    generated; Untrained where all answers are masked.
    """
    if record.get("messages") is None:
        prompt, response = encode_demonstration(tokenizer, record)
        return prompt + response, [False] * len(prompt) + [True] * len(response)
    conversation, places = _answered(record)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return all_answers(tokenizer, conversation, places)
    tokens, trained = [tokenizer.bos_id], [False]
    _require_own_form(conversation)
    for place, message in enumerate(conversation.messages[: places[-1] + 1]):
        turn = _turn(tokenizer, message)
        tokens += turn
        trained += [False] + [place in places] * (len(turn) - 1)  # the role token is given, never predicted
    return tokens, trained


def truncate_history(
    messages: Sequence[Message], tokenizer: AnyTokenizer, budget: int, reserve: int
) -> tuple[list[Message], int]:
    """The messages that fit, and how many were dropped: the prompt of what stays has at most budget − reserve tokens.

    Whole exchanges go, oldest first: a user message with the answers to it. System messages and the last exchange stay,
    and no message is ever cut. Raises ConfigError when those alone do not fit, DataError on malformed messages.
    """
    checked = _conversation({"messages": messages}).messages
    exchange, exchanges = 0, []
    for message in checked:
        exchange += message["role"] == "user"
        exchanges.append(exchange)
    for oldest in sorted(set(exchanges)):
        kept = [
            index
            for index, message in enumerate(checked)
            if message["role"] in ("system", "developer") or exchanges[index] >= oldest
        ]
        size = len(_prompt_ids(tokenizer, Conversation([checked[index] for index in kept])))
        if size <= budget - reserve:
            return [checked[index] for index in kept], len(checked) - len(kept)
    raise ConfigError(
        f"expected the system messages and the last turn to fit in {budget} − {reserve} tokens, got {size}; "
        "shorten the message, or reserve fewer tokens for the answer"
    )


def _asked(record: Record) -> Conversation:
    asked = _conversation(record)
    if asked.messages[-1]["role"] == "assistant":
        raise DataError("expected messages that end with something to answer, got the assistant's own message last")
    return asked


def _require_text(asked: Conversation) -> Conversation:
    last = asked.messages[-1]
    if last["role"] != "tool" and not last["content"].strip() and not last.get("tool_calls"):
        raise DataError("expected a prompt with text in it, got an empty message before the answer; drop the record")
    return asked


def _prompt_ids(tokenizer: AnyTokenizer, asked: Conversation) -> list[int]:
    """Ids of messages and of what an answer begins with."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode_written(asked.prompt(tokenizer))
    _require_own_form(asked)
    turns = [token for message in asked.messages for token in _turn(tokenizer, message)]
    return [tokenizer.bos_id, *turns, tokenizer.role_ids["assistant"]]


def _turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    role = tokenizer.role_ids[_OWN_ROLES[message["role"]]]
    return [role, *tokenizer.encode(message["content"]), tokenizer.eos_id]


def _require_own_form(conversation: Conversation) -> None:
    """Refuses what has no token here, rather than to leave it out."""
    given = [name for name in ("tools", "chat_template_kwargs") if getattr(conversation, name)]
    for place, message in enumerate(conversation.messages):
        if message["role"] not in _OWN_ROLES:
            given.append(f"messages[{place}] of role {message['role']}")
        given += [f"messages[{place}].{name}" for name in _OF_A_TEMPLATE if message.get(name)]
    if given:
        raise DataError(
            f"expected messages of system, user and assistant with text alone, got {', '.join(given[:3])}; this "
            "project's own tokenizer has no tokens for that, a published model's chat template may"
        )


def _answered(record: Record) -> tuple[Conversation, list[int]]:
    """A conversation and the places of the answers that are trained."""
    conversation = _conversation(record)
    answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        roles = [message["role"] for message in conversation.messages]
        raise DataError(f"expected a conversation with an answer in it, got roles {roles}")
    trained = [i for i in answers if conversation.messages[i].get("weight") != 0]
    if not trained:
        raise Untrained("expected an answer to train on, got weight 0 for all of them; drop the record")
    return conversation, trained


def _conversation(record: Record) -> Conversation:
    messages = record["messages"]
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise DataError(f"expected `messages` to be a list of {{role, content}}, got {type(messages).__name__}")
    if not messages:
        raise DataError("expected `messages` with at least one message, got an empty prompt; drop the record")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise DataError(f"messages[{index}]: expected role {', '.join(_ROLES)}, got {role!r}")
        _text(message, "content", f"messages[{index}]: ")
    return Conversation(list(messages), record.get("tools") or None, record.get("chat_template_kwargs") or {})


def _plain_prompt(record: Record) -> str:
    prompt = _text(record, "prompt")
    if not prompt.strip():
        raise DataError("expected a prompt with text in it, got an empty prompt; drop the record")
    if record.get("tools") or record.get("chat_template_kwargs"):
        raise DataError("expected `messages` beside tools and chat_template_kwargs, got a plain `prompt`; remove them")
    return prompt


def _text(record: Record, field: str, where: str = "") -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where}expected text in `{field}`, got {type(value).__name__}")
    return value
