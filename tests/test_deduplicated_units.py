"""K-means units without repetitions, with BPE and without: against slow references, from sounds to a transcript."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.index.index import load_indices
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.samples.documents import build_document, build_prompt, encode_audio
from mmllm.data.samples.sample import Sample
from mmllm.data.samples.stored import unpack_codes
from mmllm.data.shards.find import find_shards
from mmllm.data.shards.tar import scan_tar
from mmllm.evaluation.asking import AskedModel
from mmllm.inference.api import load
from mmllm.inference.inputs import AudioPart, as_audio
from mmllm.inference.transcripts import Transcript
from mmllm.inference.word_times import align_words
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import AudioConfig, LossConfig
from mmllm.training import tokenizer_commands
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm_tokenizers import audio_tokenizer
from mmllm_tokenizers.audio import DeduplicatedUnits, KMeansConfig, KMeansUnits, load_audio_tokenizer
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.unit_bpe import UnitBPE, check_sizes
from tests.data_fixtures import RATE, make_folder, write_manifest
from tests.training_fixtures import quiet_trainer

CLUSTERS, TOKENS, NUM_SOUNDS = 12, 20, 12
KINDS = {
    "codec": None,
    "kmeans": {},
    "kmeans_dedup": {"deduplicate": True},
    "kmeans_bpe": {"deduplicate": True, "bpe": TOKENS},
}
SHORT = ["kmeans_dedup", "kmeans_bpe"]


def tones(seconds: float, seed: int) -> np.ndarray:
    """Steady tones of a few pitches, of about a tenth of a second each: float32 [T]."""
    rng, parts = np.random.default_rng(seed), []
    while sum(map(len, parts)) < seconds * RATE:
        time_T = np.arange(int(RATE * rng.uniform(0.06, 0.16))) / RATE
        parts.append(0.3 * np.sin(2 * np.pi * rng.choice([200, 400, 800, 1600, 2400]) * time_T))
    return np.concatenate(parts)[: int(seconds * RATE)].astype(np.float32)


def shortened(sequence: list[int]) -> list[int]:
    """De-duplication, slow and plain."""
    return [unit for place, unit in enumerate(sequence) if place == 0 or sequence[place - 1] != unit]


def merged(units: list[int], bpe: UnitBPE) -> list[int]:
    """BPE, slow and plain: the first merge that is possible anywhere, where it first is, again and again."""
    numbers = {token: number for number, token in enumerate(bpe.tokens)}
    merges = [(bpe.tokens[left], bpe.tokens[right]) for left, right in bpe.merges_M2.tolist()]
    parts = [(unit,) for unit in units]
    while True:
        pairs = list(pairwise(parts))
        pair = next((pair for pair in merges if pair in pairs), None)
        if pair is None:
            return [numbers[part] for part in parts]
        place = pairs.index(pair)
        parts[place : place + 2] = [pair[0] + pair[1]]


# ---------------------------------------------------------------------------------------------------------------- units
@pytest.fixture(scope="module")
def units() -> KMeansUnits:
    waves = [torch.from_numpy(tones(1.0, seed)) for seed in range(6)]
    return KMeansUnits.fit(waves, KMeansConfig(num_clusters=CLUSTERS, num_mels=20, num_iterations=8))


@pytest.fixture(scope="module")
def short(units: KMeansUnits) -> dict[str, DeduplicatedUnits]:
    waves = [torch.from_numpy(tones(1.0, seed)) for seed in range(8)]
    both = {name: DeduplicatedUnits.fit(units, waves, size) for name, size in zip(SHORT, (None, TOKENS), strict=True)}
    frames, num_units = 8 * 50, sum(len(shortened(units.encode(wave, RATE)[0].tolist())) for wave in waves)
    for tokenizer, told in both.values():
        codes = sum(codes_KP.shape[1] for codes_KP in tokenizer.encode_batch(waves))
        assert told.to_dict() == {
            "frames": frames, "units_per_frame": round(num_units / frames, 4),
            "codes_per_frame": round(codes / frames, 4),
        }  # fmt: skip
    assert both["kmeans_bpe"][1].num_codes < both["kmeans_dedup"][1].num_codes == num_units < frames
    return {name: tokenizer for name, (tokenizer, _) in both.items()}


def sequences(count: int, seed: int = 0, num_units: int = 6) -> list[Tensor]:
    """Units that are far from equally frequent."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_units + 1)
    drawn = [rng.choice(num_units, size=rng.integers(1, 120), p=shares / shares.sum()) for _ in range(count)]
    return [torch.tensor(shortened(each.tolist())) for each in drawn]


