"""Scores of text against text, and their intervals. Pure functions; nothing here knows a model.

Everything is compared after `normalize_text`. All rates and accuracies are fractions, CIDEr is on its usual scale
of 0 to 10.

N rows, S bootstrap resamples.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jiwer
import numpy as np

MAX_NGRAM = 4
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0


def normalize_text(text: str) -> str:
    """Lower case, Unicode NFC, apostrophes dropped, other punctuation and whitespace collapsed to single spaces.

    Letters, marks, digits and symbols of every script stay: "Don't  stop, Ann!" becomes "dont stop ann".
    """
    characters = []
    for character in unicodedata.normalize("NFC", text).lower():
        if character in "'\u2019":
            continue
        characters.append(" " if unicodedata.category(character)[0] in "PZC" else character)
    return " ".join("".join(characters).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two texts are equal after `normalize_text`; a text of punctuation alone is compared as it is."""
    normalized = normalize_text(reference)
    if not normalized:
        return prediction.strip() == reference.strip()
    return normalize_text(prediction) == normalized


def text_meaning(text: str) -> str:
    """What `exact_match` compares: two texts match exactly when it is equal."""
    return normalize_text(text) or text.strip()


@dataclass(frozen=True)
class Edits:
    """Edit counts of one row: the smallest number of substitutions, deletions and insertions, and the tokens."""

    errors: int
    length: int
    """Number of words (or characters) in the reference."""

    @property
    def rate(self) -> float:
        """Errors a reference token; an empty reference counts as one token."""
        return self.errors / max(self.length, 1)


def word_edits(prediction: str, reference: str) -> Edits:
    """Word edits of one row after `normalize_text`, counted by jiwer."""
    output = jiwer.process_words(normalize_text(reference), normalize_text(prediction))
    return Edits(
        output.substitutions + output.deletions + output.insertions,
        output.hits + output.substitutions + output.deletions,
    )


def character_edits(prediction: str, reference: str) -> Edits:
    """Character edits of one row after `normalize_text` (spaces count), counted by jiwer."""
    output = jiwer.process_characters(normalize_text(reference), normalize_text(prediction))
    return Edits(
        output.substitutions + output.deletions + output.insertions,
        output.hits + output.substitutions + output.deletions,
    )


def error_rate(edits: Sequence[Edits]) -> float:
    """The corpus-level error rate: all errors over all reference tokens (WER or CER). May exceed 1."""
    if not edits:
        raise ValueError("no rows to score; an error rate needs at least one reference")
    return sum(e.errors for e in edits) / max(sum(e.length for e in edits), 1)


def bootstrap_interval(
    numerators_N: Sequence[float] | np.ndarray,
    denominators_N: Sequence[float] | np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    clusters_N: Sequence[Hashable] | None = None,
    is_share: bool = False,
) -> list[float]:
    """The percentile bootstrap interval of a ratio of sums over rows (Efron 1979).

    A mean is the case of denominators 1; a corpus WER has rows' errors and rows' words. Rows are drawn with
    replacement; rows that belong together (one speaker's, say) would make that interval too narrow, so with
    `clusters_N` whole clusters are drawn (Davison and Hinkley 1997, section 3.8). Where all rows (or clusters) have the
    same value, all that is drawn has it too, and the interval would have no width, as if 20 rows without a mistake were
    proof of none ever: of a share it is then Wilson's, of as many rows, or clusters, as there are.

    Args:
        numerators_N: one number a row.
        denominators_N: one number a row; None for ones.
        num_resamples: S.
        seed: of the draw; the same seed gives the same interval.
        confidence: the interval's coverage.
        clusters_N: what each row belongs to; None: every row stands for itself. Of a single cluster there is nothing
            to draw: its rows are drawn then, and the interval says nothing of other clusters.
        is_share: the ratio is a share, between 0 and 1.

    Returns:
        [lower, upper].

    Raises:
        ValueError: there are no rows, or the sequences differ in length.
    """
    values_N = np.asarray(numerators_N, dtype=np.float64)
    weights_N = np.ones_like(values_N) if denominators_N is None else np.asarray(denominators_N, dtype=np.float64)
    if values_N.ndim != 1 or values_N.shape != weights_N.shape or not len(values_N):
        raise ValueError(
            f"got numerators of shape {values_N.shape} and denominators of shape {weights_N.shape}; "
            f"a bootstrap needs two equally long rows of numbers, at least one each"
        )
    if clusters_N is not None:
        values_N, weights_N = _summed_by_cluster(values_N, weights_N, clusters_N)
    num_rows = len(values_N)
    value, weight = values_N.sum(), weights_N.sum()
    if is_share and weight > 0 and np.allclose(values_N * weight, weights_N * value, rtol=1e-9, atol=0.0):
        return wilson_interval(float(value / weight), num_rows, confidence)
    generator = np.random.default_rng(seed)
    # How often each row is drawn is multinomial: this needs no [S, N] table of indices.
    draws_SN = generator.multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=num_resamples)
    ratios_S = (draws_SN @ values_N) / np.maximum(draws_SN @ weights_N, 1e-12)
    tail = (1.0 - confidence) / 2.0
    lower, upper = np.quantile(ratios_S, [tail, 1.0 - tail])
    return [float(lower), float(upper)]


