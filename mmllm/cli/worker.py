"""A process that runs commands as they come in on its standard input; see `mmllm.quickstart.processes`.

One JSON list a line; the exit code of each goes, a line each, to the file descriptor that the only argument names.
"""

from __future__ import annotations

import json
import os
import sys

from mmllm.cli.main import main


def serve(answers_fd: int) -> None:
    """Runs commands until the input ends, which it does when the process that sends them is gone."""
    with os.fdopen(answers_fd, "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            print(main(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    try:
        serve(int(sys.argv[1]))
    except KeyboardInterrupt:  # between two commands; within one it is that command's exit code
        sys.exit(130)
