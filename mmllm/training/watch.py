"""Stops a training whose loss or gradient is no number, and says in which documents.

Nothing waits for the device: a step's losses and gradient norm go to the host while the next step is computed, and are
read when that one ends. Until then the step's batches are kept. Where weights leave the process (a checkpoint, the
export), what is still on its way is waited for first, so that no broken weights are saved over the last good ones.

Shapes: W ranks, A batches of a step (more than one where gradients are accumulated), S sources.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from mmllm.batch import Batch, CaptionBatch, PackedBatch, SoundBatch
from mmllm_tokenizers.tensor_file import save_tensors

log = logging.getLogger(__name__)

NUM_NAMED = 5
"""Documents that the message names; the file beside the batch names all."""
KINDS: dict[str, type[Batch]] = {kind.__name__: kind for kind in (PackedBatch, CaptionBatch, SoundBatch)}


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or no number."""


@dataclass
class _Kept:
    """A batch of a step, and what it gave."""

    batch: Any
    before: Mapping[str, Any] | None
    """The data's state before it, from which its documents are found at once; None: not known."""
    loss: Tensor | None = None
    source_sums_S: Tensor | None = None


@dataclass(frozen=True)
class _Sent:
    """A step whose values are on their way to the host."""

    step: int
    kept: list[_Kept]
    values: Arriving
    checks_norm: bool


