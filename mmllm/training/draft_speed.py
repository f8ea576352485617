"""What a draft model is worth: how many of its guesses are accepted, and how much faster that makes a row alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.checkpoints.folder import LoadedModel
from mmllm.data.samples.document import Document, Picture
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.ngrams import NGrams
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

_MOST_PROMPTS = 8
_NEW_TOKENS = 64
_LEAST_TEXT = 12
PAYS = 1.05
"""Times faster, from which a draft model is worth its memory."""


@dataclass(frozen=True)
class Speed:
    """Greedy decoding of one row at a time, prompts included."""

    what: str
    num_prompts: int
    num_drafted: int
    num_accepted: int
    plain: float
    """Tokens a second without guesses."""
    drafted: float
    """With the draft model."""
    looked_up: float
    """With guesses that are looked up in the prompt and the text."""

    @property
    def ratio(self) -> float:
        """How much faster the draft model makes it."""
        return self.drafted / self.plain

    @property
    def acceptance(self) -> float:
        """Share of the draft model's guesses that the large model agrees with."""
        return self.num_accepted / max(1, self.num_drafted)

    @property
    def scores(self) -> dict[str, float]:
        """For the model card."""
        return {"acceptance": round(self.acceptance, 4), "times_faster": round(self.ratio, 3)}

    def __str__(self) -> str:
        said = (
            f"{self.what}: {self.acceptance:.0%} of {self.num_drafted} guesses accepted; tokens/s {self.drafted:.0f} "
            f"against {self.plain:.0f} without, {self.ratio:.2f} times ({self.looked_up:.0f} with look-up)"
        )
        if self.ratio >= PAYS:
            return said
        if self.looked_up > PAYS * self.plain:
            return f"{said}. It doesn't pay: --speculation lookup is faster here, and needs no draft"
        return f"{said}. It doesn't pay: try --speculation lookup, another --kind of draft, or decode without guesses"


def held_back_prompts(batches: Iterable[PackedBatch], tokenizer: TokenizerFolder) -> dict[str, list[Document]]:
    """Prompts of batches' documents: beginnings of texts, and pictures to say something about.

    Args:
        batches: no more of them are taken than it needs.
        tokenizer: of the model.
    """
    prompts: dict[str, list[Document]] = {"text": [], "pictures": []}
    for batch in batches:
        for what, prompt in prompts_of(batch, tokenizer):
            if len(prompts[what]) < _MOST_PROMPTS:
                prompts[what].append(prompt)
        if all(len(found) == _MOST_PROMPTS for found in prompts.values()):
            break
    return {what: found for what, found in prompts.items() if found}


def prompts_of(
    batch: PackedBatch, tokenizer: TokenizerFolder, rng: np.random.Generator | None = None
) -> Iterator[tuple[str, Document]]:
    """Prompts of a batch's documents, and what they are: "text" or "pictures".

    Args:
        batch: packed documents.
        tokenizer: of the model.
        rng: says where texts are cut; None: behind their first third.
    """
    for row, document_ids_T in enumerate(batch.document_ids_BT.numpy()):
        for number in range(int(document_ids_T.max()) + 1):
            (places,) = np.nonzero(document_ids_T == number)
            if len(places):  # else it could not be read
                share = 1 / 3 if rng is None else rng.uniform(0.05, 0.95)
                what, prompt = _prompt_of(batch, row, int(places[0]), int(places[-1]) + 1, tokenizer, share)
                if prompt is not None:
                    yield what, prompt


def _prompt_of(
    batch: PackedBatch, row: int, start: int, stop: int, tokenizer: TokenizerFolder, share: float
) -> tuple[str, Document | None]:
    """What of a packed document comes before its first target, of plain text a share; None: no such prompt."""
    modality_T = batch.modality_BT[row, start:stop].numpy()
    kinds = {int(kind) for kind in np.unique(modality_T)}
    (targets,) = np.nonzero(batch.labels_BT[row, start:stop].numpy() != IGNORE)
    what = "pictures" if Modality.IMAGE in kinds else "text"
    if kinds - {int(Modality.TEXT), int(Modality.IMAGE)} or not len(targets):
        return what, None
    is_plain = what == "text"
    if is_plain and len(modality_T) < 3 * _LEAST_TEXT:
        return what, None
    stop = start + (max(2, int(share * len(modality_T))) if is_plain else int(targets[0]) + 1)
    num_positions = batch.labels_BT.shape[1]
    pictures = []
    for slots_S, pixels_3HW in zip(batch.image_slots_NS.numpy(), batch.images_NCHW.numpy(), strict=False):
        place = int(slots_S[0]) - row * num_positions
        if start <= place < stop:
            pictures.append(Picture(place - start, pixels_3HW, len(slots_S)))
    if (what == "pictures") != bool(pictures) or len(batch.image_tiles_N3):  # tiles' places aren't kept here
        return what, None
    here = slice(start, stop)
    return what, Document(
        token_ids_T=batch.token_ids_BT[row, here].numpy(),
        targets_T=np.zeros(stop - start, dtype=bool),
        modality_T=batch.modality_BT[row, here].numpy(),
        codes_TK=batch.audio_codes_BTK[row, here].numpy(),
        images=tuple(pictures),
        filler=tokenizer.vocabulary.filler,
    )


def measure(
    loaded: LoadedModel, draft: MultimodalModel | NGrams, prompts: Mapping[str, Sequence[Document]], deadline: float
) -> list[Speed]:
    """Answers prompts one by one, without guesses and with them, taking turns.

    Args:
        loaded: the large model.
        draft: its draft model, or a table.
        prompts: by what they are.
        deadline: by `time.monotonic`; of each kind at least two prompts are answered.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    own = "ngram" if isinstance(draft, NGrams) else "draft"
    engines = {
        kind: Engine(model, tokenizer, _alone(own if kind == "draft" else kind), draft if kind == "draft" else None)
        for kind in ("none", "draft", "lookup")
    }
    speeds = []
    for place, (what, documents) in enumerate(prompts.items()):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(prompts) - place)
        seconds, num_tokens = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        counts = engines["draft"].counts
        before, num_prompts = (counts.drafted, counts.accepted), 0
        for number, prompt in enumerate(documents):
            request = TextRequest(prompt, max_new_tokens=_NEW_TOKENS)
            for kind, engine in engines.items():
                if not number:
                    engine.run([request])  # the first time memory is new
                begun = time.perf_counter()
                (result,) = engine.run([request])
                seconds[kind] += time.perf_counter() - begun
                assert isinstance(result, TextResult)
                num_tokens[kind] += result.cost.num_new_tokens
            num_prompts += 1
            if num_prompts >= 2 and time.monotonic() > until:
                break
        rates = {kind: num_tokens[kind] / seconds[kind] for kind in engines}
        drafted, accepted = counts.drafted - before[0], counts.accepted - before[1]
        speeds.append(Speed(what, num_prompts, drafted, accepted, rates["none"], rates["draft"], rates["lookup"]))
    return speeds


def _alone(kind: str) -> EngineConfig:
    return EngineConfig(max_rows=1, prefix_cache_bytes=0, speculation=kind)  # pyright: ignore[reportArgumentType]
