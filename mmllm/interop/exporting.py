"""`mmllm export`: a model folder as a checkpoint that transformers and vLLM load without any code of ours.

What was imported goes out as it came: files that nothing here has changed are copied to the letter, and weights that
were not trained are the checkpoint's own to the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mmllm.checkpoints.adapters import saved_adapters
from mmllm.checkpoints.files import SOURCE, read_json, replaced_folder, write_json
from mmllm.checkpoints.folder import FolderParts, read_folder
from mmllm.checkpoints.weights import Checkpoint, TensorSpec, write_weights
from mmllm.interop.decoder_names import DECODER, LLAVA
from mmllm.interop.decoders import TOKENIZER_KEY, DecoderWriter
from mmllm.interop.families import decoder_config, family_of
from mmllm.interop.family_configs import family_config, family_for
from mmllm.interop.importing import PART_NAMES, PROCESSOR_FILES, TOWER_REST
from mmllm.interop.llava import llava_parts
from mmllm.interop.llava_export import LlavaWriter, check_llava
from mmllm.interop.tokenizer_files import GENERATION, copy_there, text_ids, write_tokenizer
from mmllm.model.decoder_config import DecoderConfig
from mmllm_tokenizers.vocab import IMAGE, SPECIAL_TOKENS

Format = Literal["auto", "decoder", "llava"]
MAX_POSITIONS = 32768
"""Of a decoder that was trained here, whose positions have no end."""
_OF_TRAINING = (
    "vocab_size", "num_base_ids", "dropout", "gradient_checkpointing", "attention_backend", "mod_predictor_coef",
)  # fmt: skip
"""What of a decoder's config doesn't change its function."""


@dataclass
class ExportReport:
    """What went out, and what stayed behind.

    Attributes:
        out: the checkpoint.
        format: "decoder" or "llava".
        family: `model_type`.
        num_tensors: in the checkpoint.
        num_rows: of embedding and head.
        left_behind: what has no form there, by name, and why or how much.
        notes: what else is to be known.
    """

    out: str
    format: str
    family: str
    num_tensors: int
    num_rows: int
    left_behind: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.out}: {self.family}, {self.num_tensors} tensors, {self.num_rows:,} ids"
        for what, why in self.left_behind.items():
            yield f"  left behind  {what}: {why}"
        yield from (f"  note         {note}" for note in self.notes)


def export_model(
    model_dir: str | Path, out: str | Path, format: Format = "auto", keep_added: bool = False
) -> ExportReport:
    """Writes a checkpoint.

    Args:
        model_dir: model folder.
        out: folder of the checkpoint; an older checkpoint there is replaced.
        format: the decoder alone in its family's form; "llava": with pictures, as `LlavaForConditionalGeneration`;
            "auto": with pictures where that form fits.
        keep_added: also the ids that an import added: our special tokens, and audio units.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no family of transformers computes this decoder, or the model isn't one of LLaVA's form; the
            message names the switch.
    """
    model = read_folder(model_dir)
    source = Path(model_dir) / SOURCE
    exporter = _Exporter(model, source if source.is_dir() else None, keep_added, saved_adapters(model_dir))
    kind, why = exporter.format(format)
    was_there = Path(out).is_dir() and any(Path(out).iterdir())
    with replaced_folder(Path(out), "checkpoint", [Path(model_dir)]) as partial:
        report = exporter.llava(partial, str(out)) if kind == "llava" else exporter.decoder(partial, str(out), why)
    if was_there:
        report.notes += (f"the checkpoint that was in {out} before is replaced",)
    return report


class _Exporter:
    """One model on its way out."""

    def __init__(self, model: FolderParts, source: Path | None, keep_added: bool, adapters: list[str]):
        self.model, self.source, self.keep_added, self.adapters = model, source, keep_added, adapters
        self.config = model.config.decoder
        self.checkpoint = model.checkpoint
        self.foreign = read_json(source / "config.json") if source is not None else None
        self.is_llava = self.foreign is not None and self.foreign.get("model_type") == "llava"

    def format(self, wanted: Format) -> tuple[str, str]:
        """The format, and where it isn't LLaVA's why not."""
        if wanted == "decoder":
            return "decoder", "--format decoder"
        try:
            check_llava(self.model.config)
        except ValueError as error:
            if wanted == "llava":
                raise
            return "decoder", str(error)
        return "llava", ""

    def num_rows(self, needs_image: bool = False) -> int:
        """Of embedding and head that go out."""
        if self.keep_added:
            return self.config.vocab_size
        base = self.config.num_base_ids or self.model.config.num_text
        image = self.model.tokenizer.id(IMAGE)
        return max(base, image + 1) if needs_image else base

    def decoder(self, folder: Path, out: str, why: str) -> ExportReport:
        """The decoder in its family's form."""
        num_rows = self.num_rows()
        family, values, is_own = self._config(num_rows)
        writer = DecoderWriter(self.config, family, self._decoder_specs(), DECODER, num_rows)
        write_weights(folder, writer.specs, writer.tensors(lambda name: self.checkpoint.read(f"decoder.{name}")))
        if is_own and self.source is not None and not self.is_llava:
            copy_there(self.source / "config.json", folder / "config.json")
        else:
            write_json(folder / "config.json", values)
        self._write_text(folder, num_rows)
        left = self._left_behind(num_rows)
        if "image tower" in left:
            left["image tower"] += f"; {why}"
        return ExportReport(out, "decoder", family, len(writer.specs), num_rows, left, self._notes())

    def llava(self, folder: Path, out: str) -> ExportReport:
        """The model with its pictures."""
        num_rows = self.num_rows(needs_image=True)
        family, values, is_own = self._config(num_rows)
        assert self.model.image_transform is not None
        base = self.foreign if self.is_llava else None
        rest = self._rest()
        pictures = LlavaWriter(
            self.model.config,
            self.checkpoint.specs,
            self.model.image_transform,
            base["text_config"] if base is not None and is_own else values,
            self.model.tokenizer.id(IMAGE),
            None if rest is None else rest.specs,
            base,
        )
        text = DecoderWriter(self.config, family, self._decoder_specs(), LLAVA, num_rows)
        specs = {**text.specs, **pictures.specs}
        read = self.checkpoint.read
        decoder = text.tensors(lambda name: read(f"decoder.{name}"))
        tensors = itertools.chain(decoder, pictures.tensors(read, None if rest is None else rest.read))
        write_weights(folder, specs, tensors)
        if self.source is not None and base is not None and pictures.config == base:
            for name in ("config.json", *PROCESSOR_FILES):
                copy_there(self.source / name, folder / name)
        else:
            write_json(folder / "config.json", pictures.config)
            image_token = self.model.tokenizer.text.token(self.model.tokenizer.id(IMAGE))
            write_json(folder / "processor_config.json", {**pictures.processor, "image_token": image_token})
        self._write_text(folder, num_rows)
        left = self._left_behind(num_rows, ("vision", "image_projector"))
        notes = (*self._notes(), *pictures.notes)
        seeing, speaking = (_dtypes(self.checkpoint.specs, part) for part in ("vision.", "decoder."))
        if seeing - speaking:
            notes += (
                f"the image tower is {', '.join(sorted(seeing))} in the files; transformers loads all in the "
                f"decoder's dtype, unless it is given dtype",
            )
        return ExportReport(out, "llava", "llava", len(specs), num_rows, left, notes)

    def _notes(self) -> tuple[str, ...]:
        """Whether the decoder has another dtype than it came with: training has all of a model in float32."""
        text = {**(self.foreign or {}), **(self._foreign_text() or {})}
        told = text.get("dtype", text.get("torch_dtype"))
        dtype = _name(self.checkpoint.specs["decoder.embed_tokens.weight"].dtype)
        return () if told in (None, dtype) else (f"weights are {dtype}; those that were imported were {told}",)

    def _rest(self) -> Checkpoint | None:
        """Layers of an imported LLaVA's tower that aren't used here."""
        folder = None if self.source is None else self.source / TOWER_REST
        return Checkpoint.open(folder) if folder is not None and folder.is_dir() else None

    def _decoder_specs(self) -> dict[str, TensorSpec]:
        specs = self.checkpoint.specs
        return {name.removeprefix("decoder."): spec for name, spec in specs.items() if name.startswith("decoder.")}

    def _config(self, num_rows: int) -> tuple[str, dict[str, Any], bool]:
        """The family, its config.json, and whether that is the imported checkpoint's own, to the letter."""
        dtype = self.checkpoint.specs["decoder.embed_tokens.weight"].dtype
        text = self._foreign_text()
        if text is not None and _computes(text, self.config):
            values = dict(text)
            told = values.get("dtype", values.get("torch_dtype"))
            is_own = values.get("vocab_size", self.config.num_base_ids) == num_rows
            if told not in (None, _name(dtype)):
                is_own = False
                values["dtype"] = _name(dtype)
                values.pop("torch_dtype", None)
            values["vocab_size"] = num_rows
            family = family_of(values)
            if "architectures" not in values:
                values["architectures"] = family_config(self.config, family)["architectures"]
            return family, values, is_own
        family = family_for(self.config)
        positions = (text or {}).get("max_position_embeddings", MAX_POSITIONS)
        values = family_config(self.config, family, positions, dtype, num_rows)
        values |= self._ids(text)
        if self.config.num_base_ids == 0:
            values[TOKENIZER_KEY] = self.model.tokenizer.hash
        return family, values, False

    def _foreign_text(self) -> dict[str, Any] | None:
        if self.foreign is None:
            return None
        if not self.is_llava:
            return self.foreign
        return llava_parts(Path("config.json"), self.foreign).text_config

    def _ids(self, text: Mapping[str, Any] | None) -> dict[str, Any]:
        """Ids of special tokens in config.json."""
        if text is not None:
            return {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
        return text_ids(self.model.tokenizer)

    def _write_text(self, folder: Path, num_rows: int) -> None:
        """Tokenizer and generation config."""
        write_tokenizer(self.model.tokenizer, self.source, folder, num_rows)
        if self.source is not None:
            copy_there(self.source / GENERATION, folder / GENERATION)
            return
        write_json(folder / GENERATION, {**text_ids(self.model.tokenizer), "do_sample": False})

    def _left_behind(self, num_rows: int, taken: tuple[str, ...] = ()) -> dict[str, str]:
        left: dict[str, int] = {}
        for name in self.checkpoint.specs:
            part = name.split(".")[0]
            if part != "decoder" and part not in taken:
                left[PART_NAMES[part]] = left.get(PART_NAMES[part], 0) + 1
        found = {part: f"{count} tensors" for part, count in left.items()}
        tokenizer, config = self.model.tokenizer, self.model.config
        special = [name for name in SPECIAL_TOKENS if tokenizer.id(name) >= num_rows]
        if special:
            found["special tokens"] = f"{len(special)} ids ({', '.join(special[:3])}, …); --keep_added takes them along"
        if config.decoder.vocab_size > max(num_rows, config.num_text):
            units = config.decoder.vocab_size - config.num_text
            found["audio units"] = f"{units} ids; --keep_added takes them along"
        if self.adapters:
            found["adapters"] = f"{', '.join(self.adapters)}; `mmllm adapter merge` first, or `mmllm adapter export`"
        if tokenizer.config.codec is not None:
            found["codec"] = "transformers has none of its kind"
        return found


def _computes(text: Mapping[str, Any], config: DecoderConfig) -> bool:
    """Whether a config.json still describes the decoder, which may have been changed since it was imported."""
    found = decoder_config(text)
    plain = {name: getattr(DecoderConfig(vocab_size=1), name) for name in _OF_TRAINING}
    alike = [dataclasses.replace(each, **plain, moe=_routing(each)) for each in (found, config)]
    return alike[0] == alike[1]


def _routing(config: DecoderConfig) -> Any:
    """The experts without what is of training alone."""
    if config.moe is None:
        return None
    losses = ("router_aux_loss_coef", "router_z_loss_coef", "local_entropy_loss_coef", "global_entropy_loss_coef")
    noise = ("router_jitter_noise", "expert_dropout")
    plain: dict[str, Any] = {name: 0.0 for name in (*losses, *noise)}
    plain |= {"aux_loss_scope": "layer", "bias_update_speed": 0.001, "backend": "auto"}
    return dataclasses.replace(config.moe, **plain)


def _dtypes(specs: Mapping[str, TensorSpec], part: str) -> set[str]:
    return {_name(spec.dtype) for name, spec in specs.items() if name.startswith(part)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