def test_bpe_equals_a_slow_one():
    bpe = UnitBPE.train(sequences(40), 6, 60)
    assert bpe.vocab_size == 60 and bpe.tokens[:6] == tuple((unit,) for unit in range(6))
    assert max(map(len, bpe.tokens)) > 3, "merges of merges"
    assert len(set(bpe.tokens)) == 60
    for units_U in sequences(40, seed=1):
        tokens_P = bpe.encode(units_U)
        assert tokens_P.tolist() == merged(units_U.tolist(), bpe)
        assert torch.equal(bpe.decode(tokens_P), units_U) and int(bpe.lengths_V[tokens_P].sum()) == len(units_U)
    assert torch.equal(UnitBPE.train(sequences(40), 6, 60).merges_M2, bpe.merges_M2)
    assert bpe.encode(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_the_most_frequent_pair_is_merged_first():
    """Each merge is counted anew in all sequences, in which the earlier ones were made one by one."""
    bpe = UnitBPE.train(sequences(30), 6, 30)
    made = [[(unit,) for unit in units_U.tolist()] for units_U in sequences(30)]
    for left, right in bpe.merges_M2.tolist():
        counts = Counter(pair for parts in made for pair in pairwise(parts) if pair[0] != pair[1])
        pair = (bpe.tokens[left], bpe.tokens[right])
        if left != right:  # of a pair of equals, overlapping ones count or not
            assert counts[pair] == max(counts.values())
        for parts in made:
            place = 0
            while place + 1 < len(parts):
                if (parts[place], parts[place + 1]) == pair:
                    parts[place : place + 2] = [pair[0] + pair[1]]
                place += 1


def test_bpe_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="BPE is to have 6 tokens; it must have more than the 6 units"):
        UnitBPE.train(sequences(2), 6, 6)
    with pytest.raises(ValueError, match="65536 at most"):
        check_sizes(6, 65_537)
    with pytest.raises(ValueError, match="there is only sound for 7: no other pair of units comes twice"):
        UnitBPE.train([torch.tensor([0, 1, 0, 1])], 6, 40)
    with pytest.raises(ValueError, match="merge 0 is of tokens 9 and 1; there are 6"):
        UnitBPE(6, torch.tensor([[9, 1]]))


@pytest.mark.parametrize("kind", SHORT)
def test_codes_and_durations_equal_slow_ones(units, short, kind):
    tokenizer = short[kind]
    waves = [torch.from_numpy(tones(seconds, seed)) for seed, seconds in enumerate((1.3, 0.7, 0.01, 1.0), start=20)]
    for wave, (codes_KP, durations_P) in zip(waves, tokenizer.encode_timed(waves), strict=True):
        frames = units.encode(wave, RATE)[0].tolist()
        wanted = shortened(frames)
        if tokenizer.bpe is not None:
            wanted = merged(wanted, tokenizer.bpe)
        assert codes_KP.tolist() == [wanted] and codes_KP.dtype == torch.int64
        start = 0
        for code, duration in zip(wanted, durations_P.tolist(), strict=True):
            said = list(tokenizer.bpe.tokens[code]) if tokenizer.bpe is not None else [code]
            assert shortened(frames[start : start + duration]) == said
            start += duration
        assert start == len(frames)
        assert torch.equal(tokenizer.encode(wave, RATE), codes_KP)
    assert tokenizer.codebooks_KVD.shape == (1, tokenizer.codebook_size, 20)
    if tokenizer.bpe is not None:
        last = tokenizer.bpe.tokens[-1]
        torch.testing.assert_close(tokenizer.codebooks_KVD[0, -1], units.centroids_VD[list(last)].mean(0))


def test_a_run_goes_on_across_the_pieces_of_a_long_sound(units, short, monkeypatch):
    monkeypatch.setattr(audio_tokenizer, "_PIECE_SECONDS", 0.2)
    wave = torch.from_numpy(tones(3.0, 7))
    frames = units.encode(wave, RATE)[0].tolist()
    assert short["kmeans_dedup"].encode(wave, RATE)[0].tolist() == shortened(frames)
    pieces = [shortened(frames[start : start + 10]) for start in range(0, len(frames), 10)]
    assert sum(map(len, pieces)) > len(shortened(frames)), "else nothing is tested"


