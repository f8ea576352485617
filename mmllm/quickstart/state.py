"""What a run keeps in `DIR/quickstart.json`: its settings, the stages that are done, its clock and its memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmllm.quickstart.monitor import MemoryMonitor
from mmllm.quickstart.plan import STATE_FILE, read_json

FORMAT_VERSION = 1
SAVE_SECONDS = 5.0
"""How often the clock is saved while a stage runs: so much of it is lost at most when the process is killed."""


class RunState:
    """One run's state, read where the run goes on and saved as it does.

    Attributes:
        settings: the run's arguments.
        stages: those that are done: `name`, `seconds`, `command`, `commit`.
        model: time and size of the weights that were evaluated.
        is_rescored: the model that is there is another than the run made; its scores don't belong to the run's time.
        is_finished: all is done but the report, which may be written again; time and memory are no longer counted.
        memory: samples this process's memory, while it runs.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Reads what an earlier part of the run has left in `out`, which is made.

        Raises:
            ValueError: it is a run with other settings.
        """
        self.out, self.settings = out, settings
        self.memory: MemoryMonitor | None = None
        out.mkdir(parents=True, exist_ok=True)
        saved = read_json(out / STATE_FILE)
        self.stages: list[dict[str, Any]] = saved.get("stages", [])
        if self.stages:
            self._check_settings(saved["settings"])
        self.model: list[int] | None = saved.get("model")
        self.is_rescored = bool(saved.get("rescored", False))
        self.is_finished = bool(saved.get("finished", False))
        self._seconds_before = float(saved.get("seconds", 0.0))
        self._peak_before = int(saved.get("peak_rss_bytes", 0))
        self._started = self._saved_at = time.monotonic()
        self._lock = threading.Lock()

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        """Refuses to go on with a run of other settings; only `minutes` may grow, until the decoder is trained."""
        changed = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        old, new = before.get("minutes"), self.settings["minutes"]
        has_more_time = old is not None and new is not None and new > old and not self.is_done("fit decoder")
        if changed and not (changed == ["minutes"] and has_more_time):
            only = "; minutes may only grow, and only until the decoder is trained" if changed == ["minutes"] else ""
            raise ValueError(
                f"{self.out} holds a run with other settings ({', '.join(changed)} differ{only}); give another --out, "
                f"or remove it"
            )

    def is_done(self, name: str) -> bool:
        """Whether a stage is."""
        return any(stage["name"] == name for stage in self.stages)

    def add(self, stage: dict[str, Any]) -> None:
        """Notes a stage that is done; see `stages`."""
        self.stages.append(stage)
        self.save()

    @property
    def seconds(self) -> float:
        """Wall time so far, earlier parts of this run included."""
        return self._seconds_before + (0.0 if self.is_finished else time.monotonic() - self._started)

    @property
    def seconds_left(self) -> float | None:
        """Of the minutes; None without them."""
        minutes = self.settings["minutes"]
        return None if minutes is None else max(0.0, 60 * minutes - self.seconds)

    @property
    def peak_rss_bytes(self) -> int:
        """Memory at the most, in earlier parts of this run as well."""
        now = 0 if self.is_finished or self.memory is None else self.memory.peak_rss_bytes
        return max(now, self._peak_before)

    def save(self) -> None:
        """Writes the file anew."""
        new = self.out / f"{STATE_FILE}.new"
        with self._lock:
            state = {
                "format_version": FORMAT_VERSION,
                "settings": self.settings,
                "seconds": self.seconds,
                "peak_rss_bytes": self.peak_rss_bytes,
                "finished": self.is_finished,
                "model": self.model,
                "rescored": self.is_rescored,
                "stages": self.stages,
            }
            new.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            os.replace(new, self.out / STATE_FILE)
            self._saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        """Saves the clock, from another thread; what can't be written now is said when the stage ends."""
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            with suppress(OSError):
                self.save()

    def finish(self) -> None:
        """Stops counting time and memory."""
        if self.is_finished:
            return
        with self._lock:
            self._seconds_before, self._peak_before = self.seconds, self.peak_rss_bytes
            self.is_finished = True
        self.save()

    def go_on(self) -> None:
        """Counts again: somebody struck a stage from those that are done."""
        if self.is_finished:
            self.is_finished, self._started = False, time.monotonic()
