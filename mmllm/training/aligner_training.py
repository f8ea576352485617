"""Trains an aligner: letters from log-mel spectra with CTC, in a minute or two on one core.

It begins with letters spread evenly over each sound, as hidden Markov models of speech do (a "flat start"), which saves
CTC its long plateau. Spectra are altered at random, so that other voices, rooms, levels and codecs are heard too: bands
are shifted and masked (Park et al. 2019, https://arxiv.org/abs/1904.08779), gains, noise and blur are added.

Shapes: N sounds, S steps of a spectrum, M mel bands, F frames (two steps each), L labels.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.roles import mark
from mmllm.training.optimizers import OptimizerConfig, build_optimizer, learning_rate_factor, parameter_groups
from mmllm_tokenizers.aligner import RANGE_DB, Aligner, AlignerConfig, AlignerNetwork, padded
from mmllm_tokenizers.alignment import text_words
from mmllm_tokenizers.letter_paths import (
    FRAME_SECONDS,
    SILENCE_DB,
    frames_needed,
    path_peaks,
    said_characters,
    silent_frames,
    text_labels,
)
from mmllm_tokenizers.lexicon import BLANK, SPACE

MAX_WORDS = 5000
"""More are no lexicon: nearly any spelling would be near one of them, and all are tried at each frame."""
_MAX_LAG_SECONDS = 0.06
_MEASURED = 400
"""Sounds from which the lag is measured."""


@dataclass(frozen=True)
class AlignerTraining:
    """How long and how an aligner is trained.

    Attributes:
        seconds: by the clock; not used where `steps` is given.
        steps: of the optimizer; the same number on the same sounds and machine gives the same aligner.
        seed: of weights, order and alterations.
        batch_steps: steps of spectra in a batch, a hundredth of a second each.
        muon_lr: peak rate of the hidden matrices, which Muon moves.
        lr: peak rate of all else.
        flat_share: share of the run in which letters are spread evenly.
    """

    seconds: float = 90.0
    steps: int | None = None
    seed: int = 0
    batch_steps: int = 2000
    muon_lr: float = 0.02
    lr: float = 3e-3
    flat_share: float = 0.15

    def __post_init__(self) -> None:
        if self.steps is None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; train for more than 0 seconds")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; train for at least 1 step")


def known_characters(texts: Sequence[str]) -> str:
    """The letters and digits of texts, casefolded, each once."""
    return "".join(sorted({character for text in texts for character in said_characters(text)}))


def known_words(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of texts, casefolded, without punctuation around them; none where there are above `MAX_WORDS`."""
    words: set[str] = set()
    for word in (word for text in texts for word in text_words(text.casefold())):
        said = [place for place, character in enumerate(word) if said_characters(character)]
        words.add(word[said[0] : said[-1] + 1])
    return tuple(sorted(words)) if len(words) <= MAX_WORDS else ()


