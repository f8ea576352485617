"""`mmllm import`: a checkpoint from elsewhere, given eyes and ears where wanted, as a model folder.

1. config.json is read and what can't be computed refused, before any weight is touched.
2. Its tokenizer stays as it is; our special tokens and the codec's units lie behind its ids.
3. Tower and codec are looked up, and the sizes of what joins them to the decoder follow.
4. The weights pass through, one tensor at a time. Embedding and head grow; projectors are new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from mmllm.checkpoints.card import ModelInfo, model_card
from mmllm.checkpoints.files import CARD, CONFIG, GENERATION, SOURCE, replaced_folder, write_json
from mmllm.checkpoints.folder import folder_config
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.checkpoints.weights import Checkpoint, TensorSpec, write_weights
from mmllm.interop.decoders import DecoderReader, read_config
from mmllm.interop.families import family_of, unread_fields
from mmllm.interop.growth import grown
from mmllm.interop.llava import ImportedLlava, read_llava
from mmllm.interop.tokenizer_files import copy_there
from mmllm.interop.tokenizers import TOKENIZER_FILES, ImportedTokenizer, read_tokenizer
from mmllm.interop.towers import ImportedTower, read_tower
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.config import config_from_dict
from mmllm.model.image_projectors import ImageProjector, ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig, ModelConfig, MultimodalModel
from mmllm.model.vision import VisionTower
from mmllm_tokenizers.audio import AudioTokenizer, load_audio_tokenizer
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.vocab import AUDIO_END, PAD

Read = TypeVar("Read")
SEED = 0
"""Of the projectors, which are new."""
TOWER_REST = "tower"
"""In `source/`: the layers of LLaVA's tower behind the one whose features are taken."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
PART_NAMES = {
    "decoder": "decoder", "vision": "image tower", "image_projector": "image projector",
    "code_embedding": "audio front end", "clip_projector": "audio front end", "unit_projector": "audio front end",
    "pointer": "speech pointer", "ctc_head": "CTC head", "mask_embedding": "word dropout",
}  # fmt: skip
"""What reports call the modules of a model."""


@dataclass(frozen=True)
class ImportOptions:
    """What joins a tower and a codec to a decoder, where the command's user decides it.

    Attributes:
        vision_layer: of the tower whose features are given; -2, as LLaVA takes.
        image_projector: None: LLaVA's, an MLP on every feature, which goes out again as LLaVA.
        audio_projector: keys of `audio.projector`; `pool` follows `audio_pool`.
        loss: weights of losses that need a part of their own (`ctc`, `word_dropout`).
        audio_pool: frames an `<|audio|>` slot.
        pattern: codebook pattern of predicted units.
        num_codebooks: in use; 0: as the codec's folder says.
    """

    vision_layer: int | tuple[int, ...] | str = -2
    image_projector: ImageProjectorConfig | None = None
    audio_projector: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    audio_pool: int = 2
    pattern: str = "delay"
    num_codebooks: int = 0


def read_options(path: str | Path | None) -> ImportOptions:
    """Options from a YAML file; None: as they are by default.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a bad value.
    """
    if path is None:
        return ImportOptions()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return config_from_dict(ImportOptions, values, str(path))