@pytest.mark.parametrize("kind", SHORT)
def test_folders_are_saved_and_loaded(short, kind, tmp_path):
    short[kind].save(tmp_path)
    loaded = load_audio_tokenizer(tmp_path)
    assert isinstance(loaded, DeduplicatedUnits) and not loaded.keeps_durations
    assert loaded.hash == short[kind].hash and loaded.codebook_size == short[kind].codebook_size
    wave = torch.from_numpy(tones(0.8, 30))
    assert torch.equal(loaded.encode(wave, RATE), short[kind].encode(wave, RATE))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "bpe": not config["bpe"]}))
    with pytest.raises(ValueError, match=r"bpe\.merges says otherwise; it is damaged"):
        load_audio_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="kind 'deduplicated_kmeans', not 'kmeans'"):
        KMeansUnits.load(tmp_path)


def test_kinds_have_hashes_of_their_own(units, short):
    assert len({units.hash, *(tokenizer.hash for tokenizer in short.values())}) == 3


def test_what_needs_durations_is_refused(units, short):
    tokenizer = short["kmeans_bpe"]
    with pytest.raises(ValueError, match="units have lost their durations, so they can be heard but not spoken"):
        tokenizer.decode(tokenizer.encode(torch.from_numpy(tones(0.5, 1)), RATE))
    with pytest.raises(ValueError, match="isn't known from its length; encode it"):
        tokenizer.num_frames_of(800, RATE)
    with pytest.raises(ValueError, match="the BPE is of 6 units, and there are 12"):
        DeduplicatedUnits(units, UnitBPE.train(sequences(20), 6, 8))
    text = TextTokenizer.train(["one two"] * 3, 280)
    with pytest.raises(ValueError, match="pointer is set, which is of speech, but de-duplicated units"):
        TokenizerFolder(text, tokenizer, TokenizerConfig(audio_pool=1, pointer=PointerRule()))
    folder = TokenizerFolder(text, tokenizer, TokenizerConfig(audio_pool=1))
    with pytest.raises(ValueError, match="heard but not spoken"):
        build_prompt("speak", folder, text="one")
    codes_KP = tokenizer.encode(torch.from_numpy(tones(0.5, 1)), RATE).numpy()
    with pytest.raises(ValueError, match="heard but not spoken"):
        build_document(Sample("k", "one", codes_KF=codes_KP), "speak", folder)
    assert len(build_document(Sample("k", "one", codes_KF=codes_KP), "transcribe", folder).clips[0].codes_FK) > 1


# ------------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind: an audio tokenizer, a tokenizer folder, shards with an index, a recipe and a model of two steps."""
    base = tmp_path_factory.mktemp("units")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_SOUNDS):
        wave = tones(0.4 + 0.15 * number, 100 + number)
        soundfile.write(base / f"{number}.wav", wave, RATE)
        rows.append({"id": f"s{number}", "audio": f"{number}.wav", "text": str(rng.choice(["one", "two", "one two"]))})
    manifest = write_manifest(base, rows)
    text = make_folder(base / "codec" / "tokenizer").text
    text.save(base / "tokenizer.json")
    config = KMeansConfig(num_clusters=CLUSTERS, num_mels=20, num_iterations=8)
    for kind, options in KINDS.items():
        out = base / kind
        if options is not None:
            tokenizer_commands.kmeans([str(manifest)], str(out / "units"), config, **options)
            pool = TokenizerConfig(audio_pool=1 if options else 2)
            tokenizer_commands.assemble(str(out / "tokenizer"), str(base / "tokenizer.json"), str(out / "units"), pool)
        commands.build(manifest, out / "shards", out / "tokenizer")
        commands.index(out / "shards", out / "tokenizer")
        source = {"name": "heard", "kind": "audio", "shards": str(out / "shards" / "*.tar"), "tasks": ["transcribe"]}
        recipe = {"tokenizer": str(out / "tokenizer"), "sequence_length": 192, "sources": [source]}
        (out / "recipe.yaml").write_text(json.dumps({**recipe, "mixture": {"on_exhausted": "repeat"}}))
        train(out)
    return base