def train_aligner(
    config: AlignerConfig,
    mels_SM: Sequence[Tensor],
    texts: Sequence[str],
    training: AlignerTraining,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Aligner:
    """Trains an aligner on sounds and what is said in them.

    Args:
        config: of the aligner; has the texts' characters.
        mels_SM: what an aligner of this config hears of each sound (`Aligner.mel`); halves keep memory small.
        texts: of each sound.
        training: how.
        tick: is told how much is done: seconds or steps.

    Raises:
        ValueError: no sound is long enough for its text.
    """
    targets = [text_labels(text, config.characters) for text in texts]
    usable = [i for i, labels in enumerate(targets) if len(mels_SM[i]) >= 2 * frames_needed(labels)]
    if not usable:
        raise ValueError(
            "no sound is long enough for its text, so no aligner can be trained; are the texts these sounds'?"
        )
    mels_SM, targets = [mels_SM[i] for i in usable], [targets[i] for i in usable]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = AlignerNetwork(config)
    _fit(network, mels_SM, targets, training, tick)
    every = -(-len(mels_SM) // _MEASURED)
    lag_seconds = measured_lag(Aligner(network), mels_SM[::every], targets[::every])
    network.config = replace(config, lag_seconds=round(lag_seconds, 4))
    return Aligner(network)


def _fit(
    network: AlignerNetwork,
    mels_SM: Sequence[Tensor],
    targets: Sequence[Sequence[int]],
    training: AlignerTraining,
    tick: Callable[[int, int], None],
) -> None:
    mark(network.head, weight="head")
    settings = OptimizerConfig(lr=training.lr, muon=True, muon_steps=4, betas=(0.9, 0.98), weight_decay=0.01)
    groups = parameter_groups(network, settings)
    for group in groups:
        group["peak_lr"] = training.muon_lr if group["use_muon"] else training.lr
    optimizer = build_optimizer(groups, settings)
    generator = torch.Generator().manual_seed(training.seed)
    evenly_F = [even_labels(mel, labels) for mel, labels in zip(mels_SM, targets, strict=True)]
    total = float(training.steps or training.seconds)
    network.train()
    began = time.monotonic()
    for step, batch in enumerate(_batches([len(mel) for mel in mels_SM], training)):
        done = float(step) if training.steps is not None else time.monotonic() - began
        tick(int(min(done, total)), int(total))
        if done >= total:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor((done + 1e-9) / total, settings)
        mel_NSM, num_steps_N = altered([mels_SM[i] for i in batch], generator)
        log_probs_NFL, num_frames_N = network(mel_NSM, num_steps_N)
        if done < training.flat_share * total:
            loss = _even_loss(log_probs_NFL, num_frames_N, [evenly_F[i] for i in batch])
        else:
            loss = _ctc_loss(log_probs_NFL, num_frames_N, [targets[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def _batches(lengths: Sequence[int], training: AlignerTraining) -> Iterator[list[int]]:
    """Sounds of about equal length together, in a new order each time all were heard; endless."""
    rng = random.Random(training.seed)
    while True:
        order = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.8, 1.25))
        batches: list[list[int]] = [[]]
        for i in order:
            longest = max((lengths[j] for j in batches[-1]), default=0)
            if batches[-1] and (len(batches[-1]) + 1) * max(longest, lengths[i]) > training.batch_steps:
                batches.append([])
            batches[-1].append(i)
        rng.shuffle(batches)
        yield from batches


def _ctc_loss(log_probs_NFL: Tensor, num_frames_N: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Mean over sounds of the loss a label; sounds that are too short for their text count nothing."""
    num_labels_N = torch.tensor([len(labels) for labels in targets])
    labels = torch.tensor([label for row in targets for label in row])
    losses_N = F.ctc_loss(
        log_probs_NFL.transpose(0, 1), labels, num_frames_N, num_labels_N, BLANK, "none", zero_infinity=True
    )
    return (losses_N / num_labels_N).mean()


def _even_loss(log_probs_NFL: Tensor, num_frames_N: Tensor, evenly_F: Sequence[Tensor]) -> Tensor:
    """Cross-entropy a frame against labels that are stretched as the sounds were."""
    wanted_NF = torch.full(log_probs_NFL.shape[:2], -1)
    for row, (labels_F, num_frames) in enumerate(zip(evenly_F, num_frames_N.tolist(), strict=True)):
        wanted_NF[row, :num_frames] = labels_F[torch.arange(num_frames) * len(labels_F) // num_frames]
    return F.nll_loss(log_probs_NFL.flatten(0, 1), wanted_NF.flatten(), ignore_index=-1)


def even_labels(mel_SM: Tensor, labels: Sequence[int]) -> Tensor:
    """int64 [F]: labels spread evenly from the first to the last frame that is not silent, blanks around them."""
    padded_1SM, _ = padded([mel_SM.float()])
    level_F = padded_1SM[0].amax(dim=1).reshape(-1, 2).amax(dim=1)
    loud = (level_F > level_F.max() - SILENCE_DB).nonzero()[:, 0]
    first, num_loud = int(loud[0]), int(loud[-1] - loud[0]) + 1
    labels_F = torch.full((len(level_F),), BLANK)
    labels_F[first : first + num_loud] = torch.tensor(labels)[torch.arange(num_loud) * len(labels) // num_loud]
    return labels_F


# ------------------------------------------------------------------------------------------------------- alterations
def altered(mels_SM: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spectra as if said by others, faster or slower, through other recorders: ([N, S, M], steps of each)."""
    mel_NSM, num_steps_N = padded([_stretched(mel, generator) for mel in mels_SM])
    is_sound_NS1 = (torch.arange(mel_NSM.shape[1]) < num_steps_N[:, None])[..., None]
    mel_NSM = _shifted_bands(mel_NSM, generator)
    num_sounds, _, num_mels = mel_NSM.shape
    gain_N1M = F.interpolate(3 * torch.randn(num_sounds, 1, 5, generator=generator), num_mels, mode="linear")
    mel_NSM = _blurred(mel_NSM + gain_N1M, generator)
    loudest_N11 = mel_NSM.masked_fill(~is_sound_NS1, -torch.inf).amax((1, 2), keepdim=True)
    color_N1M = F.interpolate(3 * torch.randn(num_sounds, 1, 4, generator=generator), num_mels, mode="linear")
    noise_NSM = 3 * torch.randn(mel_NSM.shape, generator=generator) + color_N1M + loudest_N11
    mel_NSM = torch.maximum(mel_NSM, noise_NSM - _uniform(33, 60, num_sounds, generator)[..., None])
    cut_N11 = torch.randint(2 * num_mels // 3, 2 * num_mels, (num_sounds, 1, 1), generator=generator)
    mel_NSM = torch.where(torch.arange(num_mels) >= cut_N11, loudest_N11 - 2 * RANGE_DB, mel_NSM)
    return _masked(mel_NSM, num_steps_N, loudest_N11 - RANGE_DB / 2, generator), num_steps_N


def _uniform(low: float, high: float, num: int, generator: torch.Generator) -> Tensor:
    """[num, 1]."""
    return low + (high - low) * torch.rand(num, 1, generator=generator)


def _stretched(mel_SM: Tensor, generator: torch.Generator) -> Tensor:
    """At 0.85 to 1.18 of its speed, its pitch as it was."""
    num_steps = max(2, round(len(mel_SM) * float(_uniform(0.85, 1.18, 1, generator))))
    return F.interpolate(mel_SM.float().T[None], num_steps, mode="linear", align_corners=False)[0].T


def _shifted_bands(mel_NSM: Tensor, generator: torch.Generator) -> Tensor:
    """Each sound's bands moved by up to 9% of the scale, as of longer and shorter throats."""
    num_sounds, num_steps, num_mels = mel_NSM.shape
    place_NM = (torch.arange(num_mels) * _uniform(0.91, 1.1, num_sounds, generator)).clamp(max=num_mels - 1)
    lower_NM = place_NM.long().clamp(max=num_mels - 2)
    share_N1M = (place_NM - lower_NM)[:, None]
    lower_NSM = lower_NM[:, None].expand(num_sounds, num_steps, num_mels)
    return mel_NSM.gather(2, lower_NSM) * (1 - share_N1M) + mel_NSM.gather(2, lower_NSM + 1) * share_N1M


def _blurred(mel_NSM: Tensor, generator: torch.Generator) -> Tensor:
    """Averaged over up to seven steps and five bands, as small codecs and echoes do it."""
    steps, bands = (int(torch.randint(0, most, (1,), generator=generator)) for most in (4, 3))
    size = (2 * steps + 1, 2 * bands + 1)
    return F.avg_pool2d(mel_NSM[:, None], size, 1, (steps, bands), count_include_pad=False)[:, 0]


def _masked(mel_NSM: Tensor, num_steps_N: Tensor, level_N11: Tensor, generator: torch.Generator) -> Tensor:
    """Two runs of up to six bands and two of up to eight steps set to one level."""
    num_sounds, num_steps, num_mels = mel_NSM.shape
    for _ in range(2):
        for most, size, room_N1, dim in (
            (6, num_mels, torch.tensor(num_mels), 1), (8, num_steps, num_steps_N[:, None], 2)
        ):  # fmt: skip
            width_N1 = torch.randint(0, most + 1, (num_sounds, 1), generator=generator)
            start_N1 = torch.rand(num_sounds, 1, generator=generator) * (room_N1 - width_N1).clamp(min=0)
            place = torch.arange(size)
            masked = (place >= start_N1.long()) & (place < start_N1.long() + width_N1)
            mel_NSM = torch.where(masked.unsqueeze(dim), level_N11, mel_NSM)
    return mel_NSM


# --------------------------------------------------------------------------------------------------------------- lag
def measured_lag(aligner: Aligner, mels_SM: Sequence[Tensor], targets: Sequence[Sequence[int]]) -> float:
    """By how many seconds the network tells the border of two words too late; 0 where that can't be measured.

    CTC tells a letter at its surest frame, not at its first. Where a word really begins is known of each sound's first
    one, in front of which is silence. From there to the peak of its first letter it is about as long as it is within a
    sound to the same letter, where the border was taken for the middle between two peaks. Letters count as often as
    they are in both places.
    """
    onsets: dict[int, list[float]] = {}
    halves: dict[int, list[float]] = {}
    for mel_SM, log_probs_FL, labels in zip(mels_SM, aligner.log_probs(mels_SM), targets, strict=True):
        peaks, silent_F = path_peaks(log_probs_FL, labels), silent_frames(mel_SM)
        onset = float((~silent_F).argmax()) * FRAME_SECONDS
        onsets.setdefault(labels[0], []).append(peaks[0].middle - onset)
        for place, label in enumerate(labels):
            if label == SPACE and not silent_F[peaks[place - 1].last : peaks[place + 1].first + 1].any():
                half = (peaks[place + 1].middle - peaks[place - 1].middle) / 2
                halves.setdefault(labels[place + 1], []).append(half)
    weights = {label: min(len(onsets[label]), len(halves[label])) for label in onsets.keys() & halves.keys()}
    if not weights:
        return 0.0
    lag = sum(weights[label] * (fmean(onsets[label]) - fmean(halves[label])) for label in sorted(weights))
    return min(max(lag / sum(weights.values()), -_MAX_LAG_SECONDS), _MAX_LAG_SECONDS)
