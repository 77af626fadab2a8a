"""Models and a tokenizer of transformers for the workload's shape: random weights, words t0, t1, … as tokens."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2


def config_of(work: dict[str, Any], **extra: Any) -> LlamaConfig:
    shape = work["shape"]
    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        attn_implementation="sdpa",
        **extra,
    )


def policy_of(work: dict[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(config_of(work))


def scorer_of(work: dict[str, Any]) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(config_of(work, num_labels=1))


def tokenizer_of(work: dict[str, Any]) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"t{i}": i for i in range(3, work["shape"]["vocab_size"])}
    made = Tokenizer(WordLevel(words, unk_token="t3"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def rows_of(work: dict[str, Any], count: int, length: int) -> list[list[int]]:
    """`count` random rows of token ids, none of them special."""
    draw = torch.Generator().manual_seed(work["seed"])
    return torch.randint(3, work["shape"]["vocab_size"], (count, length), generator=draw).tolist()


def text_of(row: list[int]) -> str:
    return " ".join(f"t{token}" for token in row)
