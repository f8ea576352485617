"""Decoders of other families in and out, a tensor at a time: names and parts of tensors, never a model of theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.files import listed, write_json
from mmllm.checkpoints.weights import Checkpoint, Tensors, TensorSpec, write_weights
from mmllm.interop.decoder_names import (
    DECODER,
    Names,
    Piece,
    check_dtypes,
    decoder_layout,
    is_stacked,
)
from mmllm.interop.families import decoder_config, family_of
from mmllm.interop.family_configs import family_config, family_for
from mmllm.interop.foreign_config import read_json
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig

TOKENIZER_KEY = "mmllm_tokenizer"
"""In an exported config.json: the hash of the tokenizer folder."""
_IGNORED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers of earlier transformers, which follow from config.json."""
_OF_ANY_DTYPE = re.compile(r"norm\.weight$|\.mlp\.gate\.")
"""Of our tensors those that are computed with in float32 whatever they are."""
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
    "n_shared_experts", "first_k_dense_replace",
)  # fmt: skip
"""Fields that are numbers of tensors, or no larger than one of their dimensions."""


class DecoderReader:
    """The decoder in a checkpoint: which of our tensors it gives, and these, read when asked for.

    Every tensor of the checkpoint is accounted for: used, ignored by name, left out by name, or refused.

    Args:
        checkpoint: where it lies, alone or inside of a model with pictures.
        config: of config.json; of a model with pictures its `text_config`.
        elsewhere: what names begin with that others read (towers, projectors).

    Attributes:
        family: its `model_type`.
        max_positions: the longest sequence that it was made for; None: config.json doesn't say.
        config: of our decoder.
        specs: of our tensors, by the names of `Decoder.state_dict()`.
        ignored: tensors that say nothing more: buffers of positions, a tied head's second copy.
        left_out: tensors that have no place here: layers that predict further tokens.

    Raises:
        ValueError: `families.decoder_config` refuses the config; a tensor is missing, unknown, or of another shape or
            type than config.json says; or tied weights differ. The message names the tensor.
    """

    def __init__(self, checkpoint: Tensors, config: Mapping[str, Any], elsewhere: tuple[str, ...] = ()):
        self.family = family_of(config)
        self.max_positions: int | None = config.get("max_position_embeddings")
        self._checkpoint = checkpoint
        found = {name: spec for name, spec in checkpoint.specs.items() if not name.startswith(elsewhere)}
        self.names = Names.of(found)
        _check_sizes(config, found)
        self.config = decoder_config(config)
        if self.config.num_hidden_layers > len(found):  # before so many are laid out
            raise ValueError(
                f"config.json: num_hidden_layers is {self.config.num_hidden_layers}, but the checkpoint has "
                f"{len(found)} tensors; the two are of different models: copy the checkpoint again"
            )
        layout = decoder_layout(self.config, self.family, self.names, is_stacked(found))
        others = [name for name in found if name not in layout.theirs]
        self.ignored = tuple(name for name in others if _IGNORED.search(name))
        self.left_out = tuple(name for name in others if self._predicts_further(name, found))
        told = {*self.ignored, *self.left_out, self.names.head}
        unknown = [name for name in others if name not in told]
        missing = [name for name in layout.theirs if name not in found]
        _refuse(missing, "lacks", f"config.json says it has {'them' if len(missing) > 1 else 'it'}")
        _refuse(unknown, "has the unknown", f"config.json says nothing of {'them' if len(unknown) > 1 else 'it'}")
        for name, shape in layout.theirs.items():
            if found[name].shape != shape:
                raise ValueError(
                    f"tensor {name} has the shape {list(found[name].shape)}; config.json says {list(shape)}; the two "
                    f"are of different models: copy the checkpoint again"
                )
        check_dtypes({name: found[name] for name in layout.theirs})
        self._pieces = layout.by_ours()
        self.specs = {name: self._spec(name, shape, found) for name, shape in layout.ours.items()}
        self._check_one_dtype()
        if self.config.tie_word_embeddings and self.names.head in found:
            self._check_tied()

    def _predicts_further(self, name: str, found: Mapping[str, TensorSpec]) -> bool:
        """Whether it is of a layer behind the last that predicts one token more (GLM-4.5)."""
        match = re.match(rf"{re.escape(self.names.body)}layers\.(\d+)\.", name)
        if match is None or int(match[1]) < self.config.num_hidden_layers or self.family != "glm4_moe":
            return False
        return f"{match[0]}eh_proj.weight" in found

    def _spec(self, name: str, shape: tuple[int, ...], found: Mapping[str, TensorSpec]) -> TensorSpec:
        dtypes = {found[piece.theirs].dtype: piece.theirs for piece in self._pieces[name]}
        if len(dtypes) > 1:
            kinds = " and ".join(f"{theirs} of {dtype}" for dtype, theirs in dtypes.items())
            raise ValueError(
                f"tensors {kinds} belong to one layer's experts or projections, which have one dtype here; save the "
                f"checkpoint in one dtype"
            )
        return TensorSpec(next(iter(dtypes)), shape)

    def _check_one_dtype(self) -> None:
        """Refuses matrices whose products would mix types; norms and routers may be of another."""
        products = {name: spec.dtype for name, spec in self.specs.items() if not _OF_ANY_DTYPE.search(name)}
        first = next(iter(products))
        for name, dtype in products.items():
            if dtype != products[first]:
                kinds = [f"{self._pieces[each][0].theirs} is {str(products[each])[6:]}" for each in (first, name)]
                raise ValueError(
                    f"tensor {' and '.join(kinds)}; wanted one dtype for all but norms and routers: save the "
                    f"checkpoint in one"
                )

    def _check_tied(self) -> None:
        embedding = next(piece.theirs for piece in self._pieces["embed_tokens.weight"])
        first, second = self._checkpoint.read(embedding), self._checkpoint.read(self.names.head)
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise ValueError(
                f"config.json: tie_word_embeddings is true, but the tied weights differ: {self.names.head} is not "
                f"{embedding}; if the head has weights of its own, set tie_word_embeddings: false"
            )
        self.ignored += (self.names.head,)

    def read(self, name: str) -> Tensor:
        """One of our tensors; of stacked experts, read expert by expert.

        Args:
            name: as in `specs`.
        """
        return self._assembled(name, self._checkpoint.read)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of `specs`, one after another; only one is held, and one of theirs that several of ours lie in."""
        read = _Last(self._checkpoint.read)
        for name in self.specs:
            yield name, self._assembled(name, read)

    def _assembled(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        spec, pieces = self.specs[name], self._pieces[name]
        if len(pieces) == 1 and not pieces[0].theirs_at and not pieces[0].ours_at:
            return self._checkpoint.read(pieces[0].theirs)
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for piece in pieces:
            tensor[piece.ours_at or ...] = read(piece.theirs)[piece.theirs_at or ...]
        return tensor


class DecoderWriter:
    """A decoder as a family's published checkpoints have it.

    Args:
        config: of the decoder.
        family: its `model_type`; see `family_configs.family_for`.
        specs: of our tensors; more than the decoder's are not minded.
        names: where the checkpoint has it.
        num_rows: of embedding and head only the first so many go out; None: all.

    Attributes:
        specs: of their tensors, in the dtypes of ours.

    Raises:
        ValueError: a tensor of the decoder is missing in `specs`, or has another shape than `config` says.
    """

    def __init__(
        self,
        config: DecoderConfig,
        family: str,
        specs: Mapping[str, TensorSpec],
        names: Names = DECODER,
        num_rows: int | None = None,
    ):
        layout = decoder_layout(config, family, names, num_rows=num_rows)
        for name, shape in layout.ours.items():
            if name not in specs or specs[name].shape != shape:
                got = f"has the shape {list(specs[name].shape)}" if name in specs else "is missing"
                raise ValueError(f"weight {name} {got}; the decoder's config says {list(shape)}; load the model again")
        self._pieces = layout.by_theirs()
        self._zeros = layout.zeros
        self.specs = {
            name: self._zeros.get(name) or TensorSpec(specs[self._pieces[name][0].ours].dtype, shape)
            for name, shape in layout.theirs.items()
        }

    def tensors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of `specs`, one after another.

        Args:
            read: gives one of our tensors by its name. The last is held while parts of it go out.
        """
        last = _Last(read)
        for name, spec in self.specs.items():
            yield name, self._assembled(spec, self._pieces[name], last)

    def _assembled(self, spec: TensorSpec, pieces: list[Piece], read: Callable[[str], Tensor]) -> Tensor:
        if not pieces:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        first = pieces[0]
        if not first.theirs_at:
            return read(first.ours)[first.ours_at or ...]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for piece in pieces:
            tensor[piece.theirs_at] = read(piece.ours)[piece.ours_at or ...].to("cpu")
        return tensor


