from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.training.clip_module import ClipModule, load_clip_config, with_text_tokens
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimisers import OptimiserConfig
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.training_fixtures import CLIP_CONFIG, ListData, quiet_trainer

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def _tokenizer(folder: Path) -> TokenizerFolder:
    tokenizer = TokenizerFolder(TextTokenizer.train(COLOURS, 280))
    tokenizer.save(folder)
    return tokenizer


def _batch(tokenizer: TokenizerFolder, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, tokens = [], []
    for name, colour in COLOURS.items():
        noise = torch.randint(-40, 40, (3, 16, 16), generator=generator)
        images.append((torch.tensor(colour).view(3, 1, 1) + noise).clamp(0, 255).to(torch.uint8))
        ids = [*tokenizer.text.encode(name), tokenizer.id("<|end|>")]
        tokens.append(torch.tensor(ids + [0] * (8 - len(ids))))
    return torch.stack(images), torch.stack(tokens)


def test_clip_learns_colours_and_its_tower_goes_to_the_decoder(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    module = ClipModule(
        VisionConfig(CLIP_CONFIG), str(tmp_path / "tokenizer"), OptimiserConfig(lr=3e-3), out=str(tmp_path / "clip")
    )
    data = ListData([_batch(tokenizer, seed) for seed in range(30)])
    with quiet_lightning():
        quiet_trainer(max_steps=30).fit(module, datamodule=data)
    module.eval()
    with torch.no_grad():
        image_NC, text_NC, scale = module._features(_batch(tokenizer, 99))
    assert (image_NC @ text_NC.T).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert 1 <= float(scale) <= 100.001

    config = load_clip_config(tmp_path / "clip", VisionConfig(CLIP_CONFIG, layer=0, trainable=False))
    assert (config.layer, config.trainable) == (0, False)
    tower = VisionTower(config)
    tower.load_pretrained()
    expected = VisionTower(config).from_clip(module.clip)
    images = _batch(tokenizer, 5)[0]
    assert torch.equal(tower.eval()(images), expected.eval()(images))


def test_the_text_tower_takes_the_tokenizer() -> None:
    config = with_text_tokens(VisionConfig(CLIP_CONFIG), 300, end_id=1, pad_id=0).open_clip
    assert isinstance(config, dict)
    text = config["text_cfg"]
    assert (text["vocab_size"], text["pool_type"], text["eos_id"], text["pad_id"]) == (300, "eos", 1, 0)
    assert CLIP_CONFIG["text_cfg"]["vocab_size"] == 40, "the given config is left alone"


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-Z-99"):
        with_text_tokens(VisionConfig("ViT-Z-99"), 300, 1, 0)
    with pytest.raises(FileNotFoundError, match=r"lacks config.json"):
        load_clip_config(tmp_path, None)
