"""A document: its tokens, which of them are targets, and what hangs on them; and how one is written.

Shapes: T tokens, K codebooks, F frames, P frames after the codebook pattern, S features a picture, C channels, M tiles,
H and W pixels, N pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmllm.batch import Modality
from mmllm.data.samples.pointers import Pointer
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import AUDIO, IMAGE

NO_PIXELS = np.zeros((3, 0, 0), dtype=np.uint8)
"""Of a picture that has features, or isn't decoded yet."""


@dataclass(frozen=True)
class Clip:
    """A sound that is heard: codes, unpatterned, and where its slots start."""

    start: int
    codes_FK: np.ndarray
    num_slots: int
    target_ids: tuple[int, ...] = ()
    """Token ids of what is said, where known (for the CTC loss)."""


@dataclass(frozen=True)
class Picture:
    """A picture that is seen, or a tile of one, and where its slots start."""

    start: int
    pixels_3HW: np.ndarray
    """uint8; without height and width where there are features."""
    num_slots: int
    features_SC: np.ndarray | None = None
    """float16, what the image tower gives for it."""
    tile: tuple[int, int] = (0, 0)
    """Row and column in the picture that it is a tile of, from 1; (0, 0): the whole."""
    is_first: bool = True
    """Whether it isn't another tile of the picture before it."""


