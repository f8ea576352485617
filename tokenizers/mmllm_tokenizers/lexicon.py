"""Labels of frames to what is said: the likeliest label of each frame, or the likeliest words of a lexicon.

Labels follow CTC (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891): repeats count once, blanks not at all,
a blank parts two equal letters.

Shapes: F frames, L labels, W words, S states (two a letter: the letter, and the blank behind it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLANK, SPACE = 0, 1
_NEVER = -1e30


def greedy_labels(log_probs_FL: NDArray[np.floating]) -> list[int]:
    """The likeliest label of each frame, repeats and blanks taken out."""
    labels_F = log_probs_FL.argmax(axis=1)
    kept_F = (labels_F != BLANK) & np.concatenate(([True], labels_F[1:] != labels_F[:-1]))
    return labels_F[kept_F].tolist()


@dataclass(frozen=True)
class _Between:
    """What lies between words: the best path that has just left a word, or has not entered one."""

    score: float
    history: int
    """Place in the list of words said so far."""


class LexiconDecoder:
    """The likeliest sequence of a lexicon's words with a space between two of them: one pass over the frames.

    Every word is as likely as any other before it is heard (no language model), but for `word_bonus`.

    Args:
        words: each word by the labels that spell it.
        word_bonus: natural logarithm by which each word is likelier; negative: fewer, longer words.
    """

    def __init__(self, words: Mapping[tuple[int, ...], str], word_bonus: float = -1.0) -> None:
        if not words or not all(words):
            raise ValueError("a lexicon must have words, each of at least one letter")
        self.words_W = list(words.values())
        self.word_bonus = word_bonus
        spellings: Sequence[tuple[int, ...]] = list(words)
        self.labels_S = np.array([label for word in spellings for letter in word for label in (letter, BLANK)])
        lengths_W = np.array([2 * len(word) for word in spellings])
        self.last_W = np.cumsum(lengths_W) - 2
        """The state of each word's last letter."""
        self.is_first_S = np.zeros(len(self.labels_S), dtype=bool)
        self.is_first_S[self.last_W + 2 - lengths_W] = True
        is_letter_S = np.arange(len(self.labels_S)) % 2 == 0
        self.may_skip_S = is_letter_S & ~self.is_first_S
        """Letters that may follow the one before without a blank."""
        self.may_skip_S[2:] &= self.labels_S[2:] != self.labels_S[:-2]

    def decode(self, log_probs_FL: NDArray[np.floating]) -> list[str]:
        """The words; none where the likeliest path has none."""
        scores_S = np.full(len(self.labels_S), _NEVER)
        histories_S = np.zeros(len(self.labels_S), dtype=np.int64)
        said: list[tuple[int, int]] = [(0, -1)]  # (history before, word); the first is none
        silence, space, pause = _Between(0.0, 0), _Between(_NEVER, 0), _Between(_NEVER, 0)
        for log_probs_L in log_probs_FL.astype(np.float64):
            entry = max(silence, space, pause, key=lambda between: between.score)
            ended = self._best_end(scores_S, histories_S)
            scores_S, histories_S = self._step(scores_S, histories_S, entry, log_probs_L)
            pause = max(space, pause, key=lambda between: between.score)
            pause = _Between(pause.score + log_probs_L[BLANK], pause.history)
            if ended[0] > space.score:
                said.append((ended[1], ended[2]))
                space = _Between(ended[0], len(said) - 1)
            space = _Between(space.score + log_probs_L[SPACE], space.history)
            silence = _Between(silence.score + log_probs_L[BLANK], 0)
        score, history, word = self._best_end(scores_S, histories_S)
        if score <= max(silence.score, _NEVER / 2):
            return []
        found = [self.words_W[word]]
        while history:
            history, word = said[history]
            found.append(self.words_W[word])
        return found[::-1]

    def _best_end(self, scores_S: NDArray[np.float64], histories_S: NDArray[np.int64]) -> tuple[float, int, int]:
        """(score, history, word) of the best path that is through with a word."""
        ends_2W = np.stack([scores_S[self.last_W], scores_S[self.last_W + 1]])
        word = int(ends_2W.max(axis=0).argmax())
        state = self.last_W[word] + int(ends_2W[:, word].argmax())
        return float(scores_S[state]), int(histories_S[state]), word

    def _step(
        self,
        scores_S: NDArray[np.float64],
        histories_S: NDArray[np.int64],
        entry: _Between,
        log_probs_L: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """One frame further: each state stays, or comes from the one before, from two before, or from between words."""
        entry_score = entry.score + self.word_bonus
        from_before_S = np.where(self.is_first_S, entry_score, np.concatenate(([_NEVER], scores_S[:-1])))
        history_before_S = np.where(self.is_first_S, entry.history, np.concatenate(([0], histories_S[:-1])))
        from_letter_S = np.where(self.may_skip_S, np.concatenate(([_NEVER, _NEVER], scores_S[:-2])), _NEVER)
        history_letter_S = np.concatenate(([0, 0], histories_S[:-2]))
        choices_3S = np.stack([scores_S, from_before_S, from_letter_S])
        chosen_1S = choices_3S.argmax(axis=0)[None]
        histories_3S = np.stack([histories_S, history_before_S, history_letter_S])
        best_S = np.take_along_axis(choices_3S, chosen_1S, axis=0)[0]
        return best_S + log_probs_L[self.labels_S], np.take_along_axis(histories_3S, chosen_1S, axis=0)[0]
