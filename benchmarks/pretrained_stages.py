"""The stages of `pretrained.py`: each a command that is shown, runs as a process of its own, and is done once.

A stage that is done is noted in `OUT/pretrained.json`; run again, the run goes on with the first that is not.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from mmllm.quickstart.processes import Processes
from mmllm.ticker import clock

HERE = Path(__file__).resolve().parent
STATE = "pretrained.json"
Command = Sequence[str | Path]


class StageFailed(SystemExit):
    """A command ended with an error, which it has printed itself."""


class Stages:
    """What of a run is done, and how long it took.

    Args:
        out: the run's folder.
        settings: of the run; a folder of others is refused.
        num_cores: for which commands take threads.
        shares_process: all `mmllm` commands run in one process, and scripts in this one: for a try-out, where starting
            processes would take longer than their work.
    """

    def __init__(self, out: Path, settings: dict[str, Any], num_cores: int, shares_process: bool) -> None:
        self.out, self.settings, self.num_cores, self.shares_process = out, settings, num_cores, shares_process
        self.seconds: dict[str, float] = {}
        """Of each stage that is done."""
        self.processes = Processes()
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE).is_file():
            saved = json.loads((out / STATE).read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                raise SystemExit(f"{out} holds a run with {saved['settings']}, not {settings}; give another --out")
            self.seconds = saved["seconds"]

    def title(self, text: str) -> None:
        """Shows which part of the story begins."""
        print(f"\n== {text}", flush=True)

    def run(self, name: str, *command: str | Path, threads: int = 0) -> None:
        """Runs `mmllm COMMAND`, or `python SCRIPT …` of this folder where the command begins with a script.

        Args:
            name: of the stage.
            command: the command line without `mmllm`.
            threads: of the process; 0: as many as there are cores, but one for each rank of a training.

        Raises:
            StageFailed: it ended with an error.
        """
        line = [str(word) for word in command]
        is_script = line[0].endswith(".py")
        shown = shlex.join(["python", f"benchmarks/{line[0]}", *line[1:]] if is_script else ["mmllm", *line])
        if name in self.seconds:
            print(f"done before: {shown}", flush=True)
            return
        print(f"\n[{clock(sum(self.seconds.values()))}] {name}\n$ {shown}", flush=True)
        began = time.monotonic()
        code = self._script(line) if is_script else self._mmllm(line, threads)
        if code:
            raise StageFailed(f"the stage {name!r} failed with exit code {code}; mend what it says and run this again")
        self._note(name, time.monotonic() - began)

    def side_by_side(self, stages: Sequence[tuple[str, Command]]) -> None:
        """Runs commands of one thread, as many at once as there are cores."""
        if self.shares_process:
            for name, command in stages:
                self.run(name, *command)
            return
        with ThreadPoolExecutor(self.num_cores) as lanes:
            for done in [lanes.submit(self.run, name, *command, threads=1) for name, command in stages]:
                done.result()

    def _note(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 2)
        new = self.out / f"{STATE}.new"
        new.write_text(json.dumps({"settings": self.settings, "seconds": self.seconds}, indent=1), encoding="utf-8")
        os.replace(new, self.out / STATE)

    def _mmllm(self, line: list[str], threads: int) -> int:
        if self.shares_process:
            return self.processes.run_shared(line)
        return self.processes.run(line, threads or (1 if line[0] == "fit" else self.num_cores))

    def _script(self, line: list[str]) -> int:
        if self.shares_process:
            import_module(Path(line[0]).stem).main(line[1:])
            return 0
        environment = {"GOMP_SPINCOUNT": "30000", **os.environ, "OMP_NUM_THREADS": str(self.num_cores)}
        return subprocess.run([sys.executable, HERE / line[0], *line[1:]], env=environment, check=False).returncode
