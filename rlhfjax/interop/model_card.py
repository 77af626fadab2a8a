"""The README of an exported model: what it is, where it comes from, how to load it. Numbers and names, never texts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_LOAD = {
    "policy": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
""",
    "scalar": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, padding_side="right")
model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)
scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]{bias}
""",
}


def model_card(
    name: str,
    what: str,
    config: Mapping[str, Any],
    parity: Mapping[str, Any],
    lineage: Mapping[str, Any],
    of_tokenizer: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that model hubs read; `what` is policy, average, value or reward.

    `config` is the exported config.json. `lineage` gives tables of facts by heading. `of_tokenizer` says what of the
    tokenizer transformers has otherwise, one sentence each.
    """
    scalar = "ForSequenceClassification" in config["architectures"][0]
    bias = config.get("rlhfjax_score_bias", 0.0)
    load = _LOAD["scalar" if scalar else "policy"].replace("{bias}", " + model.config.rlhfjax_score_bias" * bool(bias))
    if config["model_type"] in _REBUILT:
        load = load.replace("AutoTokenizer", "PreTrainedTokenizerFast")
        of_tokenizer = [*of_tokenizer, *[_REBUILT[config["model_type"]]] * bool(of_tokenizer)]
    task = "text-classification" if scalar else "text-generation"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [rlhfjax, rlhf]\n---",
        f"# {name}",
        f"{_WHAT[what]} ({config['architectures'][0]}), trained with rlhfjax and exported in {parity['dtype']}.",
        f"```python\n{load}```",
    ]
    if scalar:
        parts.append(_score_note(bias))
    parts += [f"## {heading}\n\n{_table(facts)}" for heading, facts in lineage.items() if facts]
    if of_tokenizer:
        parts.append("## Tokenizer\n\n" + "\n".join(f"- {sentence}" for sentence in of_tokenizer))
    difference = next(value for key, value in parity.items() if key.startswith("max_abs") and "difference" in key)
    parts.append(
        "## Parity\n\n"
        f"Read back, it differs from the checkpoint by at most {difference:.2g} (tolerance {parity['tolerance']:.2g}). "
        "`parity.json` has the inputs, the versions and the SHA-256 of each file."
    )
    parts.append("## Licence\n\nNot stated. Whoever publishes this model says under which licence, and of which data.")
    return "\n\n".join(parts) + "\n"


# transformers 5 reads neither tokenizer.json nor its class for these, but the vocabulary alone into a class of its own.
_REBUILT = {
    "qwen2": "AutoTokenizer of transformers 5 cuts words as Qwen 2's tokenizer does, whatever tokenizer.json says; "
    "`PreTrainedTokenizerFast` reads the file as it is."
}
_WHAT = {
    "policy": "A language model",
    "average": "A model of averaged parameters (exponential moving average over the updates)",
    "value": "A value model: the expected score of a text that is not finished",
    "reward": "A reward model: the score of a text, prompt and response with its end-of-text token",
}


def _score_note(bias: float) -> str:
    read = "The score is read at the last token that is not padding, so a text has to end with its end-of-text token."
    if not bias:
        return read
    return (
        f"{read} The model's own score has a constant that the head of this architecture has no place for: add "
        f"`rlhfjax_score_bias` of config.json ({bias:.6g}), as above. Differences of scores need it not."
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items()]
    return "\n".join(["|  |  |", "| --- | --- |", *rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\n", " ").replace("|", "\\|")
