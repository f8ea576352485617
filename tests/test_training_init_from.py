"""`init_from`: which tensors and rows come from a folder, which stay new, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.model.config import config_to_dict
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.embedding import joined_rows
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.rope import RopeScaling
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.init_from import InitSummary, initialize
from mmllm.training.init_source import InitSource
from mmllm.training.lightning_cli import build_cli, print_estimate, quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.strategy import MeshStrategy
from mmllm_tokenizers.audio import SmallCodec
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.inference_fixtures import make_model, make_tokenizer
from tests.training_fixtures import ListData, fit_rank, quiet_trainer, run_two_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from allocations import AllocationPeak

EMBED, HEAD = "decoder.embed_tokens.weight", "decoder.lm_head.weight"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, MultimodalModel, TokenizerFolder]:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, tie_word_embeddings=False)
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model", model, tokenizer


def started(folder: Path, tokenizer: TokenizerFolder | None = None, **settings: Any) -> DecoderModule:
    """The module as it begins; with another tokenizer, its sizes are that one's."""
    if tokenizer is not None:
        where = folder.parent / f"tokenizer {tokenizer.hash[:8]}"
        tokenizer.save(where)
        source = InitSource.open(folder).model
        audio = source.audio and dataclasses.replace(source.audio, num_codebooks=0, codebook_size=0, codebook_dim=0)
        sizes = {"vision": source.vision, "image_projector": source.image_projector, "audio": audio}
        decoder = settings.pop("decoder", source.decoder)
        settings = {**sizes, "decoder": dataclasses.replace(decoder, vocab_size=0), **settings, "tokenizer": str(where)}
    torch.manual_seed(7)
    module = DecoderModule(init_from=str(folder), **settings)
    module.configure_model()
    return module


def weights(module: DecoderModule) -> dict[str, torch.Tensor]:
    assert module.model is not None
    return joined_rows(module.model.state_dict())


def summary_of(module: DecoderModule) -> InitSummary:
    assert module.init_summary is not None
    return module.init_summary


@pytest.mark.parametrize("num_base_ids", [0, 300])
def test_with_the_same_tokenizer_all_is_the_folders(made: Any, num_base_ids: int) -> None:
    folder, model, tokenizer = made
    decoder = dataclasses.replace(model.config.decoder, num_base_ids=num_base_ids)
    parts = {"text_embedding": 0} if num_base_ids else None
    module = DecoderModule(init_from=str(folder), optimizer=OptimizerConfig(parts=parts))
    module.decoder = decoder
    module.configure_model()
    assert module.folder is not None and module.folder.hash == tokenizer.hash
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights(module).items())
    summary = summary_of(module)
    assert len(summary.loaded) == len(model.state_dict())
    assert not (summary.new or summary.left_out or summary.in_part or summary.changed)
    if num_base_ids:
        assert module.model is not None and len(module.model.decoder.embed_tokens.weight) == 300


def other_codec(tokenizer: TokenizerFolder, num_codebooks: int = 3) -> SmallCodec:
    torch.manual_seed(5)
    config = CodecConfig(
        sample_rate=8000, num_filters=4, ratios=(8, 8), dimension=8, num_codebooks=num_codebooks, codebook_size=12
    )
    return SmallCodec(Codec(config).eval())