class Arriving:
    """Numbers of a device that are on their way to the host; asking for them waits until they have come.

    Args:
        values: [N] float64, on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._array = host.numpy()
        else:
            self._array = np.empty(values.shape)
            torch.from_numpy(self._array).copy_(values)

    def read(self) -> list[float]:
        """The numbers; not counted as asking the device, which has long been past them a step later."""
        if self._event is not None:
            self._event.synchronize()
        return self._array.tolist()


@dataclass(frozen=True)
class _Findings:
    """What came of a step."""

    losses_A: list[float]
    bad_sources_A: list[list[int]]
    norm: float
    bad_ranks: list[int]
    """Whose losses are no numbers; empty: all are, and the gradient is not."""


@dataclass
class Watch:
    """Watches the losses and gradient norms of a training.

    Attributes:
        directory: where the batch is written; None: the message alone tells.
        source_names: in the order of `note_sources`.
        loader: whose `documents_of` names the documents of a step, if it has one.
        rank: of this process.
        world_size: W.
    """

    directory: Path | None = None
    source_names: Sequence[str] = ()
    loader: Any = None
    rank: int = 0
    world_size: int = 1
    _kept: list[_Kept] = field(default_factory=list)
    _sent: _Sent | None = None
    _failure: str | None = None
    _last_state: Mapping[str, Any] | None = None

    def begin_batch(self, batch: Any) -> None:
        """Keeps a batch until its step's values have been read."""
        self._kept.append(_Kept(batch, self._last_state))
        self._last_state = getattr(batch, "state", None)

    def note_loss(self, loss: Tensor) -> None:
        """The loss of the batch that was begun last."""
        if self._kept:
            self._kept[-1].loss = loss.detach()

    def note_sources(self, source_sums_S: Tensor) -> None:
        """Its loss by source: which of them are no numbers tells whose documents are to be named."""
        if self._kept:
            self._kept[-1].source_sums_S = source_sums_S.detach()

    def end_step(self, step: int, norm: Tensor, checks_norm: bool = True) -> None:
        """Sends what the step's batches gave, and reads what the step before sent.

        Args:
            step: number of the optimizer step that is about to be made, from 1.
            norm: of the gradient, before clipping.
            checks_norm: False where a gradient that overflows is part of the method: a scaled loss in float16.

        Raises:
            NonFiniteError: the step before was not finite, on whichever rank.
        """
        self.settle()
        kept, self._kept = self._kept, []
        self._sent = _Sent(step, kept, Arriving(self._values(kept, norm)), checks_norm)

    def settle(self) -> None:
        """Reads what was sent last; waits for it if need be.

        Raises:
            NonFiniteError: as `end_step`; again at each call, since the weights stay broken.
        """
        sent, self._sent = self._sent, None
        findings = None if sent is None else self._findings(sent)
        if sent is not None and findings is not None:
            self._failure = self._told(sent, findings)
        if self._failure is not None:
            raise NonFiniteError(self._failure)

    def _values(self, kept: list[_Kept], norm: Tensor) -> Tensor:
        """The norm, each rank's badness, and each batch's loss and losses by source: [1 + W + A + A·S]."""
        zero = norm.detach().double()
        losses_A = [zero.new_zeros(()) if each.loss is None else each.loss.double() for each in kept]
        sources = [each.source_sums_S.double() for each in kept if each.source_sums_S is not None]
        own = torch.stack(losses_A) if losses_A else zero.new_zeros(0)
        is_bad_W = zero.new_zeros(self.world_size)
        is_bad_W[self.rank] = (~own.isfinite()).any()
        if self.world_size > 1:
            dist.all_reduce(is_bad_W)
        return torch.cat([zero.reshape(1), is_bad_W, own, *sources])

    def _findings(self, sent: _Sent) -> _Findings | None:
        norm, *rest = sent.values.read()
        bad_ranks = [rank for rank, is_bad in enumerate(rest[: self.world_size]) if is_bad]
        if not bad_ranks and (math.isfinite(norm) or not sent.checks_norm):
            return None
        rest = rest[self.world_size :]
        losses_A, rest = rest[: len(sent.kept)], rest[len(sent.kept) :]
        bad_sources_A = []
        for each in sent.kept:
            num_sources = 0 if each.source_sums_S is None else len(each.source_sums_S)
            sums_S, rest = rest[:num_sources], rest[num_sources:]
            bad_sources_A.append([source for source, value in enumerate(sums_S) if not math.isfinite(value)])
        return _Findings(losses_A, bad_sources_A, norm, bad_ranks)

    # --- telling ----------------------------------------------------------------------------------------------

    def _told(self, sent: _Sent, found: _Findings) -> str:
        """The message; writes the batches that it is about."""
        next_step = "mend or filter them, or lower optimizer.lr, and go on with --ckpt_path last"
        if found.bad_ranks and self.rank not in found.bad_ranks:
            bad_rank, where = found.bad_ranks[0], ""
            if self.directory is not None:
                where = f", and so do its files in {self.directory}"
            return (
                f"training stopped at step {sent.step}: the loss of rank {bad_rank} is not finite; that rank's message "
                f"names the documents{where}; {next_step}"
            )
        is_blamed_A = [not math.isfinite(loss) for loss in found.losses_A]
        blamed = [number for number, is_bad in enumerate(is_blamed_A) if is_bad or not found.bad_ranks]
        parts = [self._tell_batch(sent, found, number) for number in blamed]
        losses = ", ".join(str(found.losses_A[number]) for number in blamed) or "of no batch"
        return (
            f"training stopped at step {sent.step}: loss {losses}, gradient norm {found.norm} (rank {self.rank}); "
            f"{'; '.join(parts)}; {next_step}"
        )

    def _tell_batch(self, sent: _Sent, found: _Findings, number: int) -> str:
        kept = sent.kept[number]
        names = [self._source_name(source) for source in found.bad_sources_A[number]]
        documents = self._documents(kept)
        suspects = [each for each in documents if not names or each["source"] in names]
        broken = _with_non_finite_input(kept.batch, documents)
        report = {
            "step": sent.step,
            "rank": self.rank,
            "loss": str(found.losses_A[number]),
            "gradient_norm": str(found.norm),
            "sources": names,
            "documents_with_non_finite_input": broken,
            "documents": suspects,
        }
        told = f"in sources {', '.join(names)}" if names else "in all sources"
        shown = broken or suspects
        if shown:
            named = [f"{each['shard']}:{each['key']}" for each in shown[:NUM_NAMED]]
            more = f" and {len(shown) - NUM_NAMED} more" if len(shown) > NUM_NAMED else ""
            what = "documents whose own input is not finite: " if broken else "documents "
            told += f", {what}{', '.join(named)}{more}"
        if self.directory is not None:
            path = self.directory / f"step_{sent.step}_rank_{self.rank}_batch_{number}.safetensors"
            save_batch(path, kept.batch, report)
            told += f"; the batch is in {path}, and all names in {path.with_suffix('.json').name}"
        return told

    def _source_name(self, source: int) -> str:
        return self.source_names[source] if source < len(self.source_names) else str(source)

    def _documents(self, kept: _Kept) -> list[dict[str, Any]]:
        """By name; none where the loader can't tell: that must not hide what is to be told."""
        state = getattr(kept.batch, "state", None) or {}
        if "step" not in state or not hasattr(self.loader, "documents_of"):
            return []
        try:
            return self.loader.documents_of(state["step"] - 1, kept.before)
        except (ValueError, OSError) as error:
            log.warning("the documents of the batch can't be named: %s", error)
            return []


