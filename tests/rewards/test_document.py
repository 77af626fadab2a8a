"""The rewards of docs/rewards.md, run as they are shown there."""

import re
from pathlib import Path

from rlhfjax.config.reading import read_yaml
from rlhfjax.config.rewards import on_host
from rlhfjax.rewards import Example, Rewards
from tests.rewards.conftest import terms_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]


def test_the_example_scores_as_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs" / "my_rewards.py").read_text().endswith(block("python"))
    terms = on_host(terms_of(*read_yaml(block("yaml"))[0]["rewards"]))
    record = {"name": "Ada", "answer": "6 x 7 = 42\n#### 42"}
    texts = ["Thank you, Ada. #### 42.0", "Thanks. 42", "No. #### 41", ""]
    examples = [
        Example("", text, response_ids=(1,) * n, record=record) for text, n in zip(texts, (8, 56, 64, 99), strict=True)
    ]
    with Rewards.open(terms) as rewards:
        scores = rewards.submit(1, examples).result()
    assert {name: values.tolist() for name, values in scores.values.items()} == {
        "polite": [2.0, 1.0, 0.0, 0.0],
        "graded": [0.25] * 4,
        "numeric_match": [1.0, 0.0, 0.0, 0.0],
        "length": [0.0, -0.5, -1.0, -1.0],
    }
    assert scores.total.tolist() == [3.25, 1.25, 0.25, 0.25]
