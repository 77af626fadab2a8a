"""What requests may ask for. A field that would change an answer, and that nothing here heeds, is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rlhfjax.serving.limits import MOST_BIASES

_MOST = 128  # responses to one prompt, texts of one request
_LONGEST_STOP = 2048  # characters; what may be the beginning of a stop string is held back

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_STOP)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel):
    """Any request. Notes of a client for itself are taken, and heeded by nobody."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(description="A name of /v1/models.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Drawing(Body):
    """How responses are drawn: OpenAI's names, and three that others have added."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, description="Only so many of the likeliest tokens; 0: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Only tokens so many times as likely as the likeliest.")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=4)
    n: int | None = Field(None, ge=1, le=_MOST)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MOST_BIASES)
    max_tokens: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation, of text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The message as the tokenizers read it."""
        parts = self.content if isinstance(self.content, list) else []
        text = "".join(part.text for part in parts) if parts else self.content or ""
        kept = {"tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return {"role": self.role, "content": text} | {name: value for name, value in kept.items() if value}


class ChatRequest(Drawing):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's chat template.")
    drop_oldest: bool | None = Field(
        None, description="Leave out the oldest exchanges of a long conversation; `dropped` counts their messages."
    )


class CompletionRequest(Drawing):
    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=_MOST)]
    best_of: int | None = Field(None, ge=1, le=_MOST)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: Literal[""] | None = None


class EmbeddingRequest(Body):
    input: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=_MOST)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)


class ModerationRequest(BaseModel):
    """Texts to judge; `model` is taken and not read: the policy is that of the server."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | Annotated[list[str] | list[Part], Field(min_length=1, max_length=_MOST)]
    model: str | None = None


class ScoreRequest(Body):
    """A prompt, or messages, and responses to it; a response that is ids is whole, with its end."""

    prompt: Text | Ids | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    responses: list[str | Ids] = Field(min_length=1, max_length=_MOST)