class _Last:
    """Reads, and keeps what it read last, until it reads another."""

    def __init__(self, read: Callable[[str], Tensor]):
        self._read = read
        self._name: str | None = None
        self._tensor: Tensor | None = None

    def __call__(self, name: str) -> Tensor:
        if self._tensor is None or self._name != name:
            self._tensor = None  # before the next is in memory
            self._name, self._tensor = name, self._read(name)
        return self._tensor


def _check_sizes(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> None:
    """Refuses numbers that no such checkpoint has, before anything of their size is made."""
    most = max([len(specs), *(size for spec in specs.values() for size in spec.shape)])
    for key in _SIZES:
        value = config.get(key)
        if isinstance(value, int) and value > most:
            raise ValueError(
                f"config.json: {key} is {value}, but the checkpoint has {len(specs)} tensors, of {most} rows at most; "
                f"the two are of different models: copy the checkpoint again"
            )


def _refuse(names: list[str], problem: str, why: str) -> None:
    if names:
        raise ValueError(
            f"the checkpoint {problem} {'tensors' if len(names) > 1 else 'tensor'} {listed(names, 3)}; {why}; the two "
            f"are of different models, or the checkpoint is not whole: copy it again"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        FileNotFoundError: there is no such folder, or none in it.
        ValueError: it is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder of a checkpoint")
    return read_json(folder / "config.json")


def read_decoder(folder: str | Path) -> Decoder:
    """A decoder with the weights of a checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: as `DecoderReader`, or the files are damaged; the message names folder and field or tensor.
    """
    config = read_config(folder)
    try:
        family_of(config)
        reader = DecoderReader(Checkpoint.open(folder), config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return built(reader)


def built(reader: DecoderReader) -> Decoder:
    """The decoder of a checkpoint, each weight in the dtype that it has there."""
    with torch.device("meta"):
        decoder = Decoder(reader.config)
    decoder.to_empty(device="cpu")
    for moe in decoder.expert_layers().values():
        moe.gate.reset_buffers()
    # What the file has in half precision stays so; only Router keeps its bias in float32.
    decoder.load_state_dict(dict(reader.tensors()), assign=True)
    return decoder


def write_decoder(
    decoder: Decoder, folder: str | Path, more: Mapping[str, Any] | None = None, max_positions: int = 32768
) -> str:
    """Writes a decoder as a checkpoint of the family that computes the same: config.json and weights.

    Args:
        decoder: what to write.
        folder: where to.
        more: further fields of config.json, as ids of special tokens; these win.
        max_positions: for config.json.

    Returns:
        The family.

    Raises:
        ValueError: no family computes this decoder; the message names the switch.
    """
    family = family_for(decoder.config)
    state = decoder.state_dict()
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    writer = DecoderWriter(decoder.config, family, specs)
    dtype = decoder.embed_tokens.weight.dtype
    config = family_config(decoder.config, max_positions=max_positions, dtype=dtype) | dict(more or {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_weights(folder, writer.specs, writer.tensors(state.__getitem__))
    return family
