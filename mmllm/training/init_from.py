"""Starts a training from a folder's weights: each tensor is loaded, new, or left out, and said to be.

Rows of ids are taken where the ids mean the same: all of them with the very same tokenizer; else those of text with the
same text tokenizer, those of special tokens by their names, those of units with the same codec.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.checkpoints.adapters import base_state
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.embedding import ADDED
from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.deferred import fill
from mmllm.training.init_source import InitSource
from mmllm.training.parts import part_of
from mmllm_tokenizers.folder import TokenizerFolder

log = logging.getLogger(__name__)

FILE = "init_from.json"
_TEXT_ROWS = ("decoder.embed_tokens.weight", "decoder.lm_head.weight", "ctc_head.1.weight", "ctc_head.1.bias")
_CODE_ROWS = "code_embedding.table.weight"
_FREE = (
    "vocab_size", "num_base_ids", "dropout", "gradient_checkpointing", "attention_backend", "mod_layers",
    "mod_capacity", "mod_router", "mod_predictor_coef",
)  # fmt: skip
"""Keys of the decoder that don't change what its weights compute, or say it elsewhere."""
_CHANGEABLE = ("rope_scaling", "layer_types", "sliding_window", "sliding_rope_theta", "prefix")
"""What may be changed on purpose with the same weights, as for longer contexts; it is said."""
_NORMALIZED = {
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_channels",
    "qk_norm": "qk_norm_over",
    "attention_bias": "bias_of",
}
_FREE_OF_EXPERTS = (
    "router_aux_loss_coef", "router_z_loss_coef", "backend", "aux_loss_scope", "use_expert_bias", "bias_update_speed",
    "router_jitter_noise", "expert_dropout", "local_entropy_loss_coef", "local_entropy_modalities",
    "global_entropy_loss_coef", "global_entropy_min_experts",
)  # fmt: skip


@dataclass
class InitSummary:
    """What became of each tensor, by name."""

    source: str
    loaded: list[str] = field(default_factory=list)
    in_part: dict[str, str] = field(default_factory=dict)
    """Loaded row by row: which rows of how many."""
    new: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    changed: dict[str, list[Any]] = field(default_factory=dict)
    """Keys of the decoder that the folder has otherwise: its value, and this one."""

    def to_dict(self) -> dict[str, Any]:
        """For `init_from.json`: names and counts by part of the model."""
        kinds = {"loaded": self.loaded, "loaded_in_part": [*self.in_part], "new": self.new, "left_out": self.left_out}
        by_part = {
            kind: {part: sorted(name for name in names if part_of(name) == part) for part in _parts(names)}
            for kind, names in kinds.items()
        }
        return {
            "init_from": self.source,
            "counts": {kind: dict(_parts(names)) for kind, names in kinds.items()},
            **by_part,
            "rows": self.in_part,
            "changed": self.changed,
        }

    def log(self) -> None:
        """Says it: a warning where anything isn't as in the folder."""
        log.info("init_from %s: loaded %s", self.source, _counted(self.loaded))
        for name, rows in self.in_part.items():
            log.warning("init_from %s: of %s loaded %s; the others stay random, since their ids mean something else",
                        self.source, name, rows)  # fmt: skip
        for what, names in (("new", self.new), ("left out", self.left_out)):
            if names:
                log.warning("init_from %s: %s %s", self.source, what, _counted(names))
        for key, (before, now) in self.changed.items():
            log.warning("init_from %s: decoder.%s is %s here, %s there", self.source, key, now, before)

    def write(self, folder: Path) -> None:
        """Writes `init_from.json` to the log folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def _parts(names: Collection[str]) -> Counter[str]:
    return Counter(part_of(name) for name in names)


def _counted(names: Collection[str]) -> str:
    return f"{len(names)} tensors ({', '.join(f'{part} {count}' for part, count in _parts(names).items()) or 'none'})"


class Span(NamedTuple):
    """Rows that mean the same here and there."""

    here: int
    there: int
    count: int


@dataclass(frozen=True)
class SameRows:
    """Which rows mean the same."""

    text: list[Span]
    """Of the embedding, the head and the CTC head: text and special tokens."""
    units: list[Span]
    """Of the embedding and the head."""
    codes: list[Span]
    """Of the codes' embedding."""

    @staticmethod
    def of(ours: TokenizerFolder | None, source: InitSource) -> SameRows:
        """By the two tokenizers; none where one of them isn't known."""
        if ours is None:
            return SameRows([], [], [])
        vocabulary, theirs = ours.vocabulary, source.tokenizer
        block, num_units = vocabulary.codebook_size + 1, vocabulary.size - vocabulary.num_text
        if ours.hash == source.tokenizer_hash:
            first, num_codes = vocabulary.num_text, block * _heard(ours)
            return SameRows([Span(0, 0, first)], [Span(first, first, num_units)], [Span(0, 0, num_codes)])
        if theirs is None:
            return SameRows([], [], [])
        if ours.text.hash == theirs.text.hash:
            text = [Span(0, 0, vocabulary.num_text)]
        else:
            text = [Span(row, theirs.text.special_ids[token], 1) for token, row in ours.text.special_ids.items()]
        if not _same_codes(ours, theirs):
            return SameRows(text, [], [])
        count = block * min(vocabulary.num_codebooks, theirs.vocabulary.num_codebooks)
        units = [Span(vocabulary.num_text, theirs.vocabulary.num_text, count)]
        return SameRows(text, units, [Span(0, 0, block * min(_heard(ours), _heard(theirs)))])


