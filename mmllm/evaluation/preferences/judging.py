"""Labels pairs of candidates by a judge: a model behind an OpenAI URL, asked in both orders.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv:2306.05685), section 3: a judge
prefers what it reads first, so each pair is asked in both orders, and answers that disagree are a tie; verdicts are
written [[A]], [[B]] or [[C]].
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmllm.evaluation.preferences.candidates import Candidate, CandidateRow
from mmllm.evaluation.preferences.labels import Choice, Comparison, Question, append_labels, read_labels

_VERDICT = re.compile(r"\[\[(A|B|C)\]\]")
_INSTRUCTION = (
    "You compare two answers to the same request. Judge which is better: right about what is given first of all, then "
    "helpful and to the point. Neither the order nor the length of the answers counts. Explain in one sentence, then "
    "end with your verdict: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."
)
_OF_TASK = {
    "caption": "Say what is in the picture.",
    "transcribe": "Write down what is said in the recording.",
    "speak": "Say this text aloud, clearly and completely.",
}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeConfig:
    """A judge behind an OpenAI URL.

    Attributes:
        url: up to `/v1`, such as `http://127.0.0.1:8000/v1`.
        model: its name there.
        key_env: the environment variable that holds its key; None: it needs none.
        criterion: what counts, in place of our own words; None: those.
        timeout_seconds: for each answer.
        num_tries: of each question, before it is an error.
    """

    url: str
    model: str
    key_env: str | None = None
    criterion: str | None = None
    timeout_seconds: float = 120.0
    num_tries: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the judge's url is {self.url!r}; give one such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("the judge's url holds a user, a password or a query; name the key's variable: --key_env")
        if self.key_env is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(f"the key would be sent to {parts.hostname} in the clear; give an https url")
        if self.num_tries < 1 or not self.timeout_seconds > 0:
            raise ValueError("num_tries and timeout_seconds must be positive")

    def key(self) -> str | None:
        """From the environment.

        Raises:
            ValueError: the variable isn't set.
        """
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env)):
            raise ValueError(f"the environment variable {self.key_env} isn't set; put the judge's key there")
        return key


@dataclass
class Verdicts:
    """What came of the questions."""

    counts: Counter[str] = field(default_factory=Counter)
    """first, second, tie, disagreement (a tie too), unreadable (skipped)."""

    def lines(self) -> list[str]:
        """To print."""
        total = sum(self.counts.values())
        told = ", ".join(f"{name} {self.counts[name]}" for name in ("first", "second", "tie"))
        more = f"the two orders disagree {self.counts['disagreement']}, no verdict {self.counts['unreadable']}"
        return [f"{total} pairs judged: {told}; {more}"]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: a redirect is an error like others."""


class Judge:
    """Asks a judge.

    Args:
        config: where and how.
        sleep: waits between tries.
    """

    def __init__(self, config: JudgeConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        self._config, self._sleep = config, sleep
        self._key = config.key()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._url = config.url.rstrip("/") + "/chat/completions"

    def ask(self, content: list[dict[str, Any]]) -> str:
        """What the judge answers.

        Raises:
            ValueError: it refuses the request, or answers nothing that is one of OpenAI's.
            ConnectionError: it can't be reached, or is too busy, however often it is asked.
        """
        body = {
            "model": self._config.model,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": self._config.criterion or _INSTRUCTION},
                {"role": "user", "content": content},
            ],
        }
        reason = ""
        for tried in range(self._config.num_tries):
            if tried:
                _logger.warning("the judge: %s; asked again", reason)
                self._sleep(min(2.0 ** (tried - 1), 30.0))
            try:
                return self._answer(json.dumps(body).encode())
            except urllib.error.HTTPError as error:
                with error:  # it holds the connection
                    reason = f"status {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code not in _RETRIED:
                    raise ValueError(f"{self._url} refuses the question, {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionError(f"{self._url}: {reason}; {self._config.num_tries} tries failed. What is labelled is kept")

    def _answer(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        with self._opener.open(request, timeout=self._config.timeout_seconds) as reply:
            text = reply.read().decode(errors="replace")
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{self._url} gives no chat completion: {text[:200]!r}") from None


def label_by_judge(
    asked: Sequence[Question],
    folder: Path,
    judge: Judge,
    name: str,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> Verdicts:
    """Compares pairs, those that aren't compared yet; each label is saved at once.

    Args:
        asked: the pairs.
        folder: in which the file of candidates lies.
        judge: who is asked, twice a pair.
        name: of the judge.
        out: the file of labels, which is gone on with.
        progress: called with the numbers of pairs that are done, and in all.
    """
    by = f"judge {name}"
    known = {(label.place, label.first, label.second) for label in read_labels(out, _rows(asked))
             if isinstance(label, Comparison) and label.by == by}  # fmt: skip
    verdicts = Verdicts()
    for number, question in enumerate(asked, start=1):
        if question.key not in known:
            label = _judged(question, folder, judge, by)
            append_labels(out, [label])
            verdicts.counts[label.note or label.choice] += 1
        if progress is not None:
            progress(number, len(asked))
    return verdicts


def _rows(asked: Sequence[Question]) -> list[CandidateRow]:
    return list({question.row.place: question.row for question in asked}.values())


def _judged(question: Question, folder: Path, judge: Judge, by: str) -> Comparison:
    """Both orders; verdicts that differ are a tie, and noted."""
    choices = []
    for first, second in ((question.first, question.second), (question.second, question.first)):
        said = judge.ask(question_content(question.row, first, second, folder))
        choices.append(_choice(said, is_swapped=first != question.first))
    if None in choices:
        return question.label(by, "skip", "unreadable")
    if choices[0] != choices[1]:
        return question.label(by, "tie", "disagreement")
    return question.label(by, choices[0])


def _choice(said: str, is_swapped: bool) -> Choice | None:
    """The last verdict in an answer; None: there is none."""
    found = _VERDICT.findall(said)
    if not found:
        return None
    match found[-1]:
        case "C":
            return "tie"
        case verdict:
            return "first" if (verdict == "A") != is_swapped else "second"


def question_content(row: CandidateRow, first: int, second: int, folder: Path) -> list[dict[str, Any]]:
    """The request and two answers, in OpenAI's parts; pictures and sounds travel in it."""
    parts: list[dict[str, Any]] = [_text("The request:")]
    if row.task in _OF_TASK:
        parts.append(_text(_OF_TASK[row.task]))
    for message in row.prompt:
        if len(row.prompt) > 1:
            parts.append(_text(f"{message['role']}:"))
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            parts.append(_part(part, folder))
    for letter, number in (("A", first), ("B", second)):
        parts.append(_text(f"Answer {letter}:"))
        parts.append(_answer_part(row.candidates[number], folder))
    return parts


def _answer_part(candidate: Candidate, folder: Path) -> dict[str, Any]:
    if candidate.sound is None:
        return _text(candidate.text)
    return _part({"type": "audio", "audio": candidate.sound}, folder)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] == "text":
        return _text(part["text"])
    path = folder / part[part["type"]]
    data = base64.b64encode(path.read_bytes()).decode()
    suffix = path.suffix[1:].lower() or "png"
    if part["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": suffix}}
    kind = {"jpg": "jpeg", "img": "png"}.get(suffix, suffix)
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
