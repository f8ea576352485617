"""A training that starts from a pretrained tower makes pictures as the tower saw them, stored features included."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import features_hash
from mmllm.interop.library import quiet
from mmllm.interop.towers import read_tower
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, ModelConfig, MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.image_encoder import load_image_encoder
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.strategy import MeshStrategy
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.training_fixtures import LossRecorder, fit_rank, quiet_trainer, run_two_ranks

SIDE = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of transformers, a model folder with it, and shards with its features and without."""
    root = tmp_path_factory.mktemp("towers")
    tokenizer = make_folder(root / "tok")
    torch.manual_seed(0)
    with quiet(transformers):
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
            patch_size=8,
        )  # fmt: skip
        transformers.CLIPVisionModel(config).save_pretrained(root / "clip")
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 20}, crop_size={"height": SIDE, "width": SIDE}, resample=2
        ).save_pretrained(root / "clip")
    tower = read_tower(root / "clip", -2)
    decoder = DecoderConfig(
        tokenizer.vocabulary.size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    audio = AudioConfig(2, 16, codebook_dim=8, projector=AudioProjectorConfig("conv", pool=2, num_hidden_layers=1))
    model = MultimodalModel(ModelConfig(decoder, tower.vision, ImageProjectorConfig("mlp"), audio))
    model.load_state_dict(dict(tower.tensors()), strict=False)
    save_model(root / "model", model, tokenizer, image_transform=tower.transform)
    manifest = str(mixed_manifest(root / "m", 6))
    build = ["data", "build", manifest, "--tokenizer", str(root / "tok"), "--out"]
    assert main([*build, str(root / "plain")]) == 0
    assert main([*build, str(root / "with"), "--image_features", str(root / "model")]) == 0
    for name in ("plain", "with"):
        commands.index(root / name, root / "tok")
        recipe = recipe_dict(root / name, root / "tok", mixture={"on_exhausted": "repeat"})
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return root


def module_of(root: Path, tower_lr: float = 0.0, builds: bool = True, **settings) -> DecoderModule:
    torch.manual_seed(1)
    optimizer = OptimizerConfig(lr=1e-2, tower_lr=tower_lr)
    module = DecoderModule(init_from=str(root / "model"), optimizer=optimizer, **settings)
    if builds:
        module.configure_model()
    return module


def data_of(root: Path, name: str = "plain", **settings) -> PackedDataModule:
    return PackedDataModule(str(root / f"{name}.yaml"), batch_size=4, image_features=name == "with", **settings)


def losses(module: DecoderModule, data: PackedDataModule) -> list[float]:
    recorder = LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=2).fit(module, datamodule=data)
    return recorder.losses


def test_pictures_are_made_as_the_tower_saw_them(made, tmp_path):
    data, module = data_of(made), module_of(made, out=str(tmp_path / "out"))
    expected = losses(module, data)
    transform = data.image_transform
    assert (transform.library, transform.mode, transform.resized, transform.resample) == (
        "transformers", "crop", 20, "bilinear"
    )  # fmt: skip
    loaded = load_model(tmp_path / "out")
    assert loaded.image_transform == transform == load_model(made / "model").image_transform
    assert loaded.model.config.vision == dataclasses.replace(
        load_model(made / "model").model.config.vision, trainable=False
    )
    stored = data_of(made, "with")
    assert losses(module_of(made), stored) == pytest.approx(expected, rel=1e-3), "float16"
    before = read_tower(made / "clip", -2)
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in before.tensors())


def test_what_differs_is_refused_by_name(made, tmp_path):
    with pytest.raises(ValueError, match=r"image_mode is 'squash', but the image tower.*as transformers does \(crop\)"):
        losses(module_of(made), data_of(made, image_mode="squash"))
    data = data_of(made, "with")
    data.take_transform(ImageTransform(SIDE))
    with pytest.raises(ValueError, match=f"sees 32 pixels but the tokenizer folder's image_size is {SIDE}"):
        data.take_transform(ImageTransform(32))
    with pytest.raises(
        ValueError, match=r"--image_mode is 'pad', but the pictures of .* are made as transformers does"
    ):
        load_image_encoder(str(made / "model"), mode="pad")
    with pytest.raises(ValueError, match=r"--image_layer is 0, but the model in .* takes layer -2"):
        load_image_encoder(str(made / "model"), "0")


def test_an_untouched_data_module_squashes_as_ever(made):
    assert data_of(made).image_transform == ImageTransform(SIDE)
    assert data_of(made, image_mode="crop").image_transform == ImageTransform(SIDE, mode="crop")
    same = data_of(made, image_mode="crop")
    same.take_transform(ImageTransform(SIDE, mode="crop", mean=(0.5, 0.5, 0.5)))
    assert same.image_transform.mean == (0.5, 0.5, 0.5)


def test_features_can_be_of_the_tower_alone(made):
    by_folder, by_model = (load_image_encoder(str(made / "clip"), -2), load_image_encoder(str(made / "model")))
    assert by_folder.hash == by_model.hash and by_folder.transform == by_model.transform
    tower = load_model(made / "model").model.vision
    assert tower is not None and features_hash(tower.hash, by_model.transform) == by_model.hash
    pixels = np.zeros((1, 3, SIDE, SIDE), np.uint8)
    np.testing.assert_allclose(by_folder.encode(pixels), by_model.encode(pixels))
    unpickled = pickle.loads(pickle.dumps(by_folder.encode))  # as workers get it
    np.testing.assert_array_equal(unpickled(pixels), by_folder.encode(pixels))
    again = load_image_encoder(**by_folder.settings)
    assert again.hash == by_folder.hash


def fit_sharded_rank(rank: int, port: int, out: str, root: str) -> None:
    """One of two ranks that hold half of each of the tower's weights."""
    module, data = module_of(Path(root), tower_lr=1e-3, builds=False), data_of(Path(root))
    strategy = MeshStrategy(fsdp=2)
    fit_rank(rank, port, out, module, data, strategy=strategy, max_steps=2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_tower_of_transformers_trains_sharded(made, tmp_path):
    expected = losses(module_of(made, tower_lr=1e-3), data_of(made))
    found = run_two_ranks(fit_sharded_rank, tmp_path, str(made))
    assert found[0]["losses"] == pytest.approx(expected, rel=1e-4)
