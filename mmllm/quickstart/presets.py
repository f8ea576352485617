"""Presets: sizes and minutes that go together, by name."""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.quickstart import machine


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
        gpu_gigabytes: memory that the decoder's training takes of it, by `mmllm fit --print_estimate`, in 1e9 bytes.
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
    gpu_gigabytes: int = 0
    is_one_process: bool = False
    max_workers: int = machine.MAX_WORKERS
    decoder: str = "decoder"
    codec: str | None = None


TINY = Preset(
    "tiny", "two minutes: a try-out on a few rows, whose scores mean nothing", minutes=2.0, data_share=0.03,
    is_one_process=True,
)  # fmt: skip
DEMO = Preset("demo", "the demo, or your rows on a CPU: fixed steps, or --minutes")
ONE_GPU = Preset(
    "one_gpu", "an hour of your photos and speech on one GPU of 80 GB, of which it takes about 58: open_clip ViT-B/16, "
    "EnCodec, 300M active parameters",
    minutes=60.0, needs_rows=True, on_gpu=True, gpu_gigabytes=58, is_one_process=True, max_workers=16,
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


def check_gpu(preset: Preset) -> None:
    """Asks for the memory that a preset's training takes of a GPU: before anything is built.

    Raises:
        ValueError: the GPU has less, or torch can't use it.
    """
    has, wants = machine.gpu_bytes() / 1e9, preset.gpu_gigabytes
    if has < wants:
        found = f"the GPU here has {has:.0f} GB" if has else "torch can't use the GPU that is here"
        raise ValueError(
            f"--preset {preset.name} takes about {wants} GB of a GPU's memory, and {found}; give --preset demo, or "
            f"copy its config (`mmllm configs cp quickstart/{preset.decoder}.yaml mine.yaml`) and make it smaller"
        )
