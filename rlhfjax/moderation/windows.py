"""How a back end that sees a text only as a whole looks at an answer under way."""

from rlhfjax.moderation.verdicts import Judgement, Look


def look_by_window(judgement: Judgement, text: str, window: int, ended: bool) -> Look:
    """A look whose settled characters are followed by a whole window of what was judged.

    Each stretch of the answer of at most `window` characters is then judged in one piece before its first is settled.
    """
    return Look(judgement, len(text) if ended else max(0, len(text) - window))