def _heard(folder: TokenizerFolder) -> int:
    """Codebooks of the codes' embedding."""
    return folder.config.heard_codebooks or folder.vocabulary.num_codebooks


def _same_codes(ours: TokenizerFolder, theirs: TokenizerFolder) -> bool:
    if ours.audio is None or theirs.audio is None or ours.audio.hash != theirs.audio.hash:
        return False
    is_flat = "flatten" in (ours.pattern, theirs.pattern)
    return ours.vocabulary.codebook_size == theirs.vocabulary.codebook_size and (
        not is_flat or (ours.pattern, ours.num_codebooks) == (theirs.pattern, theirs.num_codebooks)
    )


@torch.no_grad()
def initialize(
    model: MultimodalModel,
    source: InitSource,
    tokenizer: TokenizerFolder | None,
    parts: Collection[str] | None = None,
    takes_tower: bool = True,
) -> InitSummary:
    """Copies a folder's weights into a model, one after another; sharded models take their shards.

    Args:
        model: with weights of its own, which stay where nothing is loaded.
        source: the folder.
        tokenizer: the model's; None: what its ids mean is not known.
        parts: of `mmllm.training.parts`; others stay new. None: all that both have.
        takes_tower: False: the image tower comes from elsewhere, and the image projector that was made for another
            stays new.

    Raises:
        ValueError: the model computes something else, or a tensor has another size or is missing; the message names the
            key or the weight.
    """
    summary = InitSummary(str(source.path))
    check_same(model.config.decoder, source, summary)
    same = SameRows.of(tokenizer, source)
    own, found = _blocks(model), source.readers
    if not same.text and any(name in found for name in _TEXT_ROWS):
        log.warning("embeddings and head stay random: the ids of %s aren't those of this tokenizer", source.path)
    wanted = _Wanted(source, parts, takes_tower, bool(same.codes))
    for name, blocks in own.items():
        if not wanted.takes(name):
            summary.new.append(name)
        elif name not in found:
            wanted.check_missing(name, blocks[0].shape)
            summary.new.append(name)
        elif name in (*_TEXT_ROWS, _CODE_ROWS):
            spans = same.codes if name == _CODE_ROWS else same.text
            if name.startswith("decoder."):
                spans = wanted.spans(model, same)
            _load_rows(name, blocks, found[name], spans, summary, source)
        else:
            shape, read = found[name]
            _check_shape(name, shape, tuple(blocks[0].shape), source)
            fill(blocks[0], read())
            summary.loaded.append(name)
    summary.left_out += [name for name in found if name not in own or name in summary.new]
    for name in found:
        if name not in own:
            wanted.check_unknown(name, model)
    tower, transform = model.vision, source.image_transform
    if tower is not None and tower.config.mean is None and transform is not None and wanted.takes("vision."):
        tower.mean, tower.std = transform.mean, transform.std
    return summary


def _blocks(model: MultimodalModel) -> dict[str, list[Tensor]]:
    """A model's tensors by the names that folders have for them, without adapters; those of rows in their blocks."""
    blocks: dict[str, list[Tensor]] = {}
    for name, tensor in base_state(model.state_dict()).items():
        base, _, leaf = name.rpartition(".")
        blocks.setdefault(f"{base}.weight" if leaf == ADDED else name, []).append(tensor)
    return blocks


@dataclass(frozen=True)
class _Wanted:
    source: InitSource
    parts: Collection[str] | None
    takes_tower: bool
    has_codes: bool

    def takes(self, name: str) -> bool:
        """Whether a tensor is to come from the folder."""
        part = part_of(name)
        if part == "image_tower" and not self.takes_tower:
            return False
        if part == "image_projector" and not (self.takes_tower and self.source.model.vision is not None):
            return False
        if part == "audio_front_end" and not name.startswith("ctc_head.") and not self.has_codes:
            return False  # another codec's codes, or none
        if self.parts is None:
            return True
        is_shared = name in _TEXT_ROWS[:2]
        return part in self.parts or (is_shared and "unit_embedding" in self.parts)

    def spans(self, model: MultimodalModel, same: SameRows) -> list[Span]:
        """Of the embedding and the head, those of the parts that are wanted."""
        if self.parts is None:
            return [*same.text, *same.units]
        decoder = model.config.decoder
        boundary, spans = decoder.num_base_ids or model.config.num_text, []
        for part, first, last in (("text_embedding", 0, boundary), ("unit_embedding", boundary, decoder.vocab_size)):
            for here, there, count in [*same.text, *same.units] if part in self.parts else []:
                start, stop = max(here, first), min(here + count, last)
                if start < stop:
                    spans.append(Span(start, there + start - here, stop - start))
        return spans

    def check_missing(self, name: str, shape: torch.Size) -> None:
        """Refuses a part that the folder has in part."""
        group = name.partition(".")[0]
        has_group = any(each.partition(".")[0] == group for each in self.source.readers)
        if has_group and not name.endswith(".e_score_correction_bias") and ".depth." not in name:
            raise ValueError(
                f"{name.removeprefix(self._prefix)} is missing in {self.source.weights_path}; the model wants "
                f"{list(shape)}: use the config in {self.source.config_path}, or leave {part_of(name)} out of "
                f"init_parts"
            )

    def check_unknown(self, name: str, model: MultimodalModel) -> None:
        """Refuses weights of a part that the model has, but of nothing in it."""
        group = name.partition(".")[0]
        if group in ("vision", "ctc_head", "mask_embedding") or not self.takes(name):
            return  # a tower is cut behind its layer; the others are whole, or not at all there
        if getattr(model, group, None) is not None:
            raise ValueError(
                f"{self.source.weights_path} has {name.removeprefix(self._prefix)}, which the model lacks; use the "
                f"config in {self.source.config_path}, or leave {part_of(name)} out of init_parts"
            )

    @property
    def _prefix(self) -> str:
        return "" if self.source.is_model_folder else "decoder."


