"""What a run shows of itself: routing by modality, and captions and transcripts of a few fixed samples.

Shapes: L layers with experts, M modalities, E experts.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from mmllm.batch import Modality, PackedBatch
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import media_source
from mmllm.data.rows.rows import Row
from mmllm.data.samples.decode import decode_image
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.captions import caption_matches, reference_scene
from mmllm.evaluation.metrics import error_rate, word_edits
from mmllm.evaluation.routing import (
    changed_share,
    chosen_experts,
    load_by_modality,
    load_divergence_bits,
    routing_summary,
)
from mmllm.inference.api import Model
from mmllm.inference.inputs import as_audio
from mmllm.parallel.shard import free_gathered
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.progress import Progress

log = logging.getLogger(__name__)


FEW_LAYERS = 8
"""Up to so many layers with experts each has curves of its own; of more the mean and the worst are logged."""


class RoutingLog(pl.Callback):
    """Expert load by modality: scalars to the loggers, rows to `routing.csv`, the totals to `routing.json`.

    The scalars, as `routing/…`: dead experts, maximal violation, mutual information of expert and modality, entropy of
    the router (also by modality), and how far the load moved since the last window (`load_drift_bits`).
    `routing.json` holds `layers`, `modalities`, `counts` [layers][modalities][experts], `entropy_sums`
    [layers][modalities] in nats and `tokens` [modalities] of the whole run (resumes included), and each as `last_…` of
    the last window, from which `mmllm.evaluation.routing` draws everything else.
    """

    def __init__(self, directory: str, every_steps: int = 100, probe: bool = False) -> None:
        """Keeps the settings.

        Args:
            directory: where `routing.csv` and `routing.json` go.
            every_steps: steps between rows.
            probe: keep this training's first batch, route it again every so many steps, and log for how many of its
                tokens the set of experts has changed since the last time (`routing/changed_share`): another pass
                through the model each time.

        Raises:
            ValueError: `every_steps` is below 1.
        """
        if every_steps < 1:
            raise ValueError(f"RoutingLog's every_steps is {every_steps}; it must be at least 1")
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.probe = probe
        self._total: _Window | None = None
        self._last: _Window | None = None
        self._last_step = 0
        self._probe_batch: PackedBatch | None = None
        self._probe_experts_LNK: torch.Tensor | None = None

    @property
    def files(self) -> list[Path]:
        """What it writes."""
        return [self.directory / "routing.csv", self.directory / "routing.json"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the rows of another run, or after the checkpoint."""
        self._probe_batch = self._probe_experts_LNK = None
        if trainer.is_global_zero:
            keep_rows(self.directory / "routing.csv", trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a window's load when it is time."""
        if self.probe and self._probe_batch is None:
            self._probe_batch = batch
        step = trainer.global_step
        if step != self._last_step and step % self.every_steps == 0:
            self._flush(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what is left, and `routing.json`."""
        self._flush(trainer, pl_module, trainer.global_step)
        self._probe_batch = self._probe_experts_LNK = None
        if self._total is None or self._last is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DecoderModule)
        self.directory.mkdir(parents=True, exist_ok=True)
        values = {
            "layers": list(pl_module.routing.layers),
            "modalities": [modality.name.lower() for modality in Modality],
            **self._total.to_dict(),
            **{f"last_{name}": value for name, value in self._last.to_dict().items()},
        }
        (self.directory / "routing.json").write_text(json.dumps(values) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """The totals."""
        windows = {"total": self._total, "last": self._last}
        state = {name: None if window is None else dataclasses.asdict(window) for name, window in windows.items()}
        return {**state, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the totals."""
        self._total, self._last = (_Window.restored(state_dict[name]) for name in ("total", "last"))
        self._last_step = state_dict["last_step"]

    def _flush(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not isinstance(pl_module, DecoderModule):
            return
        taken = pl_module.routing.take()
        if taken is None:
            return
        window, previous = _Window.of_all_ranks(*taken, group=pl_module.batch_group), self._last
        self._total = window if self._total is None else self._total + window
        self._last, self._last_step = window, step
        changed_L = self._changed_share(pl_module)
        if not trainer.is_global_zero:
            return
        metrics = _routing_metrics(window, previous, pl_module.routing.layers)
        if changed_L is not None:
            metrics |= _by_layer("changed_share", changed_L, pl_module.routing.layers)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        self._append_rows(step, window.counts, pl_module.routing.layers)

    def _changed_share(self, pl_module: DecoderModule) -> list[float] | None:
        """Of the probe's tokens, by layer, since the last time; None at the first. Each rank looks at its own probe."""
        if self._probe_batch is None or pl_module.model is None:
            return None
        experts_LNK, previous_LNK = chosen_experts(pl_module.model, self._probe_batch), self._probe_experts_LNK
        free_gathered(pl_module.model)
        self._probe_experts_LNK = experts_LNK
        return None if previous_LNK is None else changed_share(experts_LNK, previous_LNK).tolist()

    def _append_rows(self, step: int, counts_LME: torch.Tensor, layers: tuple[int, ...]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "routing.csv"
        is_new = not path.exists()
        load_LME = load_by_modality(counts_LME)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", "layer", "modality", "expert", "share", "count"])
            for row, layer in enumerate(layers):
                for modality in Modality:
                    if counts_LME[row, modality].sum() == 0:
                        continue
                    for expert in range(counts_LME.shape[2]):
                        share = round(float(load_LME[row, modality, expert]), 5)
                        count = int(counts_LME[row, modality, expert])
                        writer.writerow([step, layer, modality.name.lower(), expert, share, count])


@dataclasses.dataclass
class _Window:
    """Counts of some steps, on the CPU: `counts` [L, M, E], `entropy_sums` [L, M], `tokens` [M]."""

    counts: torch.Tensor
    entropy_sums: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def of_all_ranks(*tensors: torch.Tensor, group: dist.ProcessGroup | None = None) -> _Window:
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat, group=group)
        parts = flat.cpu().split([tensor.numel() for tensor in tensors])
        counts, entropy_sums, tokens = (p.view(t.shape) for p, t in zip(parts, tensors, strict=True))
        return _Window(counts.long(), entropy_sums, tokens.long())

    @staticmethod
    def restored(state: dict[str, torch.Tensor] | torch.Tensor | None) -> _Window | None:
        if isinstance(state, torch.Tensor):  # an earlier version's: counts alone
            return _Window(state, torch.zeros(state.shape[:2], dtype=torch.float64), torch.zeros_like(state[0, :, 0]))
        return None if state is None else _Window(**state)

    def __add__(self, other: _Window) -> _Window:
        return _Window(
            self.counts + other.counts, self.entropy_sums + other.entropy_sums, self.tokens + other.tokens
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("counts", "entropy_sums", "tokens")}


def _routing_metrics(window: _Window, previous: _Window | None, layers: tuple[int, ...]) -> dict[str, float]:
    """The scalars of a window."""
    summary = routing_summary(window.counts, layers, window.entropy_sums, window.tokens)
    num_layers = len(layers)
    metrics = {
        "routing/dead_experts": float(summary["num_dead_experts"]),
        "routing/max_load_ratio": max(summary["max_load_ratio"]),
        "routing/mutual_information_bits": sum(summary["mutual_information_bits"]) / num_layers,
        **_by_layer("max_violation", summary["max_violation"], layers),
        **_by_layer("router_entropy_bits", summary["router_entropy_bits"], layers),
    }
    for m, name in enumerate(summary["modalities"]):
        by_layer = [by_modality[m] for by_modality in summary["router_entropy_bits_by_modality"]]
        metrics[f"routing/router_entropy_bits/{name}"] = sum(by_layer) / num_layers
    if previous is not None and previous.counts.shape == window.counts.shape:
        drift_L = load_divergence_bits(window.counts, previous.counts).tolist()
        metrics |= _by_layer("load_drift_bits", drift_L, layers)
    return metrics


def _by_layer(name: str, values_L: Sequence[float], layers: tuple[int, ...]) -> dict[str, float]:
    """A quantity's mean and largest value over layers, and each layer's where they are few."""
    metrics = {f"routing/{name}/mean": sum(values_L) / len(values_L), f"routing/{name}/max": max(values_L)}
    if len(layers) <= FEW_LAYERS:
        metrics |= {f"routing/{name}/layer_{layer}": value for layer, value in zip(layers, values_L, strict=True)}
    return metrics


class Samples(pl.Callback):
    """Captions and transcripts of a fixed few rows, scored and shown while training; not of a sharded model.

    Exact matches and word error rates go to the loggers as `samples/…`, the texts to `samples.csv` and, through the
    `Progress` line, to the terminal.
    """

    def __init__(
        self, manifests: list[str], directory: str, num_samples: int = 8, every_steps: int = 500, num_shown: int = 2
    ) -> None:
        """Keeps the settings; the rows are read when training starts.

        Args:
            manifests: of validation data; the first rows with a picture, and the first with a sound, are taken.
            directory: where `samples.csv` goes.
            num_samples: of each kind.
            every_steps: steps between looks.
            num_shown: of each kind, on the terminal.

        Raises:
            ValueError: a number is below 1.
        """
        if min(num_samples, every_steps) < 1:
            raise ValueError(f"Samples needs num_samples {num_samples} and every_steps {every_steps} of at least 1")
        self.directory = Path(directory)
        self.every_steps = every_steps
        self.num_shown = num_shown
        self.manifests = manifests
        self.num_samples = num_samples
        self.rows: dict[str, list[Row]] = {"caption": [], "audio": []}
        self._last_step = 0

    @property
    def files(self) -> list[Path]:
        """What it writes."""
        return [self.directory / "samples.csv"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the rows.

        Raises:
            ValueError: a manifest can't be used.
        """
        if stage != "fit" or not trainer.is_global_zero:
            return
        if pl_module.device_mesh is not None:
            log.warning("Samples are not looked at while training: no rank has the whole of a sharded model")
        else:
            rows = [row for manifest in self.manifests for row in read_rows(manifest)]
            for kind, chosen in self.rows.items():
                readable = (row for row in rows if row.kind == kind and _is_readable(row))
                chosen[:] = itertools.islice(readable, self.num_samples)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the rows of another run, or after the checkpoint."""
        if trainer.is_global_zero:
            keep_rows(self.directory / "samples.csv", trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks when it is time."""
        step = trainer.global_step
        if step and step != self._last_step and step % self.every_steps == 0:
            self._last_step = step
            self._look(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks a last time: a callback that stands before this one may have changed the weights for the export."""
        self._look(trainer, pl_module, trainer.global_step)

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not isinstance(pl_module, DecoderModule) or pl_module.model is None or pl_module.folder is None:
            return
        pl_module.watch.settle()  # broken weights would fail here for another reason
        if not trainer.is_global_zero or pl_module.device_mesh is not None:
            return
        model = AskedModel(Model(pl_module.model, pl_module.folder, pl_module.image_transform))
        config = pl_module.model.config
        metrics: dict[str, float] = {}
        if config.vision is not None and self.rows["caption"]:
            rows, texts = self.rows["caption"], self._written(step, "caption", model.caption, "image", trainer)
            matches = [
                caption_matches(text, row.text, reference_scene(row.metadata))
                for row, text in zip(rows, texts, strict=True)
            ]
            metrics["samples/caption_exact_match"] = sum(matches) / len(matches)
            metrics["samples/caption_word_errors"] = _word_error_rate(rows, texts)
        if config.audio is not None and self.rows["audio"]:
            texts = self._written(step, "audio", model.transcribe, "audio", trainer)
            metrics["samples/transcript_wer"] = _word_error_rate(self.rows["audio"], texts)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _written(
        self, step: int, kind: str, write: Callable[..., list[str]], field: str, trainer: pl.Trainer
    ) -> list[str]:
        rows: list[Row] = self.rows[kind]
        predictions = write([media_source(getattr(row, field)) for row in rows], 64, len(rows))
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "samples.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", "task", "id", "prediction", "reference"])
            for row, prediction in zip(rows, predictions, strict=True):
                writer.writerow([step, kind, row.id, prediction, row.text])
        bar = trainer.progress_bar_callback
        if isinstance(bar, Progress):
            for row, prediction in list(zip(rows, predictions, strict=True))[: self.num_shown]:
                bar.message(f"  {kind} {row.id}: {prediction!r}  (wanted {row.text!r})")
        return predictions


def keep_rows(path: Path, last_step: int) -> None:
    """Cuts a CSV file whose first column is the step to the rows up to `last_step`; at step 0 the file goes."""
    if not last_step or not path.exists():
        path.unlink(missing_ok=True)
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    kept = [row for row in rows if int(row[0]) <= last_step]
    if len(kept) < len(rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])


def _word_error_rate(rows: Sequence[Row], texts: Sequence[str]) -> float:
    return error_rate([word_edits(text, row.text) for row, text in zip(rows, texts, strict=True)])


def _is_readable(row: Row) -> bool:
    """Whether a row's picture or sound can be read; says so where it can't."""
    try:
        if row.image is not None:
            decode_image(media_source(row.image), str(row.image))
        if row.audio is not None:
            as_audio(media_source(row.audio))
    except (OSError, ValueError) as error:
        log.warning("%s is not looked at while training: %s", row.where, error)
        return False
    return True
