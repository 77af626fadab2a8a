"""The language model inside a model that reads pictures as well: its settings, and its tensors by their own names."""

from collections.abc import Mapping
from typing import Any

from rlhfjax.interop.safetensors_files import Tensor

# Models that put pictures in the place of tokens, so that what they do with text is what their language model does.
_AROUND = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration")
_CLASSES = {"gemma3_text": "Gemma3ForCausalLM"} | {
    kind: f"{kind.title()}ForCausalLM" for kind in ("llama", "mistral", "qwen2", "qwen3")
}
# What the published files of Gemma 3 leave to its class.
_UNSAID = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    }
}
# Names of transformers 4 and 5.
_NAMES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}


def text_config(described: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of the language model alone; None for a model of text, and for one that is not known."""
    names, text = described.get("architectures"), described.get("text_config")
    if not (isinstance(names, list) and names and names[0] in _AROUND and isinstance(text, dict)):
        return None
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        return None
    return _UNSAID.get(kind, {}) | text | {"architectures": [_CLASSES[kind]]}


def text_tensors(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the language model, and the parts of the model that the others are of."""
    kept, others = {}, set()
    for name, tensor in found.items():
        before = next((before for before in _NAMES if name.startswith(before)), None)
        if before is None:
            others.add(name.removeprefix("model.").partition(".")[0])
        else:
            kept[_NAMES[before] + name.removeprefix(before)] = tensor
    return kept, sorted(others)
