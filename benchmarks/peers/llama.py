"""A Llama in plain PyTorch: what a careful user would write by hand, with the fused functions that torch has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a gated feed-forward block; projections that read the same input are one product."""

    def __init__(self, shape: dict[str, int]):
        super().__init__()
        d, self.heads, self.kv_heads = shape["width"], shape["heads"], shape["kv_heads"]
        self.size = d // self.heads
        self.attention_norm, self.mlp_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.qkv = nn.Linear(d, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * shape["mlp_width"], bias=False)
        self.down = nn.Linear(shape["mlp_width"], d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(F.rms_norm(x, (width,), self.attention_norm, 1e-5))
        qkv = qkv.view(rows, tokens, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        grouped = self.heads != self.kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, tokens, width))
        gate, up = self.gate_up(F.rms_norm(x, (width,), self.mlp_norm, 1e-5)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Llama(nn.Module):
    """Token ids to final hidden states; logits through the embedding, which is tied."""

    def __init__(self, shape: dict[str, int]):
        super().__init__()
        self.embed = nn.Embedding(shape["vocab_size"], shape["width"])
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["layers"]))
        self.norm = nn.Parameter(torch.ones(shape["width"]))
        for name, weight in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(weight, std=0.02)
        half = shape["width"] // shape["heads"] // 2
        angle = torch.outer(torch.arange(shape["context"]), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def hidden(self, tokens: Tensor) -> Tensor:
        x, length = self.embed(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.rms_norm(x, (x.shape[-1],), self.norm, 1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.embed.weight)


def random_tokens(work: dict[str, Any], step: int, *shape: int) -> Tensor:
    """Token ids of which none is special; others in every step."""
    draw = torch.Generator().manual_seed(work["seed"] * 1_000_003 + step)
    return torch.randint(3, work["shape"]["vocab_size"], shape, generator=draw)