@dataclass
class ImportReport:
    """What came whole, what is new, what was left out.

    Attributes:
        out: the model folder.
        family: the checkpoint's `model_type`.
        whole: of each part the number of tensors that are the checkpoint's own, to the last bit.
        grown: of tensors with rows behind their own, these and the new ones.
        new: of each part the number of tensors that are random.
        left_out: what of the sources isn't used, by name, and why or how much.
        special_tokens: ids of our special tokens.
        shared_tokens: those for which the checkpoint's own are taken.
        num_base_ids: ids of the checkpoint.
        num_ids: all.
        num_units: audio units, fillers included.
        num_parameters: in all.
        dtypes: of each part.
        notes: what else is to be known.
    """

    out: str
    family: str
    whole: dict[str, int]
    grown: dict[str, tuple[int, int]]
    new: dict[str, int]
    left_out: dict[str, str]
    special_tokens: dict[str, int]
    shared_tokens: tuple[str, ...]
    num_base_ids: int
    num_ids: int
    num_units: int
    num_parameters: int
    dtypes: dict[str, str]
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.out}: {self.family}, {self.num_parameters:,} parameters"
        for part, count in self.whole.items():
            yield f"  whole     {part}: {count} tensors of the checkpoint, {self.dtypes[part]}"
        for name, (rows, more) in self.grown.items():
            yield f"  grown     {name}: {rows:,} rows of the checkpoint, {more:,} new"
        for part, count in self.new.items():
            yield f"  new       {part}: {count} tensors"
        for what, why in self.left_out.items():
            yield f"  left out  {what}: {why}"
        shared = f" ({', '.join(self.shared_tokens)}: the checkpoint's own)" if self.shared_tokens else ""
        yield (
            f"  ids       {self.num_base_ids:,} of the checkpoint, "
            f"{len(self.special_tokens) - len(self.shared_tokens)} special tokens{shared}, {self.num_units:,} units"
        )
        yield from (f"  note      {note}" for note in self.notes)


@dataclass
class _Sources:
    """All that is read."""

    family: str
    decoder: DecoderReader
    tokenizer: ImportedTokenizer
    eyes: ImportedTower | ImportedLlava | None
    projector: ImageProjectorConfig
    codec: AudioTokenizer | None
    unread: tuple[str, ...] = ()


def import_model(
    source: str | Path,
    out: str | Path,
    vision: str | None = None,
    codec: str | Path | None = None,
    options: ImportOptions | None = None,
) -> ImportReport:
    """Writes a model folder.

    Args:
        source: folder of a language model, or of LLaVA, as transformers saves it.
        out: the model folder; an older model there is replaced.
        vision: an image tower, as `mmllm.interop.towers.read_tower` takes it.
        codec: folder of an audio tokenizer.
        options: what joins them.

    Raises:
        FileNotFoundError: a folder or file isn't there.
        ValueError: what is there can't be computed, is damaged, or doesn't fit; the message names file and field.
        ModuleNotFoundError: without transformers.
    """
    options = options or ImportOptions()
    folder, directory = Path(source), Path(out)
    sources = _open(folder, vision, codec, options)
    tokenizer, config = _configs(sources, options)
    was_there = directory.is_dir() and any(directory.iterdir())
    transform = None if sources.eyes is None else sources.eyes.transform
    with replaced_folder(directory, sources=_folders(source, vision, codec)) as partial:
        tokenizer.save(partial)
        write_json(partial / CONFIG, folder_config(config, tokenizer, transform))
        write_json(partial / GENERATION, GenerationConfig(max_length=sources.decoder.max_positions).to_dict())
        _keep(folder, partial / SOURCE, sources.eyes)
        specs, tensors, report = _weights(sources, tokenizer, config, str(directory))
        if was_there:
            report.notes += (f"the model that was in {directory} before is replaced",)
        write_weights(partial, specs, tensors)
        with torch.device("meta"):
            model = MultimodalModel(config)
        notes = "\n".join(["Imported:", "", *(f"    {line}" for line in report.lines())])
        (partial / CARD).write_text(model_card(model, tokenizer, ModelInfo(directory.name, notes=notes)), "utf-8")
    return report


def _folders(*sources: str | Path | None) -> list[Path]:
    """What is read that is a folder; a name of open_clip isn't."""
    return [Path(source) for source in sources if source is not None and Path(source).is_dir()]


