"""Image features: stored by `data build`, read in training instead of pictures, refused where they don't fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy

from mmllm.batch import PackedBatch
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import COLUMN, features_hash, unpack_features
from mmllm.data.shards import encode as sample_files
from mmllm.data.shards.tar import read_members, scan_tar
from mmllm.losses.batch import LossFunction
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.training.clip_module import load_clip_config, save_clip
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.image_encoder import load_image_encoder
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.training_fixtures import CLIP_CONFIG, LossRecorder, fit_rank, quiet_trainer, run_two_ranks

CLIP = {**CLIP_CONFIG, "vision_cfg": {**CLIP_CONFIG["vision_cfg"], "layers": 2}}
LAYER = -2
NUM = 6
HALF = 2**-11
"""What rounding to float16 changes at most, relatively."""


def save_tower(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_clip(path, build_clip(VisionConfig(CLIP)), VisionConfig(CLIP))
    return path


def write_recipe(path: Path, built: Path, root: Path) -> str:
    path.write_text(yaml.safe_dump(recipe_dict(built, root / "tok", mixture={"on_exhausted": "repeat"})))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers of one shape; the same rows as shards with the first one's features, and without."""
    root = tmp_path_factory.mktemp("features")
    make_folder(root / "tok")
    save_tower(root / "clip", 0)
    save_tower(root / "other", 1)
    manifest = str(mixed_manifest(root / "m", NUM))
    build = ["data", "build", manifest, "--tokenizer", str(root / "tok"), "--out"]
    features = ["--image_features", str(root / "clip"), "--image_layer", str(LAYER)]
    assert main([*build, str(root / "plain")]) == 0
    assert main([*build, str(root / "with"), *features]) == 0
    assert main([*build, str(root / "workers"), *features, "--workers", "2"]) == 0
    for name in ("plain", "with"):
        commands.index(root / name, root / "tok")
        write_recipe(root / f"{name}.yaml", root / name, root)
    return root


def tower_of(root: Path, name: str = "clip", layer: int = LAYER) -> VisionTower:
    config = dataclasses.replace(load_clip_config(root / name, None), layer=layer, trainable=False)
    tower = VisionTower(config)
    tower.load_pretrained()
    return tower


def files_of(shard: Path) -> dict[str, dict[str, bytes]]:
    data = shard.read_bytes()
    return {span.key: read_members(data[span.offset : span.offset + span.size], "")[1] for span in scan_tar(shard)}


def test_stored_features_are_those_that_training_would_compute(made: Path) -> None:
    tower, transform = tower_of(made), ImageTransform(16)
    made_by = features_hash(tower.hash, transform)
    for kind, prefix in (("caption", ""), ("interleaved", "0.")):
        samples = files_of(made / "with" / f"{kind}-000000.tar")
        assert len(samples) == NUM
        for files in samples.values():
            stored = unpack_features(files[f"{prefix}features.npz"], made_by, "")
            assert stored.dtype == np.float16 and stored.shape == (4, 16)
            pixels = torch.from_numpy(transform(files[f"{prefix}png"]))[None]
            torch.testing.assert_close(torch.from_numpy(stored).float(), tower(pixels)[0], rtol=1.1 * HALF, atol=1e-6)


def test_workers_build_the_same_bytes(made: Path) -> None:
    for shard in sorted((made / "with").glob("*.tar")):
        assert shard.read_bytes() == (made / "workers" / shard.name).read_bytes(), shard.name
    assert (made / "with" / "shards.json").read_bytes() == (made / "workers" / "shards.json").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove isn't installed")
