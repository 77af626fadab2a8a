"""Any service that speaks OpenAI's `/v1/moderations`, as a back end."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.moderation.verdicts import BackendError, Judgement, Look
from rlhfjax.moderation.windows import look_by_window

_MOST_BYTES = 4 << 20  # of an answer; a judgement of a text takes less than a thousand
_CHUNK = 1 << 16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the texts, and the key, to somebody else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Remote:
    """Judgements by a URL, which is asked once for all texts and answers within `timeout` seconds.

    An answer under way is judged by windows of `window` characters, again after `every` new ones. No error repeats what
    the service said: that may quote the text.
    """

    def __init__(self, url: str, model: str | None, key: str | None, timeout: float, window: int, every: int):
        self.name = url.rstrip("/").removesuffix("/moderations") + "/moderations"
        self.every, self._window = every, window
        self._model, self._key, self._timeout = model, key, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def judge(self, texts: Sequence[str]) -> list[Judgement]:
        """A judgement of each text. Raises BackendError where there is none for each of them in time."""
        if not texts:
            return []
        asked = {"input": list(texts)} | ({"model": self._model} if self._model else {})
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.name, json.dumps(asked).encode(), headers, method="POST")
        results = self._results(self._answer(request))
        if len(results) != len(texts):
            raise BackendError(f"expected {len(texts)} results, got {len(results)}")
        return [Judgement(_scores(result)) for result in results]

    def look(self, text: str, ended: bool) -> Look:
        """A look by windows. Raises BackendError."""
        return look_by_window(self.judge([text])[0], text, self._window, ended)

    def _answer(self, request: urllib.request.Request) -> bytes:
        until, got = time.monotonic() + self._timeout, b""
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                while chunk := response.read1(_CHUNK):
                    got += chunk
                    if len(got) > _MOST_BYTES:
                        raise BackendError(f"expected an answer of at most {_MOST_BYTES:,} bytes, got more")
                    if time.monotonic() > until:  # one that sends a byte now and then
                        raise TimeoutError
        except urllib.error.HTTPError as error:
            error.close()
            raise BackendError(f"expected status 200, got {error.code}") from None
        except TimeoutError:
            raise BackendError(f"no answer within {self._timeout:g} s") from None
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            said = f"no answer within {self._timeout:g} s" if late else f"cannot be reached: {error.reason}"
            raise BackendError(said) from None
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"cannot be read: {type(error).__name__}") from None
        return got

    def _results(self, answer: bytes) -> list[Any]:
        try:
            given = json.loads(answer)
        except (ValueError, RecursionError):
            raise BackendError("expected JSON, got something else") from None
        results = given.get("results") if isinstance(given, Mapping) else None
        if not isinstance(results, list):
            raise BackendError("expected an object with a list `results`, got another one")
        return results


def _scores(result: Any) -> dict[str, float]:
    """Scores of a result by category; 1 and 0 of a service that says no more than whether a category is flagged."""
    given = result.get("category_scores") or result.get("categories") if isinstance(result, Mapping) else None
    if not isinstance(given, Mapping):
        raise BackendError("expected results with category_scores, got others")
    scores = {}
    for name, value in given.items():
        if value is None:  # OpenAI's own client has categories that older models do not know
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
            raise BackendError(f"expected a score from 0 to 1 of {str(name)[:40]}, got another value")
        scores[str(name)] = float(value)
    return scores
