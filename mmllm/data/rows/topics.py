"""Topics of rows: their texts as TF-IDF, in clusters.

Clusters are those of spherical k-means (Dhillon and Modha 2001, https://doi.org/10.1023/A:1007612920971), begun by
k-means++ (Arthur and Vassilvitskii 2007). All is NumPy, and a pure function of texts and seed. Words are runs of
letters and digits, so that texts of scripts without blanks have few.

Shapes: N texts, V words, K topics, E words of texts (each once a text), in the order of the texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import OWN_KEYS, row_text
from mmllm.data.rows.split import write_manifest

NO_TOPIC = -1
"""Of texts without a word that counts."""
MAX_WORDS = 20_000
"""Of the vocabulary: those that are in most texts."""
_CHUNK = 1 << 22
"""Products of weights and centres that are held at once, in numbers."""
_TAKEN = (*OWN_KEYS, "question", "answer")
"""Keys of which rows are made: no column of topics."""
_TOLD = 8
"""Words that tell of a topic."""


@dataclass(frozen=True)
class TopicsConfig:
    """How topics are found."""

    topics: int = 16
    """K."""
    seed: int = 0
    starts: int = 3
    """Clusterings from other beginnings, of which the tightest is taken."""
    rounds: int = 50
    """Of each, at most; it ends where no text changes its topic."""

    def __post_init__(self) -> None:
        for name in ("topics", "starts", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Weights:
    """TF-IDF of N texts: for each, its words and their weights, of length one together."""

    starts_N: np.ndarray
    """Where each text begins, and the end."""
    words_E: np.ndarray
    weights_E: np.ndarray

    def text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A text's words and weights."""
        here = slice(self.starts_N[number], self.starts_N[number + 1])
        return self.words_E[here], self.weights_E[here]


class Vocabulary:
    """The words that count, and how much: those of two texts or more, as ln((1 + N) / (1 + texts with it)) + 1.

    Args:
        texts: One or more.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(_words(text)))
        frequent = sorted(((-count, word) for word, count in counts.items() if count > 1))[:MAX_WORDS]
        self.words = sorted(word for _, word in frequent)
        self._numbers = {word: number for number, word in enumerate(self.words)}
        self._rarity_V = np.array([np.log((1 + len(texts)) / (1 + counts[word])) + 1 for word in self.words])

    def weights(self, texts: Sequence[str]) -> Weights:
        """(1 + ln tf) times a word's rarity, scaled to length one; other words aren't counted."""
        starts, words, counts = [0], list[int](), list[int]()
        for text in texts:
            found = Counter(self._numbers[word] for word in _words(text) if word in self._numbers)
            words += found.keys()
            counts += found.values()
            starts.append(len(words))
        words_E, starts_N = np.array(words, dtype=np.int64), np.array(starts)
        weights_E = (1 + np.log(np.array(counts, dtype=np.float64))) * self._rarity_V[words_E]
        texts_E = np.repeat(np.arange(len(texts)), np.diff(starts_N))
        lengths_N = np.sqrt(np.bincount(texts_E, weights_E**2, minlength=len(texts)))
        return Weights(starts_N, words_E, weights_E / lengths_N[texts_E])


@dataclass(frozen=True)
class Topics:
    """K topics, the largest first."""

    vocabulary: Vocabulary
    centers_VK: np.ndarray
    """Mean texts, of length one; 0 of topics without a text."""

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [N], the topic whose centre is nearest by cosine; `NO_TOPIC` of texts without a word that counts."""
        weights = self.vocabulary.weights(texts)
        return np.where(np.diff(weights.starts_N) > 0, _nearest(weights, self.centers_VK)[0], NO_TOPIC)

    def words(self, topic: int) -> list[str]:
        """Those that weigh most in a topic; of one without a text, none."""
        order = np.argsort(-self.centers_VK[:, topic], kind="stable")[:_TOLD]
        return [self.vocabulary.words[number] for number in order if self.centers_VK[number, topic] > 0]


