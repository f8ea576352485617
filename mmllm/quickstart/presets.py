"""Presets: sizes and minutes that go together, by name."""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.quickstart.machine import MAX_WORKERS


@dataclass(frozen=True)
class Preset:
    """What `mmllm quickstart --preset NAME` chooses.

    Attributes:
        name: of the preset.
        about: one line of help.
        minutes: where `--minutes` is not given; None: the demo's fixed steps.
        data_share: of the demo's rows, where no data is given.
        needs_rows: it is for somebody's own rows, not for the demo's.
        on_gpu: trainings run on a GPU, which must be there.
        is_one_process: all stages share one process; starting others would take longer than so short a run.
        max_workers: processes that make and build data.
        decoder: which of the shipped quickstart configs the decoder's is made of.
        codec: the name of an EnCodec model; None: a codec is trained on the rows' sounds.
    """

    name: str
    about: str
    minutes: float | None = None
    data_share: float = 1.0
    needs_rows: bool = False
    on_gpu: bool = False
    is_one_process: bool = False
    max_workers: int = MAX_WORKERS
    decoder: str = "decoder"
    codec: str | None = None


TINY = Preset(
    "tiny", "two minutes: a try-out on a few rows, whose scores mean nothing", minutes=2.0, data_share=0.03,
    is_one_process=True,
)  # fmt: skip
DEMO = Preset("demo", "the demo, or your rows on a CPU: fixed steps, or --minutes")
ONE_GPU = Preset(
    "one_gpu", "an hour of your photos and speech on one GPU: open_clip ViT-B/16, EnCodec, 300M active parameters",
    minutes=60.0, needs_rows=True, on_gpu=True, is_one_process=True, max_workers=16,
    decoder="one_gpu", codec="encodec_24khz",
)  # fmt: skip
PRESETS = {preset.name: preset for preset in (TINY, DEMO, ONE_GPU)}


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
