"""A bare PyTorch loop: no trainer, fused AdamW, one clip; with `--compile` as the last argument through torch.compile.

python torch_loop.py WORKLOAD_AS_JSON [--compile]
"""

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llama import Block, Llama, random_tokens
from torch import Tensor, nn
from worker import Worker

DEEP = 8  # layers from which on blocks are compiled, all as one, and not the whole step, which takes minutes
Loss = Callable[[int], Tensor]


def sft(work: dict[str, Any], compiled: Callable) -> tuple[nn.Module, Loss]:
    model = Llama(work["shape"])

    @compiled
    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return model, lambda step: loss(random_tokens(work, step, work["rows"], work["length"]))


class Scorer(nn.Module):
    def __init__(self, shape: dict[str, int]):
        super().__init__()
        self.decoder, self.head = Llama(shape), nn.Linear(shape["width"], 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.decoder.hidden(tokens)[:, -1])[:, 0]


def reward(work: dict[str, Any], compiled: Callable) -> tuple[nn.Module, Loss]:
    model = Scorer(work["shape"])

    @compiled
    def loss(tokens: Tensor) -> Tensor:
        chosen, rejected = model(tokens).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return model, lambda step: loss(random_tokens(work, step, work["rows"], work["length"]))


def dpo(work: dict[str, Any], compiled: Callable) -> tuple[nn.Module, Loss]:
    model = Llama(work["shape"])
    reference = copy.deepcopy(model).requires_grad_(False)
    prompt = work["prompt"]

    def completion_log_probs(policy: Llama, tokens: Tensor) -> Tensor:
        hidden = policy.hidden(tokens)[:, prompt - 1 : -1]
        logits = F.linear(hidden, policy.embed.weight)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, prompt:].flatten(), reduction="none")
        return -losses.view(len(tokens), -1).sum(dim=1)

    @compiled
    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            before = completion_log_probs(reference, tokens)
        chosen, rejected = (completion_log_probs(model, tokens) - before).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return model, lambda step: loss(random_tokens(work, step, work["rows"], work["length"]))


def main() -> None:
    worker = Worker()
    work, wanted = worker.work, sys.argv[-1] == "--compile"
    deep = work["shape"]["layers"] > DEEP
    compiled = torch.compile if wanted and not deep else lambda function: function
    torch.manual_seed(work["seed"])
    model, loss = {"sft": sft, "reward": reward, "dpo": dpo}[work["task"]](work, compiled)
    if wanted and deep:
        for block in (module for module in model.modules() if isinstance(module, Block)):
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], weight_decay=work["weight_decay"], fused=True)
    for step in itertools.count():
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), work["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        worker.lap(tokens=work["rows"] * work["length"])


if __name__ == "__main__":
    main()