def topics_of(texts: Sequence[str], config: TopicsConfig) -> Topics:
    """The topics of some texts.

    Raises:
        ValueError: Fewer texts than topics have a word that another has too.
    """
    vocabulary = Vocabulary(texts)
    known = [text for text in texts if any(word in vocabulary._numbers for word in _words(text))]
    if len(known) < config.topics:
        raise ValueError(
            f"topics is {config.topics}, but {len(known)} of {len(texts)} texts have a word that another has too; "
            f"give fewer topics, or more rows"
        )
    weights = vocabulary.weights(known)
    found = [_clustered(weights, len(vocabulary.words), config, start) for start in range(config.starts)]
    topics_N, centers_VK, _ = max(found, key=lambda each: each[2])
    sizes_K = np.bincount(topics_N, minlength=config.topics)
    order = np.argsort(-sizes_K, kind="stable")
    return Topics(vocabulary, (centers_VK * (sizes_K > 0))[:, order])


def _clustered(
    weights: Weights, num_words: int, config: TopicsConfig, start: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(topic [N], centers [V, K], mean cosine to them) of texts that all have a word."""
    rng = np.random.default_rng([config.seed, start])
    centers_VK = _spread(weights, num_words, config.topics, rng)
    topics_N, near_N = _nearest(weights, centers_VK)
    for _ in range(config.rounds):
        centers_VK = _centers(weights, topics_N, near_N, centers_VK.shape)
        before = topics_N
        topics_N, near_N = _nearest(weights, centers_VK)
        if np.array_equal(before, topics_N):
            break
    return topics_N, centers_VK, float(near_N.mean())


def _spread(weights: Weights, num_words: int, num_topics: int, rng: np.random.Generator) -> np.ndarray:
    """[V, K] texts that lie apart: each is drawn by its squared distance to the nearest of those before it."""
    centers_VK = np.zeros((num_words, num_topics))
    num_texts = len(weights.starts_N) - 1
    near_N = np.zeros(num_texts)
    for topic in range(num_topics):
        apart_N = (1 - near_N).clip(0) if topic else np.ones(num_texts)
        if not apart_N.sum() > 1e-9:  # fewer different texts than topics
            break
        words, values = weights.text(int(rng.choice(num_texts, p=apart_N / apart_N.sum())))
        centers_VK[words, topic] = values
        near_N = np.maximum(near_N, _nearest(weights, centers_VK[:, topic : topic + 1])[1])
    return centers_VK


def _centers(weights: Weights, topics_N: np.ndarray, near_N: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[V, K] of the mean of each topic's texts; one without any takes the text that is furthest from its own."""
    num_words, num_topics = shape
    topics_E = np.repeat(topics_N, np.diff(weights.starts_N))
    sums_VK = np.bincount(weights.words_E * num_topics + topics_E, weights.weights_E, minlength=num_words * num_topics)
    centers_VK = sums_VK.reshape(num_words, num_topics)
    far = iter(np.argsort(near_N, kind="stable").tolist())
    for topic in np.flatnonzero(np.bincount(topics_N, minlength=num_topics) == 0).tolist():
        words, values = weights.text(next(far))
        centers_VK[words, topic] = values
    return centers_VK / np.sqrt((centers_VK**2).sum(axis=0)).clip(1e-12)


def _nearest(weights: Weights, centers_VK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number [N] of the nearest centre, cosine [N] to it)."""
    count = len(weights.starts_N) - 1
    topics_N, near_N = np.zeros(count, dtype=np.int64), np.zeros(count)
    room = max(1, _CHUNK // centers_VK.shape[1])  # entries of texts: these may be of any length
    stop = 0
    while stop < count:
        first, end = stop, weights.starts_N[stop] + room
        stop = max(first + 1, int(np.searchsorted(weights.starts_N, end, side="right")) - 1)
        starts = weights.starts_N[first : stop + 1]
        here = slice(starts[0], starts[-1])
        products_EK = centers_VK[weights.words_E[here]] * weights.weights_E[here, None]
        has_words = np.flatnonzero(np.diff(starts))
        if len(has_words):  # reduceat gives a text without words the next one's first
            cosines = np.add.reduceat(products_EK, starts[has_words] - starts[0], axis=0)
            topics_N[first + has_words], near_N[first + has_words] = cosines.argmax(axis=1), cosines.max(axis=1)
    return topics_N, near_N


def write_topics(
    manifests: Sequence[str | Path],
    out: str | Path,
    config: TopicsConfig,
    target: Sequence[str | Path] = (),
    column: str = "topic",
    max_bad_fraction: float = 0.05,
    form: str = "auto",
    media: str | Path | None = None,
    columns: ColumnNames | None = None,
) -> dict[str, Any]:
    """Writes rows with their topic in `column`, and with `target`, in `{column}_target`, its share among target's rows.

    Args:
        manifests: Inputs of any form that `forms.FORMS` reads; kinds may be mixed.
        out: The new manifest.
        config: How topics are found.
        target: Inputs of what is wanted; they are no part of the clustering.
        column: Key of the rows; metadata of that name is replaced, and counted.
        max_bad_fraction: More unusable rows than this are an error.
        form: Of the inputs; `auto`: told from each.
        media: What their paths are relative to; by default each input's folder.
        columns: What their columns are called here, and their types.

    Returns:
        `rows`; `topics`, by size: `topic`, `rows`, `words` that weigh most, with `target` its `target` share;
        `without_topic`, `replaced` and `skipped` rows.

    Raises:
        FileNotFoundError, ManifestError, ValueError: An input can't be used, or has too few rows, or the column is one
            that rows are made of.
    """
    if not column.strip() or column in _TAKEN:
        raise ValueError(
            f"column is {column!r}; topics would take the place of what rows have in {', '.join(_TAKEN)}: give a name "
            f"of its own, such as 'topic'"
        )
    bad = BadRows(max_bad_fraction)
    rows = [row for path in manifests for row in read_rows(path, bad, form, media, columns)]
    wanted = [row for path in target for row in read_rows(path, bad, form, media, columns)]
    if not rows or (target and not wanted):
        raise ManifestError(f"{', '.join(map(str, target if rows else manifests))}: there are no rows")
    texts = [row_text(row) for row in rows]
    topics = topics_of(texts, config)
    topics_N = topics.of(texts)
    values = [{column: topic} for topic in topics_N.tolist()]
    shares = Counter(topics.of([row_text(row) for row in wanted]).tolist())
    if wanted:
        for value in values:
            value[f"{column}_target"] = round(shares[value[column]] / len(wanted), 6)
    replaced = sum(any(key in row.metadata for key in values[0]) for row in rows)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = [replace(row, metadata={**row.metadata, **value}) for row, value in zip(rows, values, strict=True)]
    write_manifest(told, out)
    sizes = Counter(topics_N.tolist())
    return {
        "rows": len(rows),
        "topics": [
            {
                "topic": topic, "rows": sizes[topic], "words": topics.words(topic),
                **({"target": shares[topic] / len(wanted)} if wanted else {}),
            }
            for topic in range(config.topics)
        ],
        "without_topic": sizes[NO_TOPIC],
        "replaced": replaced,
        "skipped": bad.reasons,
    }  # fmt: skip


def topics_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What `write_topics` returned, as a table."""
    has_target = any("target" in topic for topic in told["topics"])
    yield f"{'topic':>5}  {'rows':>9}  {'share':>6}  {'target  ' if has_target else ''}words"
    for topic in told["topics"]:
        target = f"{100 * topic['target']:5.1f}%  " if has_target else ""
        share = f"{100 * topic['rows'] / told['rows']:5.1f}%"
        yield f"{topic['topic']:>5}  {topic['rows']:>9,}  {share}  {target}{' '.join(topic['words'])}"
    if num_empty := sum(not topic["rows"] for topic in told["topics"]):
        yield f"{num_empty:,} of {len(told['topics']):,} topics are empty: there are fewer different texts than topics"
    if told["without_topic"]:
        yield f"{NO_TOPIC:>5}  {told['without_topic']:>9,}  rows without a word that another row has too"
    if told["replaced"]:
        yield f"{told['replaced']:,} rows had such columns, which are replaced"
    if told["skipped"]:
        yield f"{len(told['skipped']):,} rows can't be used: {'; '.join(list(map(str, told['skipped']))[:5])}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