def _open(folder: Path, vision: str | None, codec: str | Path | None, options: ImportOptions) -> _Sources:
    config = read_config(folder)
    is_llava = config.get("model_type") == "llava"
    if is_llava and vision is not None:
        raise ValueError(f"{folder} has an image tower of its own, and --vision is {vision!r}; leave it out")
    if not is_llava:
        _named(folder, lambda: family_of(config))  # before weights are looked for
    checkpoint = Checkpoint.open(folder)
    llava = read_llava(folder, checkpoint) if is_llava else None
    text, elsewhere = (config, ()) if llava is None else (llava.parts.text_config, llava.elsewhere)
    decoder = _named(folder, lambda: DecoderReader(checkpoint, text, elsewhere))
    image_id = None if llava is None else llava.parts.image_token_id
    tokenizer = read_tokenizer(folder, decoder.config.vocab_size, image_id)
    eyes, projector = llava, ImageProjectorConfig() if llava is None else llava.parts.projector
    if vision is not None:
        eyes = read_tower(vision, options.vision_layer)
        projector = options.image_projector or ImageProjectorConfig(kind="llava")
    audio = None if codec is None else load_audio_tokenizer(codec)
    return _Sources(str(config["model_type"]), decoder, tokenizer, eyes, projector, audio, unread_fields(text))


def _named(folder: Path, read: Callable[[], Read]) -> Read:
    """What is read; an error says of which folder."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _configs(sources: _Sources, options: ImportOptions) -> tuple[TokenizerFolder, ModelConfig]:
    """The tokenizer folder and the model's config, which fit each other."""
    vision, projector, num_slots, size = None, sources.projector, 1, 1
    width = sources.decoder.config.hidden_size
    if sources.eyes is not None:
        vision = sources.eyes.vision
        with torch.device("meta"):
            tower = VisionTower(vision)
            made = ImageProjector(projector, tower.grid, tower.width, width)
        num_slots, size = made.num_tokens, tower.image_size
    folder = TokenizerFolder(
        sources.tokenizer.text,
        sources.codec,
        TokenizerConfig(
            image_tokens=num_slots,
            image_size=size,
            audio_pool=options.audio_pool,
            pattern=options.pattern,
            num_codebooks=options.num_codebooks,
        ),
        sources.tokenizer.templates,
        sources.tokenizer.chat_template,
    )
    audio = None
    if sources.codec is not None:
        vocabulary = folder.vocabulary
        audio = AudioConfig(
            num_codebooks=vocabulary.num_codebooks,
            heard_codebooks=folder.config.heard_codebooks,
            codebook_size=vocabulary.codebook_size,
            codebook_dim=folder.codebooks_KVD.shape[-1],
            projector=config_from_dict(
                AudioProjectorConfig, {**options.audio_projector, "pool": options.audio_pool}, "audio.projector"
            ),
            audio_end_id=folder.id(AUDIO_END),
            pad_id=folder.id(PAD),
        )
    num_rows = sources.decoder.config.vocab_size
    decoder = dataclasses.replace(sources.decoder.config, vocab_size=folder.vocabulary.size, num_base_ids=num_rows)
    return folder, ModelConfig(decoder, vision, projector, audio, options.loss)


