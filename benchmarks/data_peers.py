"""Other pipelines that do what `benchmarks/data.py` measures: pictures and captions to packed sequences of 2,048."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder

IMAGE_TOKENS = 144


def peer_document(
    folder: TokenizerFolder, transform: ImageTransform | None
) -> Callable[[Any, str], tuple[torch.Tensor, list[int]]]:
    """A peer's picture, decoded by PIL or stored for our decoder, and caption: pixels of 224 x 224, and our ids."""
    from torchvision.transforms import InterpolationMode, PILToTensor, Resize

    resize, to_tensor = Resize((224, 224), InterpolationMode.BICUBIC), PILToTensor()
    slots = [folder.id("<|image|>")] * IMAGE_TOKENS
    ends = folder.id("<|caption|>"), folder.id("<|end|>")

    def document(picture: Any, text: str) -> tuple[torch.Tensor, list[int]]:
        pixels = torch.from_numpy(transform(picture)) if transform else to_tensor(resize(picture))
        return pixels, [*slots, ends[0], *folder.text.encode(text), ends[1]]

    return document


def webdataset_pipeline(
    shard: Path, folder: TokenizerFolder, transform: ImageTransform | None, count: int
) -> Callable[[], int]:
    """Its tar reader and `decode("pil")`, torchvision's transforms, our tokens, documents laid end to end."""
    import webdataset

    make = peer_document(folder, transform)

    def document(sample: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
        return make(sample["jpg"], sample["txt"].decode() if isinstance(sample["txt"], bytes) else sample["txt"])

    def run() -> int:
        data = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)  # pyright: ignore
        if transform is None:
            data = data.decode("pil")
        done, ids, pictures, filled = 0, [], [], []
        for picture, tokens in data.map(document):
            if len(ids) + len(tokens) > 2048:
                filled.append((ids + [0] * (2048 - len(ids)), pictures))
                ids, pictures = [], []
            ids += tokens
            pictures.append(picture)
            if len(filled) == 4:
                ids_BT = torch.tensor([item for item, _ in filled])
                torch.stack([item for _, items in filled for item in items])
                assert ids_BT.shape == (4, 2048)
                filled = []
            done += 1
            if done >= count:
                break
        return done

    return run


def energon_folder(shard: Path) -> Path:
    """The shard in a folder that `energon prepare` has indexed: pictures with captions, all of them for training."""
    folder = shard.parent / "energon"
    folder.mkdir()
    (folder / shard.name).symlink_to(shard)
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder), "--non-interactive"]
    command += ["--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
    subprocess.run([*command, "--field-map", '{"image": "jpg", "caption": "txt"}'], capture_output=True, check=True)
    return folder


def energon_pipeline(shard: Path, folder: TokenizerFolder, count: int) -> Callable[[], int]:
    """Its indexed reader and PIL decoding, torchvision's transforms, our tokens, its packing.

    Of 128 documents in its buffer, a sequence takes the longest, then again and again the longest that still fits, as
    its users in Megatron-LM's multimodal example do. Nothing is shuffled; dataset and loader are made anew each time.
    """
    from megatron.energon import (  # pyright: ignore[reportMissingImports]
        Batch,
        CaptioningSample,
        DefaultTaskEncoder,
        Sample,
        SampleDecoder,
        WorkerConfig,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        reraise_exception,
        stateless,
    )

    document = peer_document(folder, None)

    @edataclass
    class Documents(Sample):
        ids: list[int]
        pictures: list[torch.Tensor]

    @edataclass
    class Filled(Batch):
        ids_BT: torch.Tensor
        images_NCHW: torch.Tensor

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pil")

        @stateless
        def encode_sample(self, sample: CaptioningSample) -> Documents:
            picture, ids = document(sample.image, sample.caption)
            return Documents.derive_from(sample, ids=ids, pictures=[picture])

        def select_samples_to_pack(self, samples: list[Documents]) -> list[list[Documents]]:
            packs: list[list[Documents]] = []
            samples.sort(key=lambda item: len(item.ids))
            while samples:
                packs.append([samples.pop()])
                room = 2048 - len(packs[-1][0].ids)
                while fitting := bisect_right(samples, room, key=lambda item: len(item.ids)):
                    packs[-1].append(samples.pop(fitting - 1))
                    room -= len(packs[-1][-1].ids)
            return packs

        @stateless
        def pack_selected_samples(self, samples: list[Documents]) -> Documents:
            ids = [token for item in samples for token in item.ids]
            pictures = [picture for item in samples for picture in item.pictures]
            return Documents.derive_from(samples[0], ids=ids + [0] * (2048 - len(ids)), pictures=pictures)

        @stateless
        def batch(self, samples: list[Documents]) -> Filled:
            images_NCHW = torch.stack([picture for item in samples for picture in item.pictures])
            return Filled.from_samples(
                samples, ids_BT=torch.tensor([item.ids for item in samples]), images_NCHW=images_NCHW
            )

    prepared = energon_folder(shard)
    here = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)

    def run() -> int:
        data = get_train_dataset(
            prepared, worker_config=here, task_encoder=Encoder(), batch_size=4, packing_buffer_size=128, repeat=False,
            shuffle_buffer_size=None, shuffle_over_epochs_multiplier=None, max_samples_per_sequence=None,
            parallel_shard_iters=1,
        )  # fmt: skip
        # what the others don't spend time on is off: collecting garbage every ten batches, a watchdog, pinned memory
        loader = get_savable_loader(data, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)
        loader.pin_memory = False
        done = 0
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            for batch in loader:
                assert batch.ids_BT.shape[1] == 2048
                done += len(batch.images_NCHW)
        assert done == count
        return done

    return run
