from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mmllm.batch import SoundBatch
from mmllm.training.audio_losses import Balancer, LogSpectrumLoss, MultiScaleMelLoss, level_loss
from mmllm.training.codec_module import CodecLossConfig, CodecModule, character_ctc, pitch_loss, si_sdr_db
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm_tokenizers.audio import load_audio_tokenizer
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.sound_quality import level_db
from mmllm_tokenizers.spectrum import mel_filters
from tests.training_fixtures import quiet_trainer

TINY = CodecConfig(sample_rate=2000, num_filters=4, ratios=(2, 4, 5), dimension=8, num_codebooks=2, codebook_size=16)

VOICE = CodecConfig(
    sample_rate=2000, ratios=(2, 4, 5), decoder="source_filter", num_bands=8, dimension=11, num_codebooks=2,
    codebook_size=16, decoder_hidden_size=8, search_width=2, warmup_batches=3, quantizer_dropout=0.0,
)  # fmt: skip


class Waves(pl.LightningDataModule):
    """Chords; each batch depends on its number alone."""

    def __init__(self, with_texts: bool = False) -> None:
        super().__init__()
        self.with_texts = with_texts

    def train_dataloader(self) -> WaveLoader:
        return WaveLoader(self.with_texts)


class WaveLoader:
    def __init__(self, with_texts: bool) -> None:
        self.with_texts, self.position = with_texts, 0

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            waves = chords(self.position)[:, None]
            yield (waves, ["ab", "", "c", "de"]) if self.with_texts else waves

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def chords(seed: int, num_samples: int = 1200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hz_N21 = torch.rand(4, 2, 1, generator=generator) * 300 + 80
    return (torch.sin(hz_N21 * torch.arange(num_samples) * 2 * torch.pi / 2000) * 0.25).sum(dim=1)


def _module(**settings: Any) -> CodecModule:
    torch.manual_seed(0)
    return CodecModule(TINY, optimizer=OptimizerConfig(lr=3e-3, warmup=0.05), **settings)


def _voice_module(**settings: Any) -> CodecModule:
    """Computed latents and a source-filter decoder."""
    torch.manual_seed(0)
    losses = CodecLossConfig(l1=0.0, mel=0.0, log_spectrum=1.0, level=0.1, pitch=1.0)
    optimizer = OptimizerConfig(lr=3e-3, warmup=0.05, weight_decay=0.0)
    return CodecModule(VOICE, losses=losses, optimizer=optimizer, **settings)


def _fit(module: CodecModule, steps: int, *callbacks: pl.Callback, data: Waves | None = None, **settings: Any) -> None:
    with quiet_lightning():
        trainer = quiet_trainer(*callbacks, max_steps=steps, **settings)
        trainer.fit(module, datamodule=data or Waves(), weights_only=True)


def test_a_few_steps_make_the_sound_better_and_the_export_is_the_same_codec(tmp_path: Path) -> None:
    module = _module(out=str(tmp_path / "codec"))
    wave = chords(10_000)
    loss = module.mel_loss
    module.eval()
    with torch.no_grad():
        before = float(loss(module.codec(wave).wave, wave))
    module.train()
    _fit(module, 60)
    module.eval()
    with torch.no_grad():
        codes = module.codec.encode(wave)
        after = float(loss(module.codec(wave).wave, wave))
    assert after < 0.8 * before
    assert torch.equal(load_audio_tokenizer(tmp_path / "codec").encode(wave[0], 2000), codes[0])


def test_a_voice_is_as_loud_as_recorded_and_its_decoder_learns(tmp_path: Path) -> None:
    module = _voice_module(out=str(tmp_path / "codec"))
    wave = chords(10_000)
    _fit(module, 4)  # the warm-up, and the step that makes the codebooks
    module.eval()

    def distance() -> float:
        with torch.no_grad():
            return float(torch.stack(module.log_spectrum_loss(module.codec(wave).wave, wave)).sum())

    before = distance()
    module.train()
    codebooks = module.codec.codebooks_KVD.clone()
    _fit(module, 60)
    module.eval()
    assert distance() < 0.95 * before
    assert torch.equal(module.codec.codebooks_KVD, codebooks)
    loaded = load_audio_tokenizer(tmp_path / "codec")
    for clip in wave:
        assert abs(float(level_db(loaded.decode(loaded.encode(clip, 2000)), clip))) < 2


def test_a_warmup_step_teaches_the_decoder_nothing_and_a_short_training_has_codebooks(tmp_path: Path) -> None:
    module = _voice_module(out=str(tmp_path / "codec"))
    before = {name: value.clone() for name, value in module.codec.state_dict().items()}
    _fit(module, 2)
    after = load_audio_tokenizer(tmp_path / "codec")
    changed = {name for name, value in module.codec.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"quantizer.{name}" for name in ("codebooks", "counts", "sums", "num_batches")}
    assert torch.equal(after.codebooks_KVD, module.codec.codebooks_KVD)


def test_ranks_that_end_in_the_warm_up_make_the_codebooks_together(tmp_path: Path) -> None:
    """Rank 0 alone would wait for the others for ever."""
    root = Path(__file__).parent.parent
    paths = [str(root), str(root / "tokenizers"), str(root / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "codec_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one, other)
    assert torch.equal(load_audio_tokenizer(tmp_path / "codec").codebooks_KVD, one)


@pytest.mark.parametrize(("make", "stop"), [(_module, 3), (_voice_module, 2), (_voice_module, 4)])
def test_resuming_a_codec_equals_not_stopping(tmp_path: Path, make: Any, stop: int) -> None:
    def run(steps: int, name: str, ckpt: Any = None) -> CodecModule:
        module = make()
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        with quiet_lightning():
            trainer = quiet_trainer(saving, _StopAfter(steps), max_steps=6, enable_checkpointing=True)
            trainer.fit(module, datamodule=Waves(), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run(6, "whole")
    run(stop, "cut")
    resumed = run(6, "cut", tmp_path / "cut" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


class _StopAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_a_batch_whose_clips_all_failed_trains_nothing() -> None:
    wave_N1T = chords(1)[:, None]
    for ctc in (0.0, 1.0):
        module = _module(losses=CodecLossConfig(ctc=ctc, ctc_width=16))
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        full = SoundBatch(wave_N1T, ["ab", "", "c", "de"], 4)
        assert float(module.training_step(full, 0).detach()) != 0 and module.window.num_batches == 1
        loss = module.training_step(SoundBatch(wave_N1T[:0], [], 0), 1)
        loss.backward()
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert float(loss.detach()) == 0 and grads and not any(grad.any() for grad in grads)
        assert module.window.num_batches == 1
        module.validation_step(SoundBatch(wave_N1T[:0], None, 0), 0)


def test_the_ctc_head_learns_and_needs_texts() -> None:
    module = _module(losses=CodecLossConfig(ctc=1.0, ctc_width=16))
    _fit(module, 3, data=Waves(with_texts=True))
    assert module.ctc_head is not None
    with pytest.raises(ValueError, match=r"losses.ctc is set but the data gives no texts"):
        _fit(_module(losses=CodecLossConfig(ctc=1.0)), 1)


def test_character_ctc_is_a_mean_over_characters_of_clips_with_text() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 257, 12)
    (both, left_out), (alone, _) = character_ctc(logits, ["abc", ""]), character_ctc(logits[:1], ["abc"])
    assert float(both) == pytest.approx(float(alone)) and left_out == 0
    log_probs = logits[:1].log_softmax(1).permute(2, 0, 1)
    targets = torch.tensor([[b + 1 for b in b"abc"]])
    expected = (
        torch.nn.functional.ctc_loss(log_probs, targets, torch.tensor([12]), torch.tensor([3]), reduction="sum") / 3
    )
    assert float(alone) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "fits"), [("abcdefgh", True), ("abcdefghi", False), ("aabbccd", False), ("aaaa", True)]
)
def test_a_clip_without_frames_enough_for_its_text_leaves_the_loss_of_its_neighbour(text: str, fits: bool) -> None:
    """Eight frames; a blank goes between two equal characters."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 257, 8)).requires_grad_()
    alone, none_left_out = character_ctc(logits[:1], ["hi you"])
    both, left_out = character_ctc(logits, ["hi you", text])
    assert (none_left_out, left_out) == (0.0, 0.0 if fits else 0.5)
    (grad,) = torch.autograd.grad(both, logits)
    assert bool(grad[1].any()) == fits and grad.isfinite().all()
    if fits:
        own, _ = character_ctc(logits[1:], [text])
        mean = (6 * alone.detach() + len(text) * own.detach()) / (6 + len(text))
        torch.testing.assert_close(both.detach(), mean)
    else:
        torch.testing.assert_close(both.detach(), alone.detach())
        nothing, share = character_ctc(logits[1:], [text])
        assert not nothing.detach() and share == 1 and nothing.requires_grad


def test_mel_loss_is_zero_for_equal_waves_and_grows_with_noise() -> None:
    loss, wave = MultiScaleMelLoss(2000), chords(1)
    assert float(loss(wave, wave)) == 0
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    small, large = float(loss(wave + 0.001 * noise, wave)), float(loss(wave + 0.1 * noise, wave))
    assert 0 < small < large
    silence = torch.zeros(2, 1200, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(silence, torch.zeros(2, 1200)), silence)
    assert not grad.any()


@pytest.mark.parametrize(("rate", "window", "mels"), [(8000, 64, 8), (8000, 1024, 64), (24000, 256, 32), (2000, 64, 8)])
def test_mel_filters_cover_every_band(rate: int, window: int, mels: int) -> None:
    filters_MW = mel_filters(rate, window, mels)
    assert filters_MW.shape == (mels, window // 2 + 1)
    assert (filters_MW >= 0).all() and (filters_MW.sum(dim=1) > 0).all()
    centres = filters_MW.argmax(dim=1)
    assert (centres.diff() >= 0).all()


def test_the_balancer_gives_each_loss_its_share_whatever_its_scale() -> None:
    output = torch.randn(3, 50, requires_grad=True)
    target = torch.randn(3, 50)
    balancer = Balancer({"a": 1.0, "b": 3.0, "off": 0.0})
    losses = {"a": 1000 * (output - target).abs().sum(), "b": 1e-4 * output.square().sum()}
    (got,) = torch.autograd.grad(balancer(losses, output), output)
    grads = {key: torch.autograd.grad(loss, output, retain_graph=True)[0] for key, loss in losses.items()}
    norms = {key: grad.norm(dim=1).mean() for key, grad in grads.items()}
    expected = 0.25 * grads["a"] / norms["a"] + 0.75 * grads["b"] / norms["b"]
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_si_sdr_ignores_scale() -> None:
    wave = chords(2)
    assert (si_sdr_db(0.1 * wave, wave) > 60).all()
    assert (si_sdr_db(torch.flip(wave, dims=[0]), wave) < 20).all()


def test_log_spectrum_loss_equals_its_definition() -> None:
    loss, wave_NT, target_NT = LogSpectrumLoss(2000), chords(1), chords(2)
    assert loss.windows == [32, 64, 128]
    bands, bins = [], []
    for window in loss.windows:
        filters_MW = mel_filters(2000, window, window // 8)
        magnitudes = []
        for x_NT in (wave_NT, target_NT):
            padded_NT = torch.nn.functional.pad(x_NT[:, None], (window // 2, window // 2), mode="reflect")[:, 0]
            frames_NFS = padded_NT.unfold(1, window, window // 4) * torch.hann_window(window)
            magnitudes.append((torch.fft.rfft(frames_NFS).abs().square() + 1e-5 * window / 64).sqrt())
        ours, theirs = magnitudes
        bins.append((ours.log() - theirs.log()).abs().mean())
        ours, theirs = ((m @ filters_MW.T + 1e-3).log() for m in magnitudes)
        bands.append((ours - theirs).abs().mean())
    found = loss(wave_NT, target_NT)
    torch.testing.assert_close(
        torch.stack(found), torch.stack([torch.stack(bands).mean(), torch.stack(bins).mean()]), rtol=1e-4, atol=1e-5
    )
    assert [float(part) for part in loss(target_NT, target_NT)] == [0, 0]


def test_level_loss_is_the_distance_of_levels_alone() -> None:
    wave_NT = chords(3)
    assert float(level_loss(0.5 * wave_NT, wave_NT)) == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-3)
    assert float(level_loss(-wave_NT.flip(1), wave_NT)) == pytest.approx(0, abs=1e-5)
    silence = torch.zeros(2, 100, requires_grad=True)
    assert torch.autograd.grad(level_loss(silence, chords(4)[:2, :100]), silence)[0].isfinite().all()


def test_pitch_loss_counts_octaves_where_there_is_voice() -> None:
    codec = Codec(VOICE).eval().requires_grad_(False)
    hz_NT = torch.full((2, 2000), 100.0)
    voice_NT = sum((torch.cumsum(hz_NT, dim=1) * k * 2 * torch.pi / 2000).cos() for k in range(1, 8)) * 0.05
    assert isinstance(voice_NT, Tensor)
    output = codec(voice_NT)
    output.pitch = torch.full_like(output.pitch, 100.0).log2() if output.pitch is not None else None
    assert float(pitch_loss(output, VOICE.num_bands)) < 0.03
    assert output.pitch is not None
    output.pitch = output.pitch + 1
    assert float(pitch_loss(output, VOICE.num_bands)) == pytest.approx(1, abs=0.03)
    silent = codec(torch.zeros(1, 2000))
    assert float(pitch_loss(silent, VOICE.num_bands)) == 0


def test_bad_losses_are_named() -> None:
    with pytest.raises(ValueError, match=r"losses.pitch is 1.0, but decoder 'seanet' has no pitch"):
        CodecModule(TINY, losses=CodecLossConfig(pitch=1.0))
    with pytest.raises(ValueError, match=r"losses\.mel is -1"):
        CodecLossConfig(mel=-1)
    with pytest.raises(ValueError, match="all 0"):
        CodecLossConfig(l1=0, mel=0)