def test_with_another_codec_text_rows_are_the_folders_and_units_are_new(made: Any) -> None:
    folder, model, tokenizer = made
    other = TokenizerFolder(tokenizer.text, other_codec(tokenizer), tokenizer.config)
    assert other.hash != tokenizer.hash
    module = started(folder, other)
    own, num_text = weights(module), tokenizer.vocabulary.num_text
    for name in (EMBED, HEAD):
        assert torch.equal(own[name][:num_text], model.state_dict()[name][:num_text])
        assert not (own[name][num_text:] == model.state_dict()[name][num_text:]).all(dim=1).any()
        assert summary_of(module).in_part[name] == f"{num_text} of {tokenizer.vocabulary.size} rows"
    front_end = ("code_embedding.", "clip_projector.", "unit_projector.")
    for name, tensor in own.items():
        is_new = name.startswith(front_end)
        assert (name in summary_of(module).new) == is_new == (name in summary_of(module).left_out), name
        if not is_new and name not in (EMBED, HEAD):
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_with_other_text_special_tokens_are_found_by_name_and_units_where_they_lie(made: Any) -> None:
    folder, model, tokenizer = made
    text = TextTokenizer.train(["completely different words for another vocabulary"] * 3, vocab_size=310)
    other = TokenizerFolder(text, tokenizer.audio, tokenizer.config)
    assert other.vocabulary.num_text != tokenizer.vocabulary.num_text
    module = started(folder, other)
    own, theirs = weights(module), model.state_dict()
    ours, first = other.vocabulary.num_text, tokenizer.vocabulary.num_text
    for name in (EMBED, HEAD):
        for token, row in text.special_ids.items():
            assert torch.equal(own[name][row], theirs[name][tokenizer.text.special_ids[token]])
        assert torch.equal(own[name][ours:], theirs[name][first:])
        assert not torch.equal(own[name][14:60], theirs[name][14:60])
    assert torch.equal(own["code_embedding.table.weight"], theirs["code_embedding.table.weight"])


def test_special_tokens_that_lie_elsewhere_are_found_by_name(made: Any) -> None:
    from mmllm_tokenizers.text import ForeignText

    folder, model, tokenizer = made
    plain = tokenizer.text
    base = TextTokenizer.train(["completely different words"] * 3, vocab_size=290)
    ids = {name: base.num_tokens + 5 + number for number, name in enumerate(reversed(plain.special_ids))}
    foreign = ForeignText(base.num_tokens + 19, ids)
    other = TokenizerFolder(TextTokenizer(base._template, foreign), tokenizer.audio, tokenizer.config)
    own = weights(started(folder, other))
    for token, row in ids.items():
        assert torch.equal(own[EMBED][row], model.state_dict()[EMBED][plain.special_ids[token]]), token


def test_of_fewer_codebooks_the_first_are_the_folders(made: Any) -> None:
    folder, model, tokenizer = made
    config = dataclasses.replace(tokenizer.config, num_codebooks=2)
    other = TokenizerFolder(tokenizer.text, SmallCodec(make_tokenizer().require_audio().codec), config)  # type: ignore[attr-defined]
    if other.audio is None or tokenizer.audio is None or other.audio.hash != tokenizer.audio.hash:
        pytest.skip("a codec's hash tells how many codebooks are in use")
    own = weights(started(folder, other))
    assert torch.equal(own[EMBED], model.state_dict()[EMBED][: other.vocabulary.size])


def test_parts_are_chosen_and_a_sense_that_the_folder_lacks_is_new(tmp_path: Path, made: Any) -> None:
    folder, model, tokenizer = made
    chosen = started(folder, init_parts=("attention", "unit_embedding"))
    own, theirs = weights(chosen), model.state_dict()
    num_text = tokenizer.vocabulary.num_text
    assert torch.equal(own[EMBED][num_text:], theirs[EMBED][num_text:])
    assert not torch.equal(own[EMBED][:num_text], theirs[EMBED][:num_text])
    same = {name for name, tensor in own.items() if name in theirs and torch.equal(tensor, theirs[name])}
    assert "decoder.layers.0.self_attn.q_proj.weight" in same and "decoder.layers.0.mlp.up_proj.weight" not in same
    assert set(summary_of(chosen).new) == set(own) - set(summary_of(chosen).loaded) - {EMBED, HEAD}

    silent = make_tokenizer(sound=False)
    blind = make_model(silent, sight=False, tie_word_embeddings=False)
    save_model(tmp_path / "blind", blind, silent)
    source = model.config
    module = started(
        tmp_path / "blind", tokenizer, vision=source.vision, image_projector=source.image_projector,
        audio=dataclasses.replace(source.audio, num_codebooks=0, codebook_size=0, codebook_dim=0),
    )  # fmt: skip
    groups = {name.partition(".")[0] for name in summary_of(module).new}
    assert groups == {"vision", "image_projector", "code_embedding", "clip_projector", "unit_projector"}
    assert torch.equal(weights(module)[EMBED][:num_text], blind.state_dict()[EMBED])

    back = started(folder, silent, vision=None, audio=None)
    assert {name.partition(".")[0] for name in summary_of(back).left_out} == groups
    assert not summary_of(back).new


