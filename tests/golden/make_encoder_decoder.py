"""Writes encoder_decoder.npz: the weights and logits of a small torch.nn.Transformer as of 2017.

Run where PyTorch is installed: python tests/golden/make_encoder_decoder.py
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

VOCAB, WIDTH, HEADS, INSIDE, LAYERS, START = 13, 16, 4, 24, 2, 1


class Reference(nn.Module):
    """nn.Transformer with norms after the sums and none at the ends, one embedding, and the paper's positions."""

    def __init__(self):
        super().__init__()
        shape = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": INSIDE, "dropout": 0.1, "batch_first": True}
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**shape), LAYERS, enable_nested_tensor=False)
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), LAYERS)
        self.transformer = nn.Transformer(
            d_model=WIDTH,
            nhead=HEADS,
            dropout=0.1,
            custom_encoder=encoder,
            custom_decoder=decoder,
            batch_first=True,
            norm_first=False,
        )
        self.embed = nn.Embedding(VOCAB, WIDTH)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings x sqrt(d) + positions, one number at a time as the paper writes them."""
        table = torch.zeros(tokens.shape[1], WIDTH)
        for position in range(tokens.shape[1]):
            for i in range(WIDTH // 2):
                angle = position / 10_000 ** (2 * i / WIDTH)
                table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
        return self.embed(tokens) * math.sqrt(WIDTH) + table

    def forward(self, source: torch.Tensor, target: torch.Tensor, source_padding: torch.Tensor) -> torch.Tensor:
        hidden = self.transformer(
            self.embedded(source),
            self.embedded(target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
            src_key_padding_mask=source_padding,
            memory_key_padding_mask=source_padding,
            tgt_is_causal=True,
        )
        return hidden @ self.embed.weight.T


def reference(seed: int) -> dict[str, np.ndarray]:
    """Weights under their PyTorch names, right-padded sources, decoder inputs, logits, and smoothed losses."""
    torch.manual_seed(seed)
    model = Reference().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias is 0 and no scale is 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
        source, target = torch.randint(3, VOCAB, (3, 6)), torch.randint(3, VOCAB, (3, 5))
        target[:, 0] = START
        lengths = torch.tensor([6, 4, 1])
        logits = model(source, target, torch.arange(6)[None] >= lengths[:, None])
        following = torch.randint(3, VOCAB, (3, 5))
        following[1, 3:] = -100  # PyTorch's label for what is no target
        losses = {
            f"loss_{reduction}": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100, reduction=reduction)(
                logits.flatten(0, 1), following.flatten()
            )
            for reduction in ("none", "sum", "mean")
        }
    arrays = {"source": source, "lengths": lengths, "target": target, "following": following, "logits": logits}
    weights = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    return {name: value.numpy() for name, value in (arrays | losses | weights).items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("encoder_decoder.npz"), **reference(seed=0))
