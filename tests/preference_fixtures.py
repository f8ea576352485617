"""A tiny text model in its folder, and files of pairs, for the tests of preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmllm.checkpoints.folder import save_model
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.posttraining.preference_module import PreferenceConfig, PreferenceModule
from tests.inference_fixtures import make_tokenizer
from tests.training_fixtures import LossRecorder, quiet_trainer

WORDS = ["a", "red", "circle", "above", "two", "blue", "squares", "he", "said", "one", "two", "three"]
RATES = OptimizerConfig(lr=3e-3, warmup=0.0, min_lr_ratio=1.0)


def text_model(folder: Path, seed: int = 1) -> Path:
    """Dense, of text alone."""
    tokenizer = make_tokenizer(sound=False)
    torch.manual_seed(seed)
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocabulary.size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    model = MultimodalModel(ModelConfig(decoder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    save_model(folder, model, tokenizer)
    return folder


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(number: int) -> dict[str, Any]:
    """Short answers are preferred to long ones; lengths differ."""
    first, second = WORDS[number % 12], WORDS[(number * 5 + 3) % 12]
    prompt = [message("user", f"{first} {second} {number}")]
    if number % 3 == 0:
        prompt = [message("user", first), message("assistant", "he said"), message("user", second)]
    chosen, rejected = f"{second} {number}", f"{first} and {second} and " * (1 + number % 2) + str(number)
    return {"prompt": prompt, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_file(folder: Path, count: int = 12) -> Path:
    return write_rows(folder / "pairs.jsonl", [pair(number) for number in range(count)])


def make_data(pairs: Path, model: Path, **settings: Any) -> PreferenceDataModule:
    return PreferenceDataModule(**{"batch_size": 4, "sequence_length": 64, "pairs": str(pairs), "tokenizer": str(model),
                                   **settings})  # fmt: skip


def make_module(model: Path, preference: PreferenceConfig | None = None, **settings: Any) -> PreferenceModule:
    torch.manual_seed(0)
    return PreferenceModule(preference, **{"init_from": str(model), "optimizer": RATES, **settings})


def fit(module: Any, data: PreferenceDataModule, steps: int, *callbacks: Any, ckpt: Any = None, **settings: Any) -> Any:
    """The losses of each batch, and the trainer."""
    from mmllm.training.lightning_cli import quiet_lightning

    recorder = LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(recorder, *callbacks, max_steps=steps, **settings)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder.losses, trainer