def _check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...], source: InitSource) -> None:
    if got != wanted:
        raise ValueError(
            f"{name} has shape {list(got)} in {source.weights_path}, the model wants {list(wanted)}; use the config in "
            f"{source.config_path}, or leave {part_of(name)} out of init_parts"
        )


def _load_rows(
    name: str, blocks: list[Tensor], found: tuple[tuple[int, ...], Any], spans: list[Span], summary: InitSummary,
    source: InitSource,
) -> None:  # fmt: skip
    shape, read = found
    num_rows = sum(len(block) for block in blocks)
    _check_shape(name, (num_rows, *shape[1:]), (num_rows, *blocks[0].shape[1:]), source)
    beyond = [span for span in spans if span.there + span.count > shape[0]]
    if beyond:
        raise ValueError(
            f"{name} has {shape[0]} rows in {source.weights_path}, but the folder's tokenizer speaks of id "
            f"{beyond[0].there + beyond[0].count - 1}; they don't belong together: copy the folder again"
        )
    num_loaded = sum(span.count for span in spans)
    if not num_loaded:
        summary.new.append(name)
        return
    tensor = read()
    first = 0
    for block in blocks:
        _fill_rows(block, first, tensor, spans)
        first += len(block)
    if num_loaded == num_rows:
        summary.loaded.append(name)
    else:
        summary.in_part[name] = f"{num_loaded} of {num_rows} rows"


def _fill_rows(block: Tensor, first: int, tensor: Tensor, spans: list[Span]) -> None:
    """Copies rows into a block whose own begin at `first`."""
    whole = block.full_tensor().cpu() if isinstance(block, DTensor) else block
    for here, there, count in spans:
        start, stop = max(here, first), min(here + count, first + len(block))
        if start < stop:
            whole[start - first : stop - first].copy_(tensor[there + start - here : there + stop - here])
    if isinstance(block, DTensor):
        fill(block, whole)


def check_same(decoder: DecoderConfig, source: InitSource, summary: InitSummary) -> None:
    """Refuses a decoder that would compute another function with the same weights.

    Raises:
        ValueError: it would; the message names the key.
    """
    found = source.model.decoder
    for key, (got, own) in _computing(decoder, found).items():
        if got != own:
            hint = " (lm_head.weight)" if key == "tie_word_embeddings" else ""
            raise ValueError(
                f"decoder.{key} is {got} but {source.said} has {own}{hint}; leave the key out, or use the values of "
                f"{source.config_path}"
            )
    for key in _CHANGEABLE:
        if getattr(decoder, key) != getattr(found, key):
            summary.changed[key] = [_plain(getattr(found, key)), _plain(getattr(decoder, key))]


def _computing(decoder: DecoderConfig, found: DecoderConfig) -> dict[str, tuple[Any, Any]]:
    """What decides the function that weights compute, of both; sizes first."""
    pairs: dict[str, tuple[Any, Any]] = {}
    special = ("moe", "moe_layers", "intermediate_size")
    for key in (each.name for each in dataclasses.fields(DecoderConfig)):
        if key not in (*_FREE, *_CHANGEABLE, *special):
            name = _NORMALIZED.get(key, key)
            pairs[key] = getattr(decoder, name), getattr(found, name)
    for layer in range(min(decoder.num_hidden_layers, found.num_hidden_layers)):
        pairs[f"has_experts({layer})"] = decoder.has_experts(layer), found.has_experts(layer)
    if not all(decoder.has_experts(layer) for layer in range(decoder.num_hidden_layers)):
        pairs["intermediate_size"] = decoder.intermediate_size, found.intermediate_size
    if decoder.moe is not None and found.moe is not None:
        for key in (each.name for each in dataclasses.fields(decoder.moe)):
            if key not in _FREE_OF_EXPERTS:
                pairs[f"moe.{key}"] = getattr(decoder.moe, key), getattr(found.moe, key)
    return pairs


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
