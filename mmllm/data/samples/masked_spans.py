"""Masked spans as a further objective: a text with spans left out is the prompt, what was left out is the answer.

As in T5 (arXiv 1910.10683) each span becomes one sentinel, and the answer is each sentinel with its span behind it; a
decoder alone may learn it too, as in UL2 (arXiv 2205.05131). So many tokens are masked in so many spans as T5 masks;
where they lie is drawn evenly among all places with a token between two spans, while T5 lets no text begin with a span.
Where there is one sentinel alone it is written for every span: their order tells them apart.

    <|text|> the ⟨1⟩ sat on ⟨2⟩ mat <|end|>    →    ⟨1⟩ cat ⟨2⟩ the red <|end|>

Shapes: T tokens of a document, N documents, m tokens of a text, n of them masked, k spans.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmllm.batch import Modality
from mmllm.data.samples.document import Document
from mmllm.data.samples.templates import literal_ids, parse_template, template_of
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END, PAD, SPECIAL_TOKENS

MASKED = "masked_"
"""Before the name of a task whose text has masked spans, in plans and in what they tell."""
KINDS = ("text", "caption")
"""Of sources that can have them: one text is all that is to be predicted."""
_SENTINEL = re.compile(r"<extra_id_(\d+)>|<\|?(?:reserved|unused)\D*(\d+)\|?>|<\|?mask\|?>|\[MASK\]")


@dataclass(frozen=True)
class MaskedSpansConfig:
    """How much of a source is learned by filling in.

    Attributes:
        share: of its documents, drawn anew in every epoch; the others stay as they are.
        rate: share of a text's tokens that are masked.
        mean_length: tokens of a span, on average.
        sentinels: special tokens that stand for spans; None: the tokenizer's `<extra_id_…>` or reserved ones, or else
            its mask.
    """

    share: float = 0.5
    rate: float = 0.15
    mean_length: float = 3.0
    sentinels: list[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"masked_spans.share is {self.share}; it must be above 0 and at most 1")
        if not 0 < self.rate < 1:
            raise ValueError(f"masked_spans.rate is {self.rate}; it must be above 0 and below 1")
        if not (math.isfinite(self.mean_length) and self.mean_length >= 1):
            raise ValueError(f"masked_spans.mean_length is {self.mean_length}; a span has 1 token or more")
        if self.sentinels is not None and (not self.sentinels or len(set(self.sentinels)) != len(self.sentinels)):
            raise ValueError(
                f"masked_spans.sentinels is {self.sentinels}; name special tokens, each once, or leave it out"
            )


def base_task(task: str) -> str:
    """The task of an item, without masked spans."""
    return task.removeprefix(MASKED)


def num_masked(num_tokens: np.ndarray, rate: float, mean_length: float) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of texts are masked, in how many spans, int64 [N] both; 0 where a text has fewer than two.

    Args:
        num_tokens: int64 [N], m of each.
        rate: share that is masked.
        mean_length: of a span.
    """
    masked = np.clip(np.rint(num_tokens * rate).astype(np.int64), 1, np.maximum(num_tokens - 1, 1))
    spans = np.rint(masked / mean_length).astype(np.int64)
    spans = np.clip(spans, 1, np.minimum(masked, num_tokens - masked + 1))  # a token lies between two spans
    is_there = num_tokens >= 2
    return np.where(is_there, masked, 0), np.where(is_there, spans, 0)


