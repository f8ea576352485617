from __future__ import annotations

import dataclasses
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from mmllm.batch import CaptionBatch
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.training.clip_module import ClipModule, contrastive_loss, load_clip_config, save_clip, with_text_tokens
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.training_fixtures import CLIP_CONFIG, ListData, LossRecorder, fit_rank, quiet_trainer, run_two_ranks

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def _tokenizer(folder: Path) -> TokenizerFolder:
    tokenizer = TokenizerFolder(TextTokenizer.train(COLORS, 280))
    tokenizer.save(folder)
    return tokenizer


def _batch(tokenizer: TokenizerFolder, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, tokens = [], []
    for name, colour in COLORS.items():
        noise = torch.randint(-40, 40, (3, 16, 16), generator=generator)
        images.append((torch.tensor(colour).view(3, 1, 1) + noise).clamp(0, 255).to(torch.uint8))
        ids = [*tokenizer.text.encode(name), tokenizer.id("<|end|>")]
        tokens.append(torch.tensor(ids + [0] * (8 - len(ids))))
    return torch.stack(images), torch.stack(tokens)


def test_clip_learns_colours_and_its_tower_goes_to_the_decoder(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    module = ClipModule(
        VisionConfig(CLIP_CONFIG), str(tmp_path / "tokenizer"), OptimizerConfig(lr=3e-3), out=str(tmp_path / "clip")
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
    told = dataclasses.replace(module.clip_config, mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.5))
    save_clip(tmp_path / "told", module.clip, told)
    assert load_clip_config(tmp_path / "told", None).mean == told.mean


def test_a_checkpoint_holds_the_temperature_within_its_bound(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    module = _clip_module(str(tmp_path / "tokenizer"))
    module.configure_model()
    with torch.no_grad():
        module.clip.logit_scale.fill_(7.0)
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    with quiet_lightning():
        trainer = quiet_trainer(saving, max_steps=1, enable_checkpointing=True)
        trainer.fit(module, datamodule=ListData([_batch(tokenizer, 0)]))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["clip.logit_scale"], module.clip.logit_scale)
    assert float(saved["clip.logit_scale"].exp()) == pytest.approx(100.0)


def test_a_training_says_what_it_will_write_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, out = _tokenizer(tmp_path / "tokenizer"), tmp_path / "clip"
    for wanted in ([], [f"{out} is not empty: this training writes over it when it ends"]):
        caplog.clear()
        module = ClipModule(VisionConfig(CLIP_CONFIG), str(tmp_path / "tokenizer"), out=str(out))
        with quiet_lightning():
            quiet_trainer(max_steps=1).fit(module, datamodule=ListData([_batch(tokenizer, 0)]))
        assert [record.getMessage() for record in caplog.records if "not empty" in record.getMessage()] == wanted


def test_the_loss_is_clips_where_all_captions_differ() -> None:
    torch.manual_seed(0)
    image_NC, text_NC = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    loss = contrastive_loss(image_NC, text_NC, image_NC, text_NC, scale, torch.eye(5, dtype=torch.bool))
    assert loss == pytest.approx(float(open_clip.ClipLoss()(image_NC, text_NC, scale)), rel=1e-5)


def test_pairs_with_the_same_caption_are_not_told_apart() -> None:
    classes = torch.tensor([0, 1, 0, 2, 1])
    directions = torch.eye(3)[classes]
    same_NM = classes[:, None] == classes
    apart = contrastive_loss(directions, directions, directions, directions, torch.tensor(50.0), same_NM)
    assert float(apart) == pytest.approx(0.0, abs=1e-5)
    told = contrastive_loss(directions, directions, directions, directions, torch.tensor(50.0), torch.eye(5) > 0)
    assert float(told) > 0.5


def test_rows_that_are_no_pairs_count_nowhere() -> None:
    torch.manual_seed(0)
    image_NC, text_NC = (F.normalize(torch.randn(6, 8), dim=1).requires_grad_() for _ in range(2))
    is_pair_N, classes = torch.tensor([True, False, True, True, False, True]), torch.tensor([0, 1, 2, 0, 1, 3])
    same_NM, scale = classes[:, None] == classes, torch.tensor(7.0)
    all_four = (image_NC, text_NC, image_NC, text_NC)
    loss = contrastive_loss(*all_four, scale, same_NM, is_pair_N, is_pair_N)
    grads = torch.autograd.grad(loss, (image_NC, text_NC))
    wanted = contrastive_loss(*(rows[is_pair_N] for rows in all_four), scale, same_NM[is_pair_N][:, is_pair_N])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for grad, expected in zip(grads, torch.autograd.grad(wanted, (image_NC, text_NC)), strict=True):
        assert torch.allclose(grad, expected, atol=1e-6) and not grad[~is_pair_N].any()
    ranks = [
        contrastive_loss(
            image_NC[part], text_NC[part], image_NC, text_NC, scale, same_NM[part], is_pair_N[part], is_pair_N
        )
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    assert float(sum(ranks).detach()) / 3 == pytest.approx(float(loss.detach()), rel=1e-5)
    nothing = torch.zeros(6, dtype=torch.bool)
    nobody = contrastive_loss(*all_four, scale, same_NM, nothing, nothing)
    assert float(nobody.detach()) == 0 and not torch.autograd.grad(nobody, image_NC)[0].any()


def test_a_batch_whose_pairs_all_failed_trains_nothing_and_validates(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    images, tokens = _batch(tokenizer, 0)
    empty = torch.zeros_like(tokens)
    empty[:, 0] = tokenizer.id("<|end|>")
    failed = CaptionBatch(torch.zeros_like(images), empty, torch.zeros(4, dtype=torch.bool))
    module = _clip_module(str(tmp_path / "tokenizer"))
    module.optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.0)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = ListData([failed])
    with quiet_lightning():
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(module, datamodule=data)
        good = CaptionBatch(images, tokens, torch.tensor([True, True, True, False]))
        loaders = [torch.utils.data.DataLoader([good, failed], batch_size=None)]
        (told,) = trainer.validate(module, loaders, verbose=False)
        part = CaptionBatch(images[:3], tokens[:3], torch.ones(3, dtype=torch.bool))
        (wanted,) = trainer.validate(module, [torch.utils.data.DataLoader([part], batch_size=None)], verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert told == pytest.approx(wanted, rel=1e-5)


def _fit_clip_rank(rank: int, port: int, out: str, folder: str) -> None:
    tokenizer = TokenizerFolder.load(folder)
    batches = [_batch(tokenizer, seed) for seed in range(3)]
    pairs = [tuple((images[part], tokens[part]) for part in (slice(0, 2), slice(2, 4))) for images, tokens in batches]
    fit_rank(rank, port, out, _clip_module(folder), ListData(pairs), max_steps=3)


def _clip_module(folder: str) -> ClipModule:
    torch.manual_seed(0)
    return ClipModule(VisionConfig(CLIP_CONFIG), folder, OptimizerConfig(lr=1e-3))


def test_two_ranks_compare_with_all_pairs(tmp_path: Path) -> None:
    folder = str(tmp_path / "tokenizer")
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    alone, recorder = _clip_module(folder), LossRecorder()
    with quiet_lightning():
        data = ListData([_batch(tokenizer, seed) for seed in range(3)])
        quiet_trainer(recorder, max_steps=3).fit(alone, datamodule=data)
    ranks = run_two_ranks(_fit_clip_rank, tmp_path, folder)
    mean = [(a + b) / 2 for a, b in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert mean == pytest.approx(recorder.losses, rel=1e-4)
    weights = {name: weight for name, weight in alone.state_dict().items() if not name.endswith("in_proj_bias")}
    for name, weight in weights.items():  # (the keys' bias changes nothing: its gradient is rounding)
        assert torch.allclose(ranks[0]["weights"][name], weight, atol=1e-4), name


def test_the_text_tower_takes_the_tokenizer() -> None:
    config = with_text_tokens(VisionConfig(CLIP_CONFIG), 300, end_id=1, pad_id=0).open_clip
    assert isinstance(config, dict)
    text = config["text_cfg"]
    assert (text["vocab_size"], text["pool_type"], text["eos_id"], text["pad_id"]) == (300, "eos", 1, 0)
    assert CLIP_CONFIG["text_cfg"]["vocab_size"] == 40, "the given config is left alone"


def test_pretrained_weights_are_the_decoders_affair() -> None:
    with pytest.raises(ValueError, match=r"weights 'openai', but both towers are trained from nothing"):
        ClipModule(VisionConfig("RN50", pretrained="openai"), "tokenizer")


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-Z-99"):
        with_text_tokens(VisionConfig("ViT-Z-99"), 300, 1, 0)
    with pytest.raises(FileNotFoundError, match=r"lacks config.json"):
        load_clip_config(tmp_path, None)