def tile_places(pictures: Iterable[Picture]) -> np.ndarray:
    """int64 [N, 3]: of each tile the number of its picture, its row and its column; [0, 3] where none is cut."""
    numbers, rows = -1, []
    for picture in pictures:
        numbers += picture.is_first
        rows.append((numbers, *picture.tile))
    is_cut = any(row or column for _, row, column in rows)
    return np.array(rows if is_cut else [], dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class Document:
    """One document or prompt: T tokens and what hangs on them. Labels are shifted when packed."""

    token_ids_T: np.ndarray
    """int64. At a frame of units, codebook 0's id (its filler's id at the delay's tail)."""
    targets_T: np.ndarray
    """bool: this token is to be predicted (from the position before it)."""
    modality_T: np.ndarray
    """int64, a `Modality`."""
    codes_TK: np.ndarray
    """int64: the frame's patterned codes (filler = codebook size), -1 where there are no units."""
    images: tuple[Picture, ...] = ()
    clips: tuple[Clip, ...] = ()
    filler: int = 0
    """The filler's code, which is never an audio label."""
    has_units: bool = False
    pointer: Pointer | None = None
    """None: nothing in it says where in its text it is."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        arrays = [self.token_ids_T, self.targets_T, self.modality_T, self.codes_TK]
        arrays += [picture.pixels_3HW for picture in self.images] + [clip.codes_FK for clip in self.clips]
        arrays += [picture.features_SC for picture in self.images if picture.features_SC is not None]
        if self.pointer is not None:
            arrays += vars(self.pointer).values()
        return 500 + sum(array.nbytes for array in arrays)

    def with_pixels(self, pixels: Iterable[np.ndarray]) -> Document:
        """Its pictures, those that have features apart, with pixels `[3, H, W]` of their own."""
        rest = iter(pixels)
        images = tuple(
            replace(picture, pixels_3HW=next(rest)) if picture.features_SC is None else picture
            for picture in self.images
        )
        return replace(self, images=images)

    def part(self, start: int, stop: int) -> Document:
        """Tokens `[start, stop)` of a document that has neither pictures nor clips."""
        assert not self.images and not self.clips, "only documents without slots are split"
        here = slice(start, stop)
        columns = self.token_ids_T[here], self.targets_T[here], self.modality_T[here], self.codes_TK[here]
        return Document(*columns, filler=self.filler)


class DocumentWriter:
    """Appends text, slots and units, and gives the `Document`."""

    def __init__(self, folder: TokenizerFolder) -> None:
        self._folder = folder
        self._ids: list[int] = []
        self._runs: list[tuple[int, bool, int]] = []  # tokens, whether they are targets, their modality
        self._units: list[tuple[int, np.ndarray]] = []
        self._pointers: list[tuple[int, Pointer]] = []
        self._images: list[Picture] = []
        self._clips: list[Clip] = []

    def ids(self, token_ids: Iterable[int], is_target: bool, modality: Modality = Modality.TEXT) -> None:
        """Append tokens as they are."""
        before = len(self._ids)
        self._ids.extend(token_ids)
        count = len(self._ids) - before
        self._runs.append((count, is_target, int(modality)))

    def image(self, pixels_3HW: np.ndarray, features_SC: np.ndarray | None = None) -> None:
        """Append the slots of a picture that isn't cut."""
        self._picture(pixels_3HW, features_SC=features_SC)

    def tiles(self, pixels_M3HW: np.ndarray, places: Sequence[tuple[int, int]]) -> None:
        """Append a picture's slots, tile by tile."""
        for number, (pixels_3HW, place) in enumerate(zip(pixels_M3HW, places, strict=True)):
            self._picture(pixels_3HW, tile=place, is_first=number == 0)

    def _picture(self, pixels_3HW: np.ndarray, **more: Any) -> None:
        count = self._folder.num_image_tokens
        self._images.append(Picture(len(self._ids), pixels_3HW, count, **more))
        self.ids([self._folder.id(IMAGE)] * count, False, Modality.IMAGE)

    def clip(self, codes_KF: np.ndarray, target_ids: Iterable[int] = ()) -> None:
        """Append the slots of a sound that is heard."""
        num_slots = self._folder.num_audio_slots(codes_KF.shape[1])
        self._clips.append(Clip(len(self._ids), codes_KF.T.astype(np.int64), num_slots, tuple(target_ids)))
        self.ids([self._folder.id(AUDIO)] * num_slots, False, Modality.AUDIO)

    def units(self, codes_KF: np.ndarray, is_target: bool, pointer: Pointer | None = None) -> None:
        """Append frames of units under the folder's pattern.

        Args:
            codes_KF: of a sound.
            is_target: whether they are to be predicted.
            pointer: of the positions that predict them, from the one before them on.

        Raises:
            ValueError: the folder's codes can't be spoken.
        """
        self._folder.check_speech()
        vocabulary = self._folder.vocabulary
        codes_KP = pattern_codes(codes_KF, self._folder)
        if pointer is not None:
            self.point(pointer)
        self._units.append((len(self._ids), codes_KP.T))
        self.ids((codes_KP[0] + vocabulary.codebook_start(0)).tolist(), is_target, Modality.UNITS)

    def point(self, pointer: Pointer) -> None:
        """Give a pointer to the last position so far and those that will follow it."""
        assert self._ids, "speech follows a token, where its first frame is predicted"
        self._pointers.append((len(self._ids) - 1, pointer))

    def _pointer(self, num_tokens: int) -> Pointer | None:
        if not self._pointers:
            return None
        pieces, used = [], 0
        for start, pointer in self._pointers:
            pieces += [Pointer.none(start - used), pointer]
            used = start + len(pointer.places_T)
        return Pointer.join([*pieces, Pointer.none(num_tokens - used)])

    def finish(self) -> Document:
        """The document so far."""
        num_tokens = len(self._ids)
        counts, targets, modality = zip(*self._runs, strict=True) if self._runs else ((), (), ())
        codes_TK = np.full((num_tokens, self._folder.vocabulary.num_codebooks), -1, dtype=np.int64)
        for start, codes_PK in self._units:
            codes_TK[start : start + len(codes_PK)] = codes_PK
        return Document(
            np.array(self._ids, dtype=np.int64),
            np.repeat(np.array(targets, dtype=bool), counts),
            np.repeat(np.array(modality, dtype=np.int64), counts),
            codes_TK,
            tuple(self._images),
            tuple(self._clips),
            self._folder.vocabulary.filler,
            bool(self._units),
            self._pointer(num_tokens),
        )


def pattern_codes(codes_KF: np.ndarray, folder: TokenizerFolder) -> np.ndarray:
    """Codes `[K, F]` as the frames `[K, P]` that are predicted, under the folder's pattern: those spoken."""
    codes = torch.as_tensor(np.ascontiguousarray(codes_KF[: folder.num_codebooks]), dtype=torch.int64)
    return folder.apply_pattern(codes).numpy()
