"""A reward of one's own, as docs/rewards.md shows it."""


def polite(examples):
    """1 where the response thanks, 2 where it thanks by the name in the prompt's record, else 0."""
    scores = []
    for example in examples:
        response = example.response.lower()
        thanks = "thank" in response
        scores.append(thanks + (thanks and example.record.get("name", "?").lower() in response))
    return scores