def _weights(
    sources: _Sources, folder: TokenizerFolder, config: ModelConfig, out: str
) -> tuple[dict[str, TensorSpec], Iterator[tuple[str, Tensor]], ImportReport]:
    """All tensors of the model, lazily, and what is to be said of them."""
    decoder, num_ids = sources.decoder, config.decoder.vocab_size
    codebooks = folder.codebooks_KVD if config.audio is not None else None
    specs: dict[str, TensorSpec] = {}
    grown_rows: dict[str, tuple[int, int]] = {}
    for name, spec in decoder.specs.items():
        if name in _VOCABULARY:
            grown_rows[name] = spec.shape[0], num_ids - spec.shape[0]
            spec = TensorSpec(spec.dtype, (num_ids, *spec.shape[1:]))
        specs[f"decoder.{name}"] = spec
    if sources.eyes is not None:
        specs |= sources.eyes.specs
    dtype = decoder.specs["embed_tokens.weight"].dtype
    heard = folder.heard_codebooks_KVD if config.audio is not None else None
    fresh = _new_parts(config, heard, dtype, set(specs))
    specs |= {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in fresh.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in decoder.tensors():
            yield f"decoder.{name}", grown(tensor, num_ids, codebooks) if name in _VOCABULARY else tensor
            del tensor
        if sources.eyes is not None:
            yield from sources.eyes.tensors()
        yield from fresh.items()

    return specs, tensors(), _report(sources, folder, config, out, specs, grown_rows, set(fresh))


def _new_parts(
    config: ModelConfig, codebooks_KVD: Tensor | None, dtype: torch.dtype, have: set[str]
) -> dict[str, Tensor]:
    """What no source has, drawn from one seed, in the decoder's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        blind = dataclasses.replace(config, vision=None, image_projector=ImageProjectorConfig())
        model = MultimodalModel(blind, torch.device("meta"))
        if codebooks_KVD is not None:
            model.initialize_audio(codebooks_KVD)
        state = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
        if config.vision is not None and not any(name.startswith("image_projector.") for name in have):
            with torch.device("meta"):
                tower = VisionTower(config.vision)
            projector = ImageProjector(config.image_projector, tower.grid, tower.width, config.decoder.hidden_size)
            state |= {f"image_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _report(
    sources: _Sources,
    folder: TokenizerFolder,
    config: ModelConfig,
    out: str,
    specs: Mapping[str, TensorSpec],
    grown_rows: dict[str, tuple[int, int]],
    fresh: set[str],
) -> ImportReport:
    whole: dict[str, int] = {}
    new: dict[str, int] = {}
    dtypes: dict[str, set[str]] = {}
    for name, spec in specs.items():
        part = PART_NAMES[name.split(".")[0]]
        dtypes.setdefault(part, set()).add(str(spec.dtype).removeprefix("torch."))
        if name in fresh:
            new[part] = new.get(part, 0) + 1
        elif name.removeprefix("decoder.") not in _VOCABULARY:
            whole[part] = whole.get(part, 0) + 1
    left_out = {name: "no part of this decoder" for name in sources.decoder.left_out}
    left_out |= {name: "said by the tokenizer or in config.json already" for name in sources.decoder.ignored}
    left_out |= {what: "not used" for what in sources.tokenizer.left_out}
    notes: tuple[str, ...] = ()
    if sources.unread:
        notes = (
            f"config.json has {', '.join(sources.unread)}, which transformers' {sources.family} doesn't know either",
        )
    if sources.eyes is not None:
        seen = sources.eyes.report
        left_out |= {f"{seen.source} {what}": f"{count} tensors" for what, count in seen.left_out.items()}
        notes += (seen.features, *seen.notes)
    vocabulary = folder.vocabulary
    return ImportReport(
        out=out,
        family=sources.family,
        whole=whole,
        grown=grown_rows,
        new=new,
        left_out=left_out,
        special_tokens=dict(folder.text.special_ids),
        shared_tokens=sources.tokenizer.shared,
        num_base_ids=config.decoder.num_base_ids,
        num_ids=config.decoder.vocab_size,
        num_units=vocabulary.size - vocabulary.num_text,
        num_parameters=sum(spec.num_elements for spec in specs.values()),
        dtypes={part: ", ".join(sorted(found)) for part, found in dtypes.items()},
        notes=notes,
    )


def _keep(folder: Path, kept: Path, eyes: ImportedTower | ImportedLlava | None) -> None:
    """Copies what the checkpoint has beside its weights, and layers of its tower that aren't used."""
    kept.mkdir()
    if isinstance(eyes, ImportedLlava) and eyes.rest:
        (kept / TOWER_REST).mkdir()
        write_weights(kept / TOWER_REST, eyes.rest, ((name, eyes.read_rest(name)) for name in eyes.rest))
    for name in (CONFIG, GENERATION, *PROCESSOR_FILES, *TOKENIZER_FILES):
        copy_there(folder / name, kept / name)