def test_tasks_elsewhere_build_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task makes the tower itself, of its name and settings."""
    monkeypatch.chdir(made)
    build = ["data", "build", "m/manifest.jsonl", "--tokenizer", "tok", "--out", str(tmp_path / "s")]
    features = ["--image_features", "clip", "--image_layer", str(LAYER), "--executor", "datatrove"]
    assert main([*build, *features]) == 0
    for path in sorted((made / "with").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes(), path.name
    assert (made / "with" / "shards.json").read_bytes() == (tmp_path / "s" / "shards.json").read_bytes()


def test_nothing_else_in_the_shards_changes(made: Path) -> None:
    for kind in ("caption", "interleaved", "text", "audio"):
        plain, featured = (files_of(made / name / f"{kind}-000000.tar") for name in ("plain", "with"))
        assert plain.keys() == featured.keys()
        for key, files in featured.items():
            kept = {ending: data for ending, data in files.items() if not ending.endswith("features.npz")}
            has_features = len(kept) < len(files)
            assert has_features == (kind in ("caption", "interleaved")) == (COLUMN.encode() in kept.pop("json"))
            assert {**kept, "json": b""} == {**plain[key], "json": b""}


def test_such_shards_are_indexed_verified_and_shown(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, featured = (commands.index(made / name, made / "tok") for name in ("plain", "with"))
    assert plain == featured and featured["images"] == 2 * NUM
    assert commands.verify(made / "with", made / "tok")["broken"] == 0
    shown = commands.show(made / "with.yaml", batch_size=2, text=True, html=tmp_path / "step.html")
    assert shown["sequences"][0]["text"] and "<img" in (tmp_path / "step.html").read_text()

    monkeypatch.setattr(sample_files, "pack_features", lambda *_: b"broken")
    encoder = load_image_encoder(str(made / "clip"), LAYER)
    commands.build(made / "m" / "manifest.jsonl", tmp_path / "s", made / "tok", image_encoder=encoder)
    found = commands.verify(tmp_path / "s", made / "tok")
    assert found["broken"] == 2 * NUM + NUM // 3, "captions, interleaved rows, and each third of these as a question"
    assert "image features are broken" in found["errors"][0]


def make_module(
    root: Path, clip: str = "clip", layer: int = LAYER, builds: bool = True, **optimizer: Any
) -> DecoderModule:
    module = DecoderModule(
        decoder=DecoderConfig(
            vocab_size=0, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            moe_layers=(1,),
            moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        ),
        vision=VisionConfig(CLIP, layer=layer),
        image_projector=ImageProjectorConfig(kind="mlp"),
        audio=AudioConfig(0, 0, codebook_dim=8, projector=AudioProjectorConfig("conv", pool=2, num_hidden_layers=1)),
        tokenizer=str(root / "tok"),
        clip=str(root / clip),
        optimizer=OptimizerConfig(**{"lr": 1e-2, "tower_lr": 0.0, **optimizer}),
    )  # fmt: skip
    if builds:
        torch.manual_seed(3)
        module.configure_model()
    return module


def make_data(root: Path, name: str, **settings: Any) -> PackedDataModule:
    return PackedDataModule(str(root / f"{name}.yaml"), batch_size=4, image_features=name == "with", **settings)


def first_batch(root: Path, name: str) -> PackedBatch:
    return next(iter(make_data(root, name).train_dataloader()))


def gradients(module: DecoderModule, batch: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    module.zero_grad()
    assert module.model is not None
    model = module.model.train()
    loss = LossFunction(model.config, num_sources=4)(model, model(batch), batch).objective
    loss.backward()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    return loss.item(), {name: parameter.grad.clone() for name, parameter in trained.items()}  # pyright: ignore


def test_features_give_the_loss_and_the_gradients_of_pictures(made: Path) -> None:
    module = make_module(made)
    pixels, features = first_batch(made, "plain"), first_batch(made, "with")
    assert len(pixels.images_NCHW) == len(features.image_features_NPC) > 0
    assert not len(pixels.image_features_NPC) and not len(features.images_NCHW)
    assert torch.equal(pixels.image_slots_NS, features.image_slots_NS)
    loss, expected = gradients(module, pixels)
    found_loss, found = gradients(module, features)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert not any("vision" in name for name in found) and any("image_projector" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max() + 1e-6))


def test_a_rank_with_text_alone_touches_every_parameter(made: Path) -> None:
    batch = first_batch(made, "with")
    is_text_B = (batch.modality_BT == 0).all(dim=1)
    row = int(is_text_B.nonzero()[0]) if is_text_B.any() else 0
    rows = {name: value[row : row + 1] for name, value in vars(batch).items() if name.endswith(("BT", "BTK"))}
    nothing = {
        name: getattr(batch, name)[:0]
        for name in ("image_slots_NS", "images_NCHW", "clip_codes_CFK", "clip_slots_CS", "clip_targets_CL")
    }
    gradients(make_module(made), PackedBatch(**rows, **nothing))


def losses(module: DecoderModule, data: PackedDataModule) -> list[float]:
    recorder = LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=4).fit(module, datamodule=data)
    return recorder.losses


def test_training_with_features_is_training_with_pictures(made: Path) -> None:
    expected = losses(make_module(made, lr=5e-2), make_data(made, "plain"))
    data = make_data(made, "with", val_recipe=str(made / "with.yaml"), num_workers=1)
    found = losses(make_module(made, lr=5e-2), data)
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-5), "swapped pictures change it by 1e-3"
    with quiet_lightning():
        quiet_trainer().validate(make_module(made), datamodule=data, verbose=False)


def fit_sharded_rank(rank: int, port: int, out: str, root: str) -> None:
    """One of two ranks that hold a half of the model each, the frozen tower included."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module, data = make_module(Path(root), builds=False), make_data(Path(root), "with")
    fit_rank(rank, port, out, module, data, strategy=strategy, max_steps=2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sharded_ranks_know_their_tower(made: Path, tmp_path: Path) -> None:
    assert len(run_two_ranks(fit_sharded_rank, tmp_path, str(made))[0]["losses"]) == 2


def test_features_of_another_tower_layer_or_transform_are_refused(made: Path) -> None:
    data = make_data(made, "with")
    for module, settings in (
        (make_module(made, "other"), {}),
        (make_module(made, layer=-1), {}),
        (make_module(made), {"image_mode": "crop"}),
    ):
        with pytest.raises(ValueError, match=r"features were made by \w{12}, but .* is \w{12}; build the shards again"):
            losses(module, make_data(made, "with", **settings))
    with pytest.raises(ValueError, match="but the image tower is trained"):
        losses(make_module(made, tower_lr=1e-3), data)
    with quiet_lightning(), pytest.raises(ValueError, match="features were made by"):
        data = make_data(made, "with", val_recipe=str(made / "with.yaml"))
        quiet_trainer().validate(make_module(made, "other"), datamodule=data, verbose=False)


def test_features_of_many_makers_or_none_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "with", tmp_path / "s")
    shutil.copy(made / "plain" / "interleaved-000000.tar", tmp_path / "s")
    commands.index(tmp_path / "s", made / "tok")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "s", made)
    with pytest.raises(ValueError, match=r"\w{12} in caption-000000.tar:c_0.*, none in interleaved-000000.tar:i0"):
        PackedDataModule(recipe, image_features=True).train_dataloader()
    batch = next(iter(PackedDataModule(recipe).train_dataloader()))
    assert len(batch.images_NCHW), "without the setting, pictures are decoded"
    with pytest.raises(ValueError, match=r"set min_scale to 1 and flip to false"):
        make_data(made, "with", flip=True)


def test_a_tower_is_told_by_its_weights_and_what_reads_them(made: Path) -> None:
    hashes = [
        tower_of(made).hash, tower_of(made, "other").hash, tower_of(made, layer=-1).hash,
        load_image_encoder(str(made / "clip"), str(LAYER)).hash,
        load_image_encoder(str(made / "clip"), LAYER, "pad").hash,
    ]  # fmt: skip
    assert len(set(hashes)) == 5
    assert tower_of(made).hash == hashes[0]
    encoder = load_image_encoder(str(made / "clip"), LAYER)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    spawned = pickle.loads(pickle.dumps(encoder))
    assert spawned.hash == hashes[3] and np.array_equal(spawned.encode(images), encoder.encode(images))
    gelu = {**CLIP, "quick_gelu": True}
    tower = VisionTower(VisionConfig(gelu, layer=LAYER))
    tower.visual.load_state_dict(tower_of(made).visual.state_dict())
    assert tower.hash != hashes[0], "the same weights under another activation"
