"""Speech as sound while its units are still being spoken.

Units are decoded in pieces (`mmllm_tokenizers.decoder_streams`) whose borders depend on frame numbers alone, then
stretched and given their rests as they come. A whole sound is made by the same stream (`sound_of`): streamed or not,
however many frames come at once, it is the same to the bit.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmllm.inference.pacing import Pace, PacedStream, Said
from mmllm.inference.voices import Recording
from mmllm_tokenizers.alignment import WordTime, text_words
from mmllm_tokenizers.audio_tokenizer import check_codes
from mmllm_tokenizers.folder import TokenizerFolder

FIRST_FRAMES, MAX_FRAMES = 3, 48
"""Of the first piece, and of the later ones."""
_GROWTH = 1.5
"""A piece is larger by this than the one before it: who listens has heard no more than that when it is there, if frames
are spoken at more than this times real time."""


def next_border(frame: int) -> int:
    """Where a piece ends that begins with a frame, counted from the first that is heard: 3, 7, 13, 22, 36, 57, …."""
    border, num_frames = FIRST_FRAMES, float(FIRST_FRAMES)
    while border <= frame:
        num_frames = min(num_frames * _GROWTH, MAX_FRAMES)
        border += int(num_frames)
    return border


class SoundStream:
    """The sound of units that are being spoken.

    Args:
        tokenizer: of the model that speaks.
        text: what is said; its words are timed where pointers come with the units.
        pace: whose rate and rests count.
        recording: whose voice it is said in: the sound is decoded behind the recording's, which is left out.

    Raises:
        ValueError: the tokenizer has no codec.
    """

    def __init__(
        self,
        tokenizer: TokenizerFolder,
        text: str = "",
        pace: Pace | None = None,
        recording: Recording | None = None,
    ):
        audio = tokenizer.require_audio()
        self._audio, self._text, self._whole_text = audio, text, text
        self.sample_rate, self._frame_rate = audio.sample_rate, tokenizer.frame_rate
        self._pace = pace or Pace()
        self._paced = PacedStream(self.sample_rate, self._pace)
        self._decoder = audio.decoder_stream()
        self._pointers: list[np.ndarray] = []
        self._num_before, self._num_cut = 0, 0
        if recording is not None:
            codes_KF = recording.codes_KF[: tokenizer.num_codebooks]
            self._whole_text = f"{recording.text} {text}"
            self._num_before = codes_KF.shape[1]
            self._num_cut = round(self._num_before / self._frame_rate * self.sample_rate)
            self._decoder.push(codes_KF)
            known = self._num_before - self._decoder.lookahead
            if known > 0 and self._decoder.is_ready(known):  # so that the first piece need not wait for it
                self._num_cut -= self._decoder.decode_to(known).shape[-1]

    @property
    def is_streamable(self) -> bool:
        """False: the codec's decoder needs all units, and all sound comes at the end."""
        return self._decoder.is_streamable

    @property
    def words(self) -> tuple[WordTime, ...]:
        """When each word is said, as far as it has come, rests included; final once the sound is finished."""
        said = self._said(is_whole=False)
        if said is None:
            return ()
        words = self._text.split()
        times = {number: said.word(number) for number, word in enumerate(words) if text_words(word)}
        found = {number: WordTime(words[number], *time) for number, time in times.items() if time is not None}
        return tuple(self._paced.times(found))

    def push(self, codes_KF: Tensor, pointer_F: Tensor | None = None) -> np.ndarray:
        """More units: float32 samples [T] that are final, perhaps none.

        Args:
            codes_KF: of frames that are final, pattern undone.
            pointer_F: which letter of the text (of a recording's and the text) each says.

        Raises:
            ValueError: codes of a wrong shape or out of range.
        """
        check_codes(codes_KF, self._audio.num_codebooks, self._audio.codebook_size)
        self._decoder.push(codes_KF)
        if pointer_F is not None:
            self._pointers.append(pointer_F.numpy())
        pieces = [np.zeros(0, dtype=np.float32)]
        while self._decoder.is_ready(border := self._border()):
            pieces.append(self._paced.push(self._decoded(border), self._said(is_whole=False)))
        return np.concatenate(pieces)

    def finish(self, is_whole: bool = True) -> np.ndarray:
        """The last samples.

        Args:
            is_whole: whether the text was said to its end: a rest may stand behind its last word.
        """
        end, pieces = self._decoder.num_frames, []
        while self._decoder.num_decoded < end:
            border = min(self._border(), end) if self.is_streamable else end
            pieces.append(self._paced.push(self._decoded(border), self._said(is_whole=False)))
        return np.concatenate([*pieces, self._paced.finish(self._said(is_whole))])

    def _border(self) -> int:
        return self._num_before + next_border(self._decoder.num_decoded - self._num_before)

    def _decoded(self, border: int) -> np.ndarray:
        wave = self._decoder.decode_to(border)
        wave_T = wave.mean(dim=0) if wave.dim() == 2 else wave
        num_cut = min(self._num_cut, len(wave_T))
        self._num_cut -= num_cut
        return wave_T[num_cut:].numpy().astype(np.float32, copy=False)

    def _said(self, is_whole: bool) -> Said | None:
        if not self._pointers:
            return None
        num_before = len(self._whole_text.split()) - len(self._text.split())
        pointer_F = np.concatenate(self._pointers)
        return Said.of(pointer_F, self._whole_text, num_before, self._frame_rate, is_whole)


def sound_of(
    codes_KF: Tensor,
    tokenizer: TokenizerFolder,
    pointer_F: Tensor | None = None,
    text: str = "",
    pace: Pace | None = None,
    recording: Recording | None = None,
    is_whole: bool = True,
) -> tuple[np.ndarray, tuple[WordTime, ...]]:
    """All sound of a `SoundStream`, float32 [T], and when its words are said."""
    stream = SoundStream(tokenizer, text, pace, recording)
    samples = np.concatenate([stream.push(codes_KF, pointer_F), stream.finish(is_whole)])
    return samples, stream.words


def decode_in_chunks(codes_KF: Tensor, tokenizer: TokenizerFolder) -> np.ndarray:
    """Sound float32 [T] of units alone, decoded as they are when they are streamed."""
    return sound_of(codes_KF.to(torch.int64), tokenizer)[0]
