"""The data that quickstart makes where it is given none: scenes, speech, interleaved documents, prose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmllm.quickstart.interleaved import make_interleaved
from mmllm.quickstart.prose import make_prose
from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.speech import make_speech
from mmllm.quickstart.synthesis import Espeak, voices


@dataclass(frozen=True)
class DemoSizes:
    """How many rows of each kind."""

    scenes: int = 16_000
    words: int = 1_500
    phrases: int = 1_500
    sentences: int = 1_800
    joined: int = 1_200
    """Recordings of two sentences, or three."""
    spoken: int = 6_000
    """Further sentences and phrases to learn to speak from: what is heard is learnt from fewer, and a decoder of this
    size would learn those by heart."""
    interleaved: int = 3_000
    test: int = 504
    """Of each task, and of each set that is scored apart."""
    sample_rate: int = 8000

    def scaled(self, share: float) -> DemoSizes:
        """Fewer rows (not below a handful), for trying things out."""
        values = {name: max(12, int(getattr(self, name) * share)) for name in
                  ("scenes", "words", "phrases", "sentences", "joined", "spoken", "interleaved", "test")}  # fmt: skip
        return DemoSizes(**values, sample_rate=self.sample_rate)


def make_demo_data(
    out: str | Path, seed: int = 0, sizes: DemoSizes | None = None, num_processes: int = 1
) -> dict[str, list[str]]:
    """Makes everything under `out`; equal arguments, but for `num_processes`, give equal bytes.

    Args:
        out: folder to write to.
        seed: chooses everything.
        sizes: how many rows.
        num_processes: processes that synthesize speech; above one they are spawned.

    Returns:
        Paths of the manifests under "train" and "test", and under "left_out" what could not be made and why.
    """
    out, sizes = Path(out), sizes or DemoSizes()
    made = [make_scenes(out / "scenes", sizes.scenes, sizes.test, sizes.test, seed)]
    why_mute = why_no_speech()
    if why_mute is None:
        made.append(
            make_speech(
                out / "speech", sizes.words, sizes.phrases, sizes.sentences, sizes.test, sizes.test, seed,
                sizes.sample_rate, num_processes, sizes.joined, sizes.spoken, voices(heldout=False),
            )
        )  # fmt: skip
    made.append(
        make_interleaved(
            out / "interleaved", sizes.interleaved, sizes.test, seed, why_mute is None, num_processes=num_processes
        )
    )
    made.append(make_prose(out / "prose", seed, min(sizes.test, 504)))
    result = {
        "train": [str(manifests["train"]) for manifests in made],
        "test": [str(path) for manifests in made for split, path in manifests.items() if split != "train"],
        "left_out": [] if why_mute is None else [f"speech is left out: {why_mute}"],
    }
    (out / "manifests.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def why_no_speech() -> str | None:
    """Why espeak-ng can't be used here; None where it can."""
    try:
        Espeak().close()
    except (ModuleNotFoundError, OSError, RuntimeError) as error:
        return str(error)
    return None
