"""Answers with scores or choices: UltraFeedback, summarize-from-feedback, PKU-SafeRLHF."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object


def ranks_of(scores: Sequence[float]) -> list[int]:
    """The rank of each score, 1 the highest, equal scores one rank."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value  # NaN stands for no score in tables


def _scored(fields: Fields) -> list[Object]:
    """Every completion with an overall score (Cui et al. 2023, UltraFeedback); none where fewer than two have one."""
    asked = {"role": "user", "content": fields.text("instruction")}
    completions = fields.take("completions", list, "a list of completions")
    for index, completion in enumerate(completions):
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            got = f"the fields {', '.join(completion)}" if isinstance(completion, dict) else type_name(completion)
            raise fields.error(f"completions[{index}]", "an object with response and overall_score", got)
    scored = [completion for completion in completions if _is_number(completion.get("overall_score"))]
    if len(scored) < 2:
        return []
    ranks = ranks_of([completion["overall_score"] for completion in scored])
    return [{"messages": [asked], "responses": [each["response"] for each in scored], "ranks": ranks}]


def _summaries(fields: Fields) -> list[Object]:
    """The post in the form of Stiennon et al. 2020, and the two summaries; whoever chose is the labeler."""
    info = fields.take("info", dict, "an object with post and title")
    post = Fields(fields.kind, info, f"{fields.where}: info")
    subreddit = [f"SUBREDDIT: r/{post.pop('subreddit')}"] if "subreddit" in post else []
    prompt = "\n\n".join([*subreddit, f"TITLE: {post.text('title')}", f"POST: {post.text('post')}", "TL;DR:"])
    pair = fields.take("summaries", list, "two summaries")
    if len(pair) != 2 or not all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in pair):
        raise fields.error("summaries", "two objects with text", f"{len(pair)} of another form")
    chosen = _choice(fields, "choice", 2)
    ids = {
        ours: value for ours, value in (("labeler_id", fields.pop("worker")), ("prompt_id", post.pop("id"))) if value
    }
    texts = [each["text"] for each in pair]
    return [{"prompt": prompt, "responses": texts, "ranks": [1 if chosen == place else 2 for place in range(2)], **ids}]


def _choice(fields: Fields, name: str, count: int) -> int:
    choice = fields.take(name, int, "a whole number")
    if not 0 <= choice < count:
        raise fields.error(name, f"a number from 0 to {count - 1}", "one out of range")
    return choice


def _safe(by: str, fields: Fields) -> list[Object]:
    """Two responses and which is the better, or the safer, one (Ji et al. 2023)."""
    asked = {"role": "user", "content": fields.text("prompt")}
    responses = [fields.take(f"response_{place}", str, "a string") for place in range(2)]
    best = _choice(fields, by, 2)
    return [{"messages": [asked], "responses": responses, "ranks": [1 if best == place else 2 for place in range(2)]}]


def _safety(name: str, by: str, fits: bool) -> Layout:
    needs = {"prompt", "response_0", "response_1", by}
    return layout(
        name,
        f"prompt, response_0, response_1, {by}",
        lambda obj: fits and needs <= set(obj),
        "comparison",
        partial(_safe, by),
        f"prompt → the user's message, response_0 and response_1 → the two responses, {by} → the better one",
    )


LAYOUTS = (
    layout(
        "ultrafeedback",
        "instruction, completions",
        lambda obj: isinstance(obj.get("instruction"), str) and isinstance(obj.get("completions"), list),
        "comparison",
        _scored,
        "instruction → the user's message, completions → responses ranked by overall_score, equal scores as ties",
        "rows with fewer than two scored completions",
    ),
    layout(
        "summarize_from_feedback",
        "info, summaries, choice, worker",
        lambda obj: {"info", "summaries", "choice"} <= set(obj),
        "comparison",
        _summaries,
        "info.title + info.post → prompt, summaries → the two responses, choice → the better one, worker → labeler_id",
    ),
    _safety("safe_rlhf", "better_response_id", True),
    _safety("safe_rlhf_safer", "safer_response_id", False),
)
