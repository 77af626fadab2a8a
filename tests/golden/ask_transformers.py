"""What plain transformers makes of an exported directory, as JSON. Run with torch and transformers, without rlhfjax.

python tests/golden/ask_transformers.py policy DIRECTORY PROMPT …
python tests/golden/ask_transformers.py reward DIRECTORY TEXT …
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def policy(directory: str, prompts: list[str]) -> dict:
    """Ids and logits of each prompt, and eight greedy tokens up to the end of text."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    made: dict = {"ids": [], "logits": [], "greedy": []}
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt")
        drawn = model.generate(input_ids=batch["input_ids"], max_new_tokens=8, do_sample=False)
        made["ids"].append(batch["input_ids"][0].tolist())
        made["logits"].append(model(batch["input_ids"]).logits[0].tolist())
        made["greedy"].append(drawn[0, batch["input_ids"].shape[1] :].tolist())
    return made


def reward(directory: str, texts: list[str]) -> dict:
    """The score of each text in one batch, padded on the right, and the bias that config.json may have."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert scores.shape == (len(texts), 1)
    return {"scores": scores[:, 0].tolist(), "bias": getattr(model.config, "rlhfjax_score_bias", 0.0)}


if __name__ == "__main__":
    what, directory, *texts = sys.argv[1:]
    with torch.no_grad():
        print(json.dumps({"policy": policy, "reward": reward}[what](directory, texts)))