def drawn_spans(num_tokens: int, masked: int, spans: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """[start, stop) of each span, in order: any choice with a token between two of them is as likely as another.

    Args:
        num_tokens: m.
        masked: n.
        spans: k.
        rng: to draw from.
    """
    lengths = _parts(masked, spans, rng)
    gaps = _parts(num_tokens - masked + 2, spans + 1, rng)  # the first and the last may be empty
    gaps[0] -= 1
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    return [(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """A whole number as a sum of so many positive ones, each such sum as likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def free_tokens(folder: TokenizerFolder) -> set[str]:
    """Special tokens that mean nothing where documents are read or written: what may stand for a span.

    Not ours, but for the padding; none that ends a generation; none of a template; and of those that the tokenizer
    names (its beginning, its unknown token, …) its padding and mask alone.
    """
    text = folder.text
    templates = [each for template in folder.templates.values() for each in template.values()]
    written = "\n".join([*templates, folder.chat_template or ""])
    named = {} if text.foreign is None else text.foreign.named
    names = {name for key, name in named.items() if key not in ("pad_token", "mask_token")}
    ids = {text.id(name) for name in SPECIAL_TOKENS if name != PAD} | set(text.end_ids)
    return {name for name in text.control_tokens - names if name not in written and text.id(name) not in ids}


def sentinel_ids(folder: TokenizerFolder, names: Sequence[str] | None) -> list[int]:
    """The ids that stand for spans.

    Raises:
        ValueError: a name is no special token that is free, or there is none to be found.
    """
    free = free_tokens(folder)
    for name in names or ():
        if name not in free:
            raise ValueError(
                f"masked_spans.sentinels names {name!r}, which is no special token of the tokenizer that is free: such "
                f"as mean something already can't stand for a span; free are {' '.join(sorted(free)) or 'none'}"
            )
    if names:
        return [folder.id(name) for name in names]
    found = [(match, name) for name in free if (match := _SENTINEL.fullmatch(name)) is not None]
    # Numbered ones in their order, and a mask only where there are none of them.
    numbered = sorted((int(match[1] or match[2]), name) for match, name in found if match[1] or match[2])
    chosen = [name for _, name in numbered] or sorted(name for _, name in found)
    if not chosen:
        raise ValueError(
            "the tokenizer has no token that could stand for a masked span; name special tokens that these documents "
            "don't have in masked_spans.sentinels (such as ['<|pad|>'], which is then written for every span), or add "
            "<extra_id_0>, <extra_id_1>, … as special tokens to the checkpoint's tokenizer before it is imported"
        )
    return [folder.id(name) for name in chosen]


class SpanMasking:
    """A source's documents with masked spans.

    Args:
        config: how much is masked.
        task: of the documents.
        folder: tokenizers and templates.
        template: `prompt` and `target` instead of the folder's.
        anchor: text in front of all.

    Raises:
        ValueError: the template has no text of its own to predict, or there are no sentinels.
    """

    def __init__(
        self,
        config: MaskedSpansConfig,
        task: str,
        folder: TokenizerFolder,
        template: Mapping[str, str] | None = None,
        anchor: str | None = None,
    ) -> None:
        self.config, self._folder = config, folder
        template = template or template_of(task, folder)
        prompt, target = (parse_template(template[part]) for part in ("prompt", "target"))
        asked, answered = ([name for _, name in pieces if name is not None] for pieces in (prompt, target))
        if answered != ["text"] or not set(asked) <= {"image"}:
            raise ValueError(
                f"masked_spans are of documents whose prompt has at most a picture and whose target is one text; the "
                f"template of {task} has the fields {asked} and {answered}"
            )
        sizes = [[len(literal_ids(folder.text, literal)) if literal else 0 for literal, _ in target]]
        sizes.append([len(literal_ids(folder.text, literal)) for literal, _ in prompt if literal])
        self._before, self._after = sizes[0][0], sum(sizes[0][1:])
        self._frame = sum(sizes[0]) + sum(sizes[1]) + len(folder.text.encode(anchor or ""))
        self._has_image = "image" in asked
        self._sentinels = np.array(sentinel_ids(folder, config.sentinels), dtype=np.int64)

    def num_tokens(self, num_tokens: np.ndarray, num_tiles: np.ndarray) -> np.ndarray:
        """int64 [N] tokens of documents with masked spans; 0 where a text is too short for any.

        Args:
            num_tokens: of them as they are.
            num_tiles: of their pictures together.
        """
        text = num_tokens.astype(np.int64) - self._around(num_tiles)
        _, spans = num_masked(text, self.config.rate, self.config.mean_length)
        return np.where(spans > 0, num_tokens + 2 * spans + 1, 0)

    def num_prompt(self, num_tokens: int, num_tiles: int) -> int:
        """Tokens of the prompt of a document with masked spans, from all of its tokens."""
        around = int(self._around(np.array(num_tiles)))
        text = np.arange(max(num_tokens - around, 0) + 1)
        masked, spans = num_masked(text, self.config.rate, self.config.mean_length)
        found = int(np.searchsorted(around + text + 2 * spans + 1, num_tokens))  # the more text, the more tokens
        return num_tokens - int(masked[found] + spans[found]) - 1

    def _around(self, num_tiles: np.ndarray) -> np.ndarray:
        return num_tiles.astype(np.int64) * (self._folder.num_image_tokens if self._has_image else 0) + self._frame

    def masked(self, document: Document, rng: np.random.Generator) -> Document:
        """The document with spans drawn: its prompt, what is left of its text, its end; then the answer and an end.

        Args:
            document: as `build_document` gives it.
            rng: to draw from.
        """
        ids_T = document.token_ids_T
        start, stop = int(document.targets_T.argmax()) + self._before, document.num_tokens - self._after
        counts = num_masked(np.array([stop - start]), self.config.rate, self.config.mean_length)
        masked, spans = (int(each[0]) for each in counts)
        assert spans, "a text that is too short is no item with masked spans"
        left, answer, place = [], [], start
        for number, (first, end) in enumerate(drawn_spans(stop - start, masked, spans, rng)):
            sentinel = self._sentinels[number % len(self._sentinels)][None]
            left += [ids_T[place : start + first], sentinel]
            answer += [sentinel, ids_T[start + first : start + end]]
            place = start + end
        prompt_ids = np.concatenate([ids_T[:start], *left, ids_T[place:]])
        answer_ids = np.concatenate([*answer, [self._folder.id(END)]])
        targets_T = np.zeros(len(prompt_ids) + len(answer_ids), dtype=bool)
        targets_T[len(prompt_ids) :] = True
        modality_T = np.full(len(targets_T), int(Modality.TEXT), dtype=np.int64)
        modality_T[:start] = document.modality_T[:start]
        return replace(
            document,
            token_ids_T=np.concatenate([prompt_ids, answer_ids]),
            targets_T=targets_T,
            modality_T=modality_T,
            codes_TK=np.full((len(targets_T), document.codes_TK.shape[1]), -1, dtype=np.int64),
        )
