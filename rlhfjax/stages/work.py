"""Model FLOPs of the programs of a stage where every row is full: what is reckoned before there are any rows."""

from typing import Any

import jax

from rlhfjax.config import schema
from rlhfjax.models import EncoderDecoder
from rlhfjax.models.lora import has_adapters
from rlhfjax.stages.offline import OfflineLearner
from rlhfjax.stages.online_programs import OnlineLearner
from rlhfjax.training.flops import ForwardFlops, forward_flops


def offline_work(c: Any, learner: OfflineLearner) -> float:
    """Of one step; 0 of an encoder–decoder. A prompt counts once for each of its candidates."""
    if learner.flops is None:
        return 0.0
    rows = c.batch.size * (c.batch.candidates if isinstance(c.batch, schema.RankedBatch) else 1)
    tokens = rows * c.batch.length
    return learner.flops({"tokens": tokens, "work/pairs": rows * _pairs(c.batch.length)})


def online_work(c: Any, learner: OnlineLearner) -> dict[str, float]:
    """Of a rollout, of scoring it and of the update on it; nothing of an encoder–decoder."""
    models = [*learner.models.values(), *learner.judges.models.values()]
    if any(isinstance(model, EncoderDecoder) for model in models):
        return {}
    rows, responses = c.batch.size, c.batch.size * c.sampling.max_new_tokens
    length = c.batch.prompt_length + c.sampling.max_new_tokens
    tokens, pairs = rows * length, rows * _pairs(length)
    trained = {name: _forward(model, learner.params[name]) for name, model in learner.models.items()}
    scoring = learner.frozen["rewards"]
    asked = sum(_forward(model, scoring[title])(tokens, pairs) for title, model in learner.judges.models.items())
    policy = trained["policy"](tokens, pairs, responses)
    value = trained["value"](tokens, pairs) if "value" in trained else 0.0
    passes = 1 + (c.sampling.old_log_probs == "recompute")
    mixed = 0.0
    if c.ptx:
        read = c.ptx.ratio * rows
        mixed = trained["policy"](read * c.ptx.length, read * _pairs(c.ptx.length), read * c.ptx.length)
    backward = 2 if has_adapters(learner.params["policy"]) else 3
    update = backward * c.batch.epochs * (policy + value + mixed)
    return {"rollout": policy, "score": passes * policy + value + asked, "update": update}


def _forward(model: Any, params: Any) -> ForwardFlops:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return forward_flops(model.config, shapes)


def _pairs(length: int) -> float:
    return length * (length + 1) / 2