def test_what_is_new_or_left_out_is_said_and_written(
    tmp_path: Path, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, tokenizer = made
    other = TokenizerFolder(tokenizer.text, other_codec(tokenizer), tokenizer.config)
    with caplog.at_level(logging.WARNING):
        module = started(folder, other, optimizer=OptimizerConfig(parts={"audio_front_end": 0}))
    num_new = len(summary_of(module).new)
    assert f"new {num_new} tensors (audio_front_end {num_new})" in caplog.text
    assert "left out" in caplog.text
    assert "audio_front_end of the model isn't in" in caplog.text and "it stays random" in caplog.text
    with quiet_lightning():
        trainer = quiet_trainer(max_steps=1)
        trainer.loggers = [CSVLogger(tmp_path, name="logs", version="")]
        trainer.fit(module, ListData([_batches()[0]]))
    told = json.loads((tmp_path / "logs" / "init_from.json").read_text())
    assert told["counts"]["new"] == {"audio_front_end": num_new}
    assert told["new"]["audio_front_end"] == sorted(summary_of(module).new)
    assert told["rows"][EMBED].endswith("rows") and told["init_from"] == str(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_theta": 500.0}, r"decoder\.rope_theta is 500\.0 but the model in .* has 10000\.0.*config\.json"),
        ({"num_hidden_layers": 3}, r"decoder\.num_hidden_layers is 3"),
        ({"hidden_size": 64}, r"decoder\.hidden_size is 64"),
        ({"intermediate_size": 50}, r"decoder\.intermediate_size is 50"),
        ({"moe_layers": (0, 1)}, r"decoder\.has_experts\(0\) is True"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True .*lm_head\.weight"),
        ({"attention_bias": "qkv"}, r"attention_bias is qkv"),
    ],
)
def test_a_decoder_that_computes_something_else_is_refused(made: Any, settings: dict[str, Any], said: str) -> None:
    folder, model, _ = made
    module = DecoderModule(init_from=str(folder))
    module.decoder = dataclasses.replace(model.config.decoder, **settings)
    with pytest.raises(ValueError, match=said):
        module.configure_model()


def test_other_sizes_missing_and_unknown_weights_are_refused_by_name(made: Any) -> None:
    folder, model, _ = made
    module = DecoderModule(init_from=str(folder))
    module.image_projector = dataclasses.replace(model.config.image_projector, hidden_size=20)
    with pytest.raises(ValueError, match=r"image_projector\.\S+ has shape .*the model wants .*init_parts"):
        module.configure_model()
    stored = load_file(folder / "model.safetensors")
    for change, said in (
        (lambda w: w.pop("decoder.norm.weight"), r"decoder\.norm\.weight is missing in .*model\.safetensors"),
        (lambda w: w.update({"decoder.extra": torch.ones(2)}), r"has decoder\.extra, which the model lacks"),
        (lambda w: w.update({EMBED: w[EMBED][:100].clone()}), r"has 100 rows .*speaks of id"),
    ):
        changed = dict(stored)
        change(changed)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            DecoderModule(init_from=str(folder)).configure_model()
    with pytest.raises(FileNotFoundError, match="no model folder"):
        DecoderModule(init_from=str(folder / "nowhere"))
    with pytest.raises(ValueError, match="init_parts names 'attn'"):
        DecoderModule(init_from=str(folder), init_parts=("attn",))
    with pytest.raises(ValueError, match="decoder is left out, and so is init_from"):
        DecoderModule()


def test_a_longer_context_is_allowed_and_said(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, model, _ = made
    module = DecoderModule(init_from=str(folder))
    module.decoder = dataclasses.replace(model.config.decoder, rope_scaling=RopeScaling("linear", factor=2.0))
    with caplog.at_level(logging.WARNING):
        module.configure_model()
    assert list(summary_of(module).changed) == ["rope_scaling"] and "decoder.rope_scaling is" in caplog.text


def test_a_config_with_all_sizes_is_estimated_without_the_folder(tmp_path: Path, made: Any) -> None:
    _, model, _ = made
    nowhere, values = tmp_path / "nowhere", config_to_dict(model.config)
    config = str(write_config(tmp_path / "c.yaml", init_from=str(nowhere), tokenizer=str(nowhere), **values))
    said = print_estimate(["-c", config], sequence_length=64)
    assert said["parameters"]["total"] == model.num_parameters()
    module = built("-c", config)
    module.tokenizer = None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.configure_model()


def test_tensors_are_streamed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(sound=False)
    model = make_model(tokenizer, sight=False)
    decoder = dataclasses.replace(model.config.decoder, hidden_size=256, num_hidden_layers=4, intermediate_size=512)
    model = MultimodalModel(dataclasses.replace(model.config, decoder=decoder))
    save_model(tmp_path / "m", model, tokenizer)
    source, fresh = InitSource.open(tmp_path / "m"), MultimodalModel(model.config)
    with AllocationPeak("cpu") as memory:
        initialize(fresh, source, tokenizer)
    assert memory.peak <= 1.1 * max(p.nbytes for p in model.parameters())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("same", [True, False])
def test_what_import_wrote_before_is_read(tmp_path: Path, same: bool) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, tie_word_embeddings=False)
    state, old = model.decoder.state_dict(), tmp_path / "old"
    old.mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    metadata = {"format": "pt", "tokenizer": tokenizer.hash if same else "0" * 64}
    save_file({n: t.detach().clone() for n, t in state.items()}, old / "decoder.safetensors", metadata=metadata)
    sizes = {**config_to_dict(model.config.decoder), "vocab_size": 0}
    (old / "decoder.json").write_text(json.dumps(sizes))
    module = DecoderModule(init_from=str(old), tokenizer=str(tmp_path / "tokenizer"))
    module.configure_model()
    for name, tensor in state.items():
        is_row = name in ("embed_tokens.weight", "lm_head.weight")
        assert torch.equal(weights(module)[f"decoder.{name}"], tensor) == (same or not is_row), name


def test_the_export_keeps_what_the_folder_had_beside_its_weights(tmp_path: Path, made: Any) -> None:
    folder, model, tokenizer = made
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "qwen3"}')
    generation = GenerationConfig(text=Sampling(temperature=0.6, top_k=20))
    save_model(folder, model, tokenizer, generation=generation, source=tmp_path / "foreign")
    module = started(folder)
    module.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "source" / "config.json").read_text())["model_type"] == "qwen3"
    assert load_model(tmp_path / "out").generation.text == generation.text