def wilson_interval(share: float, num_rows: int, confidence: float = 0.95) -> list[float]:
    """The score interval of a share of independent rows (Wilson 1927): never without a width, and within 0 to 1.

    Args:
        share: of the rows.
        num_rows: of which it is the share, at least one.
        confidence: the interval's coverage.

    Returns:
        [lower, upper].
    """
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    centre = share + z * z / (2 * num_rows)
    half = z * math.sqrt(share * (1.0 - share) / num_rows + z * z / (4 * num_rows**2))
    scale = 1.0 + z * z / num_rows
    return [max(0.0, round((centre - half) / scale, 12)), min(1.0, round((centre + half) / scale, 12))]


def _summed_by_cluster(
    values_N: np.ndarray, weights_N: np.ndarray, clusters_N: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Both sums of each cluster, in the order in which clusters are met; the rows' own where there is but one."""
    if len(clusters_N) != len(values_N):
        raise ValueError(f"got {len(clusters_N)} clusters for {len(values_N)} rows; give each row one")
    numbers: dict[Hashable, int] = {}
    places_N = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters_N]
    if len(numbers) < 2:
        return values_N, weights_N
    return np.bincount(places_N, values_N), np.bincount(places_N, weights_N)


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each row (Vedantam et al., 2015, arXiv:1411.5726, section 5 and its "CIDEr-D" variant).

    n-grams of 1 to 4 words, raw term counts, IDF = log(N / document frequency) over the evaluated references,
    counts clipped at the reference's, a Gaussian penalty on the difference of lengths (sigma 6), the mean over n and
    over a row's references, times 10: as the authors' public scorer does it. What differs: texts are tokenized by
    `normalize_text` and split at spaces, not by the Penn Treebank tokenizer; the length is the number of words.
    A set of one row scores 0, since every IDF is log 1.

    Args:
        predictions: one text a row.
        references: at least one text a row.

    Returns:
        One score a row, 0 to 10; the corpus score is their mean.

    Raises:
        ValueError: the lengths differ or a row has no reference.
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(references)} rows of references; "
            f"give each prediction at least one reference"
        )
    counted = [[_count_ngrams(reference) for reference in row] for row in references]
    document_frequency: Counter[tuple[str, ...]] = Counter()
    for row in counted:
        document_frequency.update({ngram for counts in row for ngram in counts})
    log_rows = math.log(max(len(references), 1))

    def idf(ngram: tuple[str, ...]) -> float:
        return log_rows - math.log(max(1, document_frequency[ngram]))

    scores = []
    for prediction, row in zip(predictions, counted, strict=True):
        vector = _weigh(_count_ngrams(prediction), idf)
        scores.append(sum(_cider_similarity(vector, _weigh(counts, idf)) for counts in row) / len(row))
    return [CIDER_SCALE * score for score in scores]


@dataclass(frozen=True)
class _NgramVector:
    weights: list[dict[tuple[str, ...], float]]
    """tf-idf weight of each n-gram, by n - 1."""
    norms: list[float]
    num_words: int


def _count_ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = normalize_text(text).split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, MAX_NGRAM + 1) for start in range(len(words) - n + 1)
    )


def _weigh(counts: Counter[tuple[str, ...]], idf) -> _NgramVector:
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_NGRAM)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf(ngram)
    norms = [math.sqrt(sum(w * w for w in of_n.values())) for of_n in weights]
    return _NgramVector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 1))


def _cider_similarity(prediction: _NgramVector, reference: _NgramVector) -> float:
    """The mean over n of the clipped cosine, times the length penalty: 0 to 1."""
    total = 0.0
    for n in range(MAX_NGRAM):
        norm = prediction.norms[n] * reference.norms[n]
        if norm > 0.0:
            reference_weights = reference.weights[n]
            dot = sum(
                min(weight, reference_weights[ngram]) * reference_weights[ngram]
                for ngram, weight in prediction.weights[n].items()
                if ngram in reference_weights
            )
            total += dot / norm
    difference = prediction.num_words - reference.num_words
    return total / MAX_NGRAM * math.exp(-(difference**2) / (2.0 * CIDER_SIGMA**2))
