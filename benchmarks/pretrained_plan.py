"""What `pretrained.py` trains, and for how long: folders, shares of the time, recipes, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.quickstart.plan import stage_config, write_yaml

SECONDS_SHARE = {"text_model": 0.11, "codec": 0.06, "clip": 0.07, "aligned": 0.1, "adapted": 0.18}
"""Of all minutes, what each training may take. From nothing takes as long as alignment and adapters together; what is
left is for data, evaluation and the starts of processes."""
DATA_SHARE, TRYOUT_DATA_SHARE = 0.5, 0.006
"""Of the demo's rows."""
NUM_EVALUATED, TRYOUT_EVALUATED = 200, 4
IMAGE_SIZE, PATCH_SIZE, CLIP_CONTEXT = 64, 16, 48
TOWER = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "layers": 5, "width": 256, "head_width": 64}
"""A ViT, which can go out as LLaVA. Its last layer but one is seen, as LLaVA's is: four layers."""
CLIP_IDS = 512
SEQUENCE, BATCH = 512, 8
PARTS = {
    "vision_layer": -2,
    "audio_pool": 2,
    "audio_projector": {
        "kind": "conv", "num_hidden_layers": 3, "spectrum": 40, "clip_norm": True, "range_db": 30, "dropout": 0.1,
        "frame_mask": 0.1, "mask_span": 5, "warp": 0.15, "band_mask": 8,
    },
    "loss": {"ctc": 0.3, "units": 0.5},
}  # fmt: skip
ADAPTER = {"parts": ["attention", "experts"], "r": 32, "lora_alpha": 64}
NAME = "senses"
"""Of the adapter."""
WEIGHTS = {
    "aligned": {"caption": 0.55, "heard": 0.35, "spoken": 0.10},
    "adapted": {"caption": 0.45, "heard": 0.30, "text": 0.25},
}
"""Shares of tokens. A frozen language model learns nothing from text; an adapted one would unlearn it without."""
RATES = {
    "aligned": {
        "image_tower": 3e-3, "image_projector": 6e-3, "audio_front_end": 6e-3, "unit_embedding": 6e-3,
        "text_embedding": 0.0, "attention": 0.0, "experts": 0.0,
    },
    "adapted": {
        "adapter": 6e-3, "image_tower": 3e-3, "image_projector": 3e-3, "audio_front_end": 3e-3, "unit_embedding": 3e-3,
    },
    "from_nothing": {"image_tower": 3e-3},
}  # fmt: skip
"""Peak rates of parts. The tower goes on learning: two minutes of CLIP are few for a ViT, which isn't told what is near
what. What `adapted` doesn't name is frozen."""
PEAK_LR = 6e-3