# --- the command line -------------------------------------------------------------------------------------------------


def write_config(path: Path, **init_args: Any) -> Path:
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False},
        "model": {"class_path": "mmllm.training.decoder_module.DecoderModule", "init_args": init_args},
        "data": {
            "class_path": "mmllm.data.loading.datamodules.PackedDataModule",
            "init_args": {"recipe": str(path.parent / "recipe.yaml"), "batch_size": 2},
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def built(*argv: str) -> DecoderModule:
    with quiet_lightning():
        module: Any = build_cli(list(argv), run=False).model
    return module


def test_keys_that_a_config_leaves_out_are_the_folders(tmp_path: Path, made: Any) -> None:
    folder, _, tokenizer = made
    config = str(write_config(tmp_path / "c.yaml", init_from=str(folder)))
    module = built("-c", config)
    assert module.resolved_config() == InitSource.open(folder).model
    assert module.tokenizer == str(folder)

    some = {"decoder": {"dropout": 0.1, "moe": {"router_aux_loss_coef": 0.5}}, "vision": None, "loss": {"text": 2.0}}
    config = str(write_config(tmp_path / "c.yaml", init_from=str(folder), **some))
    module = built("-c", config, "--model.init_args.decoder.gradient_checkpointing", "full")
    source = InitSource.open(folder).model
    moe = dataclasses.replace(source.decoder.moe, router_aux_loss_coef=0.5)  # type: ignore[type-var]
    wanted = dataclasses.replace(source.decoder, dropout=0.1, moe=moe, gradient_checkpointing="full")
    assert module.decoder == wanted
    assert module.vision is None and module.audio == source.audio
    assert module.loss == dataclasses.replace(source.loss, text=2.0)

    # from an option, with a second config over the first
    first = str(write_config(tmp_path / "first.yaml", decoder={"dropout": 0.3}))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"decoder": {"dropout": 0.2}}}}))
    module = built("-c", first, "--model.init_args.init_from", str(folder), f"--config={tmp_path / 'second.yaml'}")
    assert module.decoder == dataclasses.replace(source.decoder, dropout=0.2)

    other = TokenizerFolder(tokenizer.text, None, tokenizer.config)
    other.save(tmp_path / "other")
    config = str(write_config(tmp_path / "c.yaml", init_from=str(folder), tokenizer=str(tmp_path / "other")))
    module = built("-c", config)
    assert module.resolved_config().decoder.vocab_size == other.vocabulary.size


