"""The stages of a run, in order and in one place; a run has those that its rows and preset need.

    demo data*  split  text tokenizer  align*  sound shards*  codec*  tokenizer  shards  index  decoder
    evaluations  report

* where they are needed. With `--minutes`, a training before the decoder gets its share of what is left when it begins,
and the decoder what is left then: a stage that a run does without leaves its time to those behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmllm.quickstart.budget import ALIGN_SHARE, CODEC_SHARE
from mmllm.quickstart.plan import RELATION_WEIGHT, RELATION_WORDS, Choices, Contents, stage_config
from mmllm.quickstart.presets import Preset

CODEC_COPIES = 3
"""Altered copies of each sound, at most, from which the codec learns voices other than the few that there are."""
FEW_CAPTIONS = 10_000
"""Of fewer pictures, smaller parts are cut out, so that they look different each time."""
ALIGNED = "aligned"
"""The folder of manifests with word times, and of the aligner."""


@dataclass(frozen=True)
class Step:
    """A stage before the evaluations.

    Attributes:
        name: of the stage.
        command: of `mmllm`, without its name.
        training: `codec` or `decoder`: the stage is a `fit`, whose config is written when it begins.
        overrides: of that config; see `plan.stage_config`.
        share: of the time that is left when it begins, with `--minutes`; None: a training takes all of it, and any
            other command as long as it takes.
        num_threads: it runs in a process of its own with so many; 0: with all, in the one that short commands share.
    """

    name: str
    command: tuple[str, ...] = ()
    training: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    num_threads: int = 0


@dataclass(frozen=True)
class StageList:
    """What the stages depend on.

    Attributes:
        out: the run's folder.
        contents: what the training rows hold.
        choices: sizes.
        preset: of the run.
        seed: of data, order and weights.
        num_workers: processes that build.
        bad_rows: the option that bounds unusable rows, where it was given.
    """

    out: Path
    contents: Contents
    choices: Choices
    preset: Preset
    seed: int
    num_workers: int
    bad_rows: tuple[str, ...] = ()

    def steps(self) -> list[Step]:
        """All that a run goes through between its manifests and its trained model."""
        has_sounds = self.contents.has_sounds
        return [
            self._text_tokenizer(),
            *([self._align()] if self.choices.align and has_sounds else []),
            *(self._codec() if has_sounds else []),
            self._tokenizer(),
            self._shards(),
            self._index(),
            self._decoder(),
        ]

    # ------------------------------------------------------------------------------------------------ data and tokens
    def _manifests(self) -> dict[str, Path]:
        """Of the training rows, by kind."""
        return {kind: self.out / "manifests" / f"train-{kind}.jsonl" for kind in self.contents.kinds}

    def _shape(self) -> list[str]:
        choices = self.choices
        return ["--image_tokens", str(choices.image_tokens), "--image_size", str(choices.image_size),
                "--audio_pool", str(choices.audio_pool)]  # fmt: skip

    def _text_tokenizer(self) -> Step:
        return _step("text tokenizer", "tokenizer", "train-text", *self._manifests().values(), "--vocab_size",
                     self.choices.vocab_size, "--out", self.out / "text_tokenizer", *self._shape())  # fmt: skip

    def _align(self) -> Step:
        """Word times of speech, and the aligner that tells them, which judges what is spoken too."""
        command = ("data", "align", self._manifests()["audio"], "--out", self.out / ALIGNED, "--seed", self.seed)
        return replace(_step("align", *command, share=ALIGN_SHARE), num_threads=1)  # so small a network is not shared

    def _codec(self) -> list[Step]:
        if self.preset.codec is not None:
            return [_step("codec", "tokenizer", "encodec", self.preset.codec, "--out", self.out / "codec")]
        manifest = self._manifests()["audio"]
        copies = min(self.choices.perturb, CODEC_COPIES)
        perturb = ["--perturb", copies, "--seed", self.seed] if copies else []
        shards = _step("sound shards", "data", "build", manifest, "--out", self.out / "shards" / "sound", *perturb,
                       "--workers", self.num_workers, *self.bad_rows)  # fmt: skip
        overrides: dict[str, Any] = {"data.init_args.seed": self.seed}
        if self.choices.heard_codebooks:
            codec = stage_config("codec", self.out, {})["model"]["init_args"]["codec"]
            overrides["model.init_args.codec.spoken_codebooks"] = codec["num_codebooks"]
            overrides["model.init_args.codec.num_codebooks"] = self.choices.heard_codebooks
        return [shards, _fit("codec", overrides, CODEC_SHARE)]

    def _tokenizer(self) -> Step:
        codec = ["--codec", self.out / "codec"] if self.contents.has_sounds else []
        pointer = ["--pointer", self.choices.pointer] if self.choices.pointer and codec else []
        return _step("tokenizer", "tokenizer", "assemble", "--text", self.out / "text_tokenizer", *codec, "--out",
                     self.out / "tokenizer", *self._shape(), *pointer)  # fmt: skip

    def _shards(self) -> Step:
        perturb = ["--perturb", self.choices.perturb] if self.choices.perturb else []
        manifests = self._manifests()
        if self.choices.align and "audio" in manifests:
            manifests["audio"] = self.out / ALIGNED / "train-audio.jsonl"
        return _step("shards", "data", "build", *manifests.values(), "--out", self.out / "shards" / "train",
                     "--tokenizer", self.out / "tokenizer", *perturb, "--seed", self.seed, "--workers",
                     self.num_workers, *self.bad_rows)  # fmt: skip

    def _index(self) -> Step:
        return _step("index", "data", "index", self.out / "shards" / "train", "--tokenizer", self.out / "tokenizer")

    # ------------------------------------------------------------------------------------------------------- training
    def _pictures(self) -> dict[str, Any]:
        """How pictures are altered."""
        is_few = self.contents.num_captions < FEW_CAPTIONS
        return {
            "data.init_args.min_scale": 0.6 if is_few else 0.85,
            "data.init_args.flip": not self.contents.names_sides,
        }

    def _decoder(self) -> Step:
        contents = self.contents
        overrides: dict[str, Any] = {
            **{f"model.init_args.decoder.{key}": value for key, value in self.choices.decoder.items()},
            "data.init_args.batch_size": self.choices.batch_size,
            **self._pictures(),
        }
        if contents.has_plain and "caption" in contents.kinds:
            overrides["model.init_args.loss.word_weights"] = dict.fromkeys(RELATION_WORDS, RELATION_WEIGHT)
        if not contents.has_images:
            overrides["model.init_args.vision"] = overrides["model.init_args.image_projector"] = None
        if not contents.has_sounds:
            overrides["model.init_args.audio"] = overrides["model.init_args.loss.codebook_weights"] = None
        return _fit("decoder", overrides, None)

    # ----------------------------------------------------------------------------------------------------- evaluation
    def evaluation(self, task: str, limit: int | None) -> Step:
        """A task's evaluation, of so many rows of each set at most."""
        options: list[object] = ["--sequence_length", self.choices.sequence_length] if task == "text" else []
        if task == "speak" and self.choices.align:
            options += ["--judge", self.out / ALIGNED / "aligner"]
        if limit is not None:
            options += ["--limit", limit]
        return _step(f"eval {task}", "eval", "--model", self.out / "model", "--task", task, "--manifest",
                     self.out / "manifests" / "test.jsonl", "--json", self.out / "eval" / f"{task}.json", *options,
                     *self.bad_rows)  # fmt: skip