def _with_non_finite_input(batch: Any, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents of which stored features are infinite or no numbers."""
    if not isinstance(batch, PackedBatch) or not len(batch.image_features_NPC):
        return []
    is_bad_N = ~batch.image_features_NPC.isfinite().flatten(1).all(dim=1)
    places = batch.image_slots_NS[is_bad_N, 0].tolist()
    length = batch.document_ids_BT.shape[1]
    ids = [int(batch.document_ids_BT.flatten()[place]) for place in places]
    wanted = {(place // length, number) for place, number in zip(places, ids, strict=True)}
    return [each for each in documents if (each["row"], each["number"]) in wanted]


# --- a batch on disk ------------------------------------------------------------------------------------------------


def save_batch(path: Path, batch: Any, report: Mapping[str, Any]) -> None:
    """Writes a batch's tensors as safetensors, and beside them what isn't a tensor, with the report, as JSON.

    Args:
        path: ends in `.safetensors`; the JSON has the same name. Folders are made.
        batch: one of `mmllm.batch`, or tensors in lists and dicts.
        report: JSON-serializable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(batch).items()}
    save_tensors(tensors, path)
    plain: dict[str, Any] = {}
    if isinstance(batch, Batch):
        names = [each.name for each in dataclasses.fields(batch)]  # pyright: ignore[reportArgumentType]
        others = {name: getattr(batch, name) for name in names if name not in tensors and name != "metadata"}
        plain = {name: value for name, value in others.items() if not isinstance(value, Batch)}
    values = {**report, "kind": type(batch).__name__, "fields": plain}
    path.with_suffix(".json").write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")


def load_batch(path: str | Path) -> Batch:
    """The batch that `save_batch` wrote, on the CPU; its metadata is made again when it is needed.

    Raises:
        ValueError: it is none of `mmllm.batch`.
    """
    path = Path(path)
    values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if values["kind"] not in KINDS:
        raise ValueError(f"{path} holds a {values['kind']}; load_batch reads {', '.join(KINDS)}: take load_file")
    return KINDS[values["kind"]](**load_file(path), **values["fields"])


def _tensors(batch: Any, name: str = "batch") -> dict[str, Tensor]:
    match batch:
        case Tensor():
            return {name: batch}
        case Batch():
            named = {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}  # pyright: ignore
            found = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            for key, value in named.items():
                if isinstance(value, Batch):
                    found |= {f"{key}.{name}": tensor for name, tensor in _tensors(value).items()}
            return found
        case Mapping():
            parts = [_tensors(value, str(key)) for key, value in batch.items()]
        case list() | tuple():
            parts = [_tensors(value, f"{name}.{place}") for place, value in enumerate(batch)]
        case _:
            return {}
    return {key: value for part in parts for key, value in part.items()}