def test_estimates_take_the_folders_config_and_wrong_keys_are_named(tmp_path: Path, made: Any) -> None:
    folder, model, _ = made
    config = str(write_config(tmp_path / "c.yaml", init_from=str(folder)))
    said = print_estimate(["-c", config], sequence_length=64)
    assert said["parameters"]["total"] == model.num_parameters()
    config = str(write_config(tmp_path / "c.yaml", init_from=str(folder), decoder={"dropuot": 0.1}))
    with pytest.raises(ValueError, match="dropuot"):
        built("-c", config)
    config = str(write_config(tmp_path / "c.yaml", init_from=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        built("-c", config)


# --- more ranks -------------------------------------------------------------------------------------------------------


def _sharded_rank(rank: int, port: int, out: str, folder: Path) -> None:
    parts = {"text_embedding": 0.0, "unit_embedding": 1e-9}
    module = DecoderModule(init_from=str(folder), optimizer=OptimizerConfig(lr=1e-9, parts=parts))
    module.decoder = dataclasses.replace(module.decoder, num_base_ids=300)
    strategy = MeshStrategy(fsdp=2, save_distributed_checkpoint=False)
    data = ListData([_batches()])
    fit_rank(rank, port, out, module, data, max_steps=1, strategy=strategy)


def _batches() -> Any:
    from mmllm.data.loading.collate import pack_documents
    from mmllm.data.samples.document import DocumentWriter

    tokenizer = make_tokenizer()
    documents = []
    for number in range(2):
        writer = DocumentWriter(tokenizer)
        writer.ids([20 + number, 30, 40, 50], is_target=True)
        documents.append(writer.finish())
    return tuple(pack_documents([[document]], 8) for document in documents)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sharded_models_take_their_shards(tmp_path: Path, made: Any) -> None:
    folder, model, _ = made
    ranks = run_two_ranks(_sharded_rank, tmp_path, folder)
    whole = joined_rows({name.removeprefix("model."): w for name, w in ranks[0]["weights"].items()})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, atol=1e-6, rtol=0, msg=name)


def _logging_rank(rank: int, port: int, out: str, folder: Path) -> None:
    data = ListData([_batches()])
    logger = CSVLogger(out, name="logs", version="")
    fit_rank(rank, port, out, DecoderModule(init_from=str(folder)), data, max_steps=1, logger=logger)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_write_it_once_and_none_waits_for_the_other(tmp_path: Path, made: Any) -> None:
    """Where logs go is asked by all ranks together, so that one that asks alone would wait without end."""
    folder, _, _ = made
    run_two_ranks(_logging_rank, tmp_path, folder)
    assert json.loads((tmp_path / "logs" / "init_from.json").read_text())["init_from"] == str(folder)


def test_a_decoder_config_without_base_ids_is_read() -> None:
    values = config_to_dict(DecoderConfig(40))
    del values["num_base_ids"]
    from mmllm.model.config import config_from_dict

    assert config_from_dict(DecoderConfig, values) == DecoderConfig(40)