def demo_data(out: Path, share: float, seed: int, num_workers: int) -> Step:
    """Makes the demo's rows."""
    shares = ["--share", share] if share != 1 else []
    return _step("demo data", "demo-data", "--out", out / "data", "--seed", seed, *shares, "--workers", num_workers)


def split(out: Path, settings: Mapping[str, Any], train: Sequence[str], test: Sequence[str]) -> Step:
    """Parts rows of any form into manifests of training, validation and test."""
    command: list[object] = ["data", "split", *train]
    for manifest in test:
        command += ["--test", manifest]
    if settings["holdout"] is not None:
        command += ["--holdout", settings["holdout"]]
    for key in ("format", "media"):
        if key in settings:
            command += [f"--{key}", settings[key]]
    for item in settings.get("columns", ()):
        command += ["--columns", item]
    return _step("split", *command, "--out", out / "manifests", "--seed", settings["seed"], *bad_rows(settings))


def bad_rows(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The option that bounds unusable rows, where it was given."""
    bound = settings["max_bad_fraction"]
    return () if bound is None else ("--max_bad_fraction", str(bound))


def _step(name: str, *command: object, share: float | None = None) -> Step:
    return Step(name, tuple(str(word) for word in command), share=share)


def _fit(stage: str, overrides: Mapping[str, Any], share: float | None) -> Step:
    return Step(f"fit {stage}", training=stage, overrides=overrides, share=share)