def train(out: Path) -> None:
    torch.manual_seed(0)
    pool = TokenizerFolder.load(out / "tokenizer").audio_pool
    module = DecoderModule(
        DecoderConfig(0, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        audio=AudioConfig(0, 0, 0, AudioProjectorConfig("conv", pool=pool, num_hidden_layers=1)),
        loss=LossConfig(ctc=0.3), tokenizer=str(out / "tokenizer"), out=str(out / "model"),
        optimizer=OptimizerConfig(lr=1e-2, warmup=0.1),
    )  # fmt: skip
    with quiet_lightning():
        quiet_trainer(max_steps=2).fit(module, PackedDataModule(out / "recipe.yaml", batch_size=2))


def stored_codes(out: Path) -> dict[str, np.ndarray]:
    """Codes as the shards have them, by key."""
    codec = TokenizerFolder.load(out / "tokenizer").require_audio().hash
    found = {}
    for shard in sorted((out / "shards").glob("*.tar")):
        data = shard.read_bytes()
        for span in scan_tar(shard):
            (member,) = [member for member in span.members if member.ending == "codec.npz"]
            codes = unpack_codes(data[member.offset : member.offset + member.size], codec, span.key)
            found[span.key] = codes
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_has_the_same_codes_everywhere(made: Path, kind: str):
    """In shards, in the index, in what training sees, and in what a trained model hears of the file."""
    out = made / kind
    model = load(out / "model")
    stored = stored_codes(out)
    folder = TokenizerFolder.load(out / "tokenizer")
    assert len(stored) == NUM_SOUNDS
    (index,) = load_indices(find_shards(str(out / "shards" / "*.tar"), None), folder.hash)
    for row, frames in enumerate(index.num_frames_N.tolist()):
        key = index.key(row)
        path = made / f"{key.removeprefix('s')}.wav"
        (heard_KF,) = model.prompter.codes([as_audio(path)])
        np.testing.assert_array_equal(heard_KF.numpy(), stored[key])
        np.testing.assert_array_equal(encode_audio(str(path), folder), stored[key])
        assert frames == stored[key].shape[1]
        prompt = build_prompt("transcribe", folder, audio=stored[key])
        document = build_document(Sample(key, "one", codes_KF=stored[key]), "transcribe", folder)
        slots = -(-frames // folder.audio_pool)
        assert int((prompt.token_ids_T == folder.id("<|audio|>")).sum()) == slots
        assert int((document.token_ids_T == folder.id("<|audio|>")).sum()) == slots
    if kind in SHORT:
        assert sum(codes.shape[1] for codes in stored.values()) < 0.7 * sum(
            codes.shape[1] for codes in stored_codes(made / "kmeans").values()
        )
    verified = commands.verify([str(out / "shards")], str(out / "tokenizer"))
    assert (verified["documents"], verified["broken"]) == (NUM_SOUNDS if kind in SHORT else 2 * NUM_SOUNDS, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_two_steps_transcribes(made: Path, kind: str):
    model = load(made / kind / "model")
    seconds = [0.4 + 0.15 * number for number in range(NUM_SOUNDS)]
    longest, usual = PackedDataModule(made / kind / "recipe.yaml", batch_size=2).heard_seconds or (0.0, 0.0)
    assert longest == pytest.approx(max(seconds), abs=0.02) and np.abs(np.array(seconds) - usual).min() < 0.02
    assert model.generation.max_heard_seconds == longest
    paths = [made / f"{number}.wav" for number in (0, NUM_SOUNDS - 1)]
    assert all(isinstance(text, str) for text in model.transcribe(paths, max_new_tokens=6))
    said = model.transcribe(paths, timestamps=True, max_new_tokens=6)
    for text, lasts in zip(said, (seconds[0], seconds[-1]), strict=True):
        assert text.seconds == pytest.approx(lasts)
        for segment in text.segments:
            for word in segment.words or ():
                assert 0 <= word.start <= word.end <= lasts + 1e-3
    long = (np.concatenate([tones(1.8, 50), np.zeros(RATE, np.float32), tones(1.8, 51)]), RATE)
    in_windows = model.transcribe(long, max_new_tokens=4)
    assert isinstance(in_windows, Transcript) and in_windows.seconds == pytest.approx(4.6)
    fits = AskedModel(model).longest_seconds
    assert fits is not None and fits >= longest


@pytest.mark.parametrize("kind", SHORT)
def test_a_model_of_short_units_does_not_speak(made: Path, kind: str):
    model = load(made / kind / "model")
    for given in ({}, {"recording": made / "0.wav", "recording_text": "one"}):
        with pytest.raises(ValueError, match="heard but not spoken; to speak, take a tokenizer folder with a codec"):
            model.speak("one", **given)
    with pytest.raises(ValueError, match="heard but not spoken"):
        model.stream("speak", "one")
    recipe = json.loads((made / kind / "recipe.yaml").read_text())
    del recipe["sources"][0]["tasks"]
    (made / kind / "spoken.yaml").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="source 'heard' has the task speak: de-duplicated units have lost"):
        _ = PackedDataModule(made / kind / "spoken.yaml", batch_size=2).plan


def test_sounds_without_stored_codes_are_refused_where_they_cannot_be_counted(made: Path, tmp_path: Path):
    commands.build(made / "manifest.jsonl", tmp_path)
    assert commands.index(tmp_path, made / "kmeans" / "tokenizer")["frames"] > 0
    with pytest.raises(ValueError, match="no codes are stored with its sound, and how many de-duplicated units it has"):
        commands.index(tmp_path, made / "kmeans_bpe" / "tokenizer")


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["tokenizer", "kmeans", str(made / "manifest.jsonl"), "--num_clusters", str(CLUSTERS), "--deduplicate"]
    assert main([*arguments, "--bpe", str(TOKENS), "--out", str(tmp_path / "units")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["codebook_size"] == TOKENS and said["codes_per_frame"] < said["units_per_frame"] < 0.7
    frames = sum(codes.shape[1] for codes in stored_codes(made / "kmeans").values())
    assert said["frames"] == frames
    assert load_audio_tokenizer(tmp_path / "units").hash == said["hash"]
    for more, wanted in (
        (["--bpe", "12"], "BPE is to have 12 tokens; it must have more than the 12 units"),
        (["--bpe", "60000"], "there is only sound for"),
    ):
        assert main([*arguments, *more, "--out", str(tmp_path / "none")]) == 2
        assert wanted in capsys.readouterr().err
    assert main([*arguments[:-1], "--bpe", "20", "--out", str(tmp_path / "none")]) == 2
    assert "bpe is 20, which is over de-duplicated units" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------------- times
def test_words_of_codes_without_durations_are_as_of_the_frames_that_they_last(short):
    """A head that hears a letter a slot: the same slots, told as equally long frames or by durations."""
    blank, num_slots = 0, 12
    probs_SV = torch.full((num_slots, 30), 1e-6)
    for slot, letter in ((1, 1), (4, 2), (9, 3)):
        probs_SV[slot, letter] = 0.9
    probs_SV[:, blank] = 1 - probs_SV[:, 1:].sum(dim=1)
    model: Any = SimpleNamespace(
        ctc_head=lambda slots: probs_SV.log()[None], clip_embedding=lambda codes: codes, training=False,
        config=SimpleNamespace(audio=SimpleNamespace(pad_id=blank)),
        decoder=SimpleNamespace(head_weight_VD=torch.zeros(1)),
    )  # fmt: skip
    text: Any = SimpleNamespace(encode=lambda word: [ord(letter) - 96 for letter in word.strip()])
    wave = torch.from_numpy(tones(0.96, 3))[None]
    sound = AudioPart(wave, RATE)
    codes_KF = torch.zeros(1, num_slots, dtype=torch.int64)
    slow: Any = SimpleNamespace(text=text, audio_pool=1, frame_rate=12.5)
    fast: Any = SimpleNamespace(text=text, audio_pool=1, frame_rate=50.0)
    even = align_words(model, slow, codes_KF, sound, "a b c")
    assert even is not None and even.words is not None
    twice_KF = torch.zeros(1, 2 * num_slots, dtype=torch.int64)
    pooled: Any = SimpleNamespace(text=text, audio_pool=2, frame_rate=50.0)
    for told in (
        align_words(model, fast, codes_KF, sound, "a b c", torch.full((num_slots,), 4)),
        align_words(model, pooled, twice_KF, sound, "a b c", torch.tensor([1, 3] * num_slots)),
    ):
        assert told is not None and told.words is not None and told.missed == even.missed
        for word, wanted in zip(told.words, even.words, strict=True):
            assert (word.start, word.end) == pytest.approx((wanted.start, wanted.end))
    durations = torch.ones(num_slots, dtype=torch.int64)
    durations[0] = 48 - 11  # all others are said at the end
    late = align_words(model, fast, codes_KF, sound, "a b c", durations)
    assert late is not None and late.words is not None and late.words[1].start > 0.7 > even.words[1].start
