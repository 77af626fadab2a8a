"""From the sections of a configuration to a model and the settings of its sampler."""

from dataclasses import replace

from jaxtyping import Array

from rlhfjax.config import schema
from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams, Speculation
from rlhfjax.models import LanguageModel, SequenceModel, compute_dtype, decoder_config, model_of
from rlhfjax.target import current
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params, TokenBatch


def new_model(settings: schema.Model, vocab_size: int, start_id: int = 0) -> SequenceModel:
    """The model that the `model` section describes; `start_id` begins the responses of an encoder–decoder."""
    if settings.family == "transformer_2017":
        described = settings.model_dump(include={"family", "layers", "width", "heads", "context", "remat"})
        sizes = {"mlp_width": settings.mlp_width or 4 * settings.width, "vocab_size": vocab_size}
        return model_of(described | sizes | {"start_id": start_id, "dtype": compute_dtype(settings.dtype)})
    shape = settings.model_dump(exclude={"checkpoint", "architecture", "dtype", "lora"})
    style = settings.architecture.style()
    experts = settings.architecture.experts.model_dump()
    style |= {"experts": experts.pop("count"), "experts_per_token": experts.pop("per_token")} | experts
    config = decoder_config(**shape, **style, vocab_size=vocab_size, dtype=compute_dtype(settings.dtype))
    return LanguageModel(config)


def sampling_params(sampling: schema.Sampling, tokenizer: AnyTokenizer) -> SamplingParams:
    """The sampler's settings; raises ConfigError on a text that is not a single token, or an id that is none."""
    stop = _stops(sampling, tokenizer)
    speculation = None
    if sampling.speculate != "none":
        speculation = Speculation(sampling.speculate, sampling.speculate_tokens, sampling.speculate_ngram)
    return SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        stop_id=stop[0],
        pad_id=tokenizer.pad_id,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        stop_after=sampling.stop_after,
        speculation=speculation,
        min_p=sampling.min_p,
        stop_ids=tuple(stop[1:]),
        slots=current().slots,
    )


def _stops(sampling: schema.Sampling, tokenizer: AnyTokenizer) -> list[int]:
    """The ids that end a response: any that ends one in the tokenizer, or in their place those of `stop`."""
    if sampling.stop is None:
        return list(tokenizer.end_ids)
    named = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop
    return list(dict.fromkeys(_stop(name, tokenizer) for name in named))


def _stop(name: str | int, tokenizer: AnyTokenizer) -> int:
    if isinstance(name, int):
        if name >= tokenizer.vocab_size:
            raise ConfigError(f"sampling.stop: expected an id below {tokenizer.vocab_size:,}, got {name}")
        return name
    ids = tokenizer.encode_continuation(name)
    if len(ids) != 1:
        raise ConfigError(
            f"sampling.stop: expected text of one token, got {name!r}, which is {len(ids)}; give a shorter text, or "
            "leave it out to stop at EOS"
        )
    return ids[0]


def plain_sampling(new_tokens: int, tokenizer: AnyTokenizer) -> SamplingParams:
    """The policy as it is, at temperature 1, up to any id that ends a response."""
    stop, *others = tokenizer.end_ids
    return SamplingParams(new_tokens, stop, tokenizer.pad_id, stop_ids=tuple(others), slots=current().slots)


def sampler_of(model: SequenceModel, sampling: schema.Sampling, routed: bool = False) -> SequenceModel:
    """The model at the precision of sampling; `routed` keeps which experts its tokens were sent to.

    Raises ConfigError when it lacks heads for as many draft tokens, or experts.
    """
    if routed and not (isinstance(model, LanguageModel) and model.config.experts):
        raise ConfigError(
            "batch.routing: measured and replayed are for mixtures of experts, got another model; remove it"
        )
    if isinstance(model, LanguageModel):
        if sampling.speculate == "heads" and model.config.mtp_heads < sampling.speculate_tokens:
            raise ConfigError(
                f"sampling.speculate_tokens {sampling.speculate_tokens}: expected as many heads, got a model with "
                f"{model.config.mtp_heads}; take fewer draft tokens, or those of ngram"
            )
        return replace(model, precision=sampling.precision, routed=routed)
    if (sampling.precision, sampling.speculate) != ("full", "none"):
        raise ConfigError("sampling: precision and speculate are for decoders, got an encoder–decoder; remove them")
    return model


def rerouted(model: SequenceModel, params: Params, rows: TokenBatch) -> Array | None:
    """`LanguageModel.rerouted`, where it is known how these rows were routed."""
    return model.rerouted(params, rows) if rows.routes is not None and isinstance(model, LanguageModel) else None