@dataclass(frozen=True)
class Plan:
    """One run."""

    out: Path
    minutes: float
    max_steps: int | None
    """Of each training, whatever the minutes: a try-out, with few rows."""
    seed: int
    num_ranks: int

    def path(self, name: str) -> Path:
        """A file or folder of the run."""
        return self.out / name

    @property
    def data_share(self) -> float:
        """Of the demo's rows."""
        return DATA_SHARE if self.max_steps is None else TRYOUT_DATA_SHARE

    @property
    def num_evaluated(self) -> int:
        """Rows of each task."""
        return NUM_EVALUATED if self.max_steps is None else TRYOUT_EVALUATED

    def seconds(self, training: str) -> float:
        """How long a training takes."""
        if training == "from_nothing":
            return self.seconds("aligned") + self.seconds("adapted")
        return round(60 * self.minutes * SECONDS_SHARE[training], 1)

    # --- configs ------------------------------------------------------------------------------------------------

    def write_configs(self) -> None:
        """Writes what `mmllm fit` and `mmllm import` are told, and the recipes."""
        self._write("parts", PARTS, "What joins tower and codec to the language model: mmllm import --parts")
        self._write("codec", self._stage("codec", self._codec()), _run_again("codec"))
        self._write("clip", self._stage("clip", self._tower()), _run_again("clip"))
        for name, weights in {**WEIGHTS, "from_nothing": self._both()}.items():
            self._write(f"{name}_recipe", self._recipe(weights), f"See: mmllm data show --recipe {name}_recipe.yaml")
            self._write(name, self._decoder(name), _run_again(name))

    def config(self, name: str) -> Path:
        """Where a config lies."""
        return self.out / "configs" / f"{name}.yaml"

    def _write(self, name: str, values: Mapping[str, Any], header: str) -> None:
        plain = json.loads(json.dumps(values))  # YAML's anchors for what stands in two places are hard to read
        write_yaml(self.config(name), plain, header)

    def _trainer(self, name: str) -> dict[str, Any]:
        """Keys of `trainer` that all trainings share."""
        logger = {"save_dir": str(self.path("logs")), "name": name, "version": "", "flush_logs_every_n_steps": 1}
        checkpoints = {"dirpath": str(self.path(f"checkpoints/{name}")), "save_last": True, "save_top_k": 0}
        return {
            "accelerator": "cpu",
            "devices": self.num_ranks,
            "strategy": "ddp" if self.num_ranks > 1 else "auto",
            "precision": "32-true",
            "max_steps": -1 if self.max_steps is None else self.max_steps,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 20 if self.max_steps is None else 1,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}],
            "callbacks": [
                {"class_path": "mmllm.training.progress.Progress"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
            ],
        }

    def _max_seconds(self, name: str) -> float | None:
        return self.seconds(name) if self.max_steps is None else None

    def _stage(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Quickstart's config of the codec or of CLIP, with this run's folder and length."""
        length = {"seed_everything": self.seed, "model.init_args.max_seconds": self._max_seconds(name)}
        config = stage_config(name, self.out, {**length, **overrides})
        config["trainer"] = self._trainer(name)
        return config

    def _codec(self) -> dict[str, Any]:
        return {"data.init_args.shards": str(self.path("shards/first/audio-*.tar")), "data.init_args.seed": self.seed}

    def _tower(self) -> dict[str, Any]:
        tokenizer = str(self.path("clip_tokenizer"))
        return {
            "model.init_args.tokenizer": tokenizer,
            "model.init_args.clip.norm": "batch",  # a ViT has LayerNorm
            "model.init_args.clip.open_clip.vision_cfg": TOWER,
            "data.init_args.tokenizer": tokenizer,
            "data.init_args.shards": str(self.path("shards/first/caption-*.tar")),
            "data.init_args.min_scale": 0.85,
            "data.init_args.seed": self.seed,
        }

    def _both(self) -> dict[str, float]:
        """The shares of the two stages together, by their seconds."""
        part = {name: self.seconds(name) / self.seconds("from_nothing") for name in WEIGHTS}
        sources = list(dict.fromkeys(source for weights in WEIGHTS.values() for source in weights))
        return {
            source: round(sum(part[name] * weights.get(source, 0.0) for name, weights in WEIGHTS.items()), 4)
            for source in sources
        }

    def _recipe(self, weights: Mapping[str, float]) -> dict[str, Any]:
        shards = self.path("shards/train")
        kinds = {
            "caption": {"kind": "caption", "shards": f"{shards}/caption-*.tar"},
            "heard": {"kind": "audio", "shards": f"{shards}/audio-*.tar", "tasks": ["transcribe"]},
            "spoken": {"kind": "audio", "shards": f"{shards}/audio-*.tar", "tasks": ["speak"]},
            "text": {"kind": "text", "shards": f"{shards}/text-*.tar"},
        }
        return {
            "seed": self.seed,
            "tokenizer": str(self.path("imported")),
            "sequence_length": SEQUENCE,
            "mixture": {"unit": "tokens", "on_exhausted": "repeat"},
            "sources": [{"name": name, **kinds[name], "weight": weight} for name, weight in weights.items()],
            "packing": {"algorithm": "best_fit", "window": 1024, "long_documents": "split"},
        }

    def _decoder(self, name: str) -> dict[str, Any]:
        """A training of the multimodal model; keys that aren't here are those of the folder that it starts from."""
        decay = 0.0 if name == "adapted" else 0.05
        model: dict[str, Any] = {
            "init_from": str(self.path("aligned" if name == "adapted" else "imported")),
            "out": str(self.path(name)),
            "name": f"pretrained, {name}",
            "max_seconds": self._max_seconds(name),
            "optimizer": {"lr": PEAK_LR, "parts": RATES[name], "weight_decay": decay, "warmup": 0.05, "muon": True},
        }
        if name == "adapted":
            model |= {"adapter": ADAPTER, "adapter_name": NAME}
        if name == "from_nothing":
            model["init_parts"] = ["image_tower"]  # the same shape and tower, and nothing of the language model
        return {
            "seed_everything": self.seed,
            "trainer": self._trainer(name),
            "model": {"class_path": "mmllm.training.decoder_module.DecoderModule", "init_args": model},
            "data": {
                "class_path": "mmllm.data.loading.datamodules.PackedDataModule",
                "init_args": {
                    "recipe": str(self.config(f"{name}_recipe")), "batch_size": BATCH, "min_scale": 0.85,
                },
            },
        }  # fmt: skip


def _run_again(name: str) -> str:
    return f"Written by `make pretrained`. Run again: mmllm fit -c {name}.yaml --overwrite"
