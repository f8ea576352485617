"""The wheel, built and installed without network outside the checkout, is whole."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")], ROOT)
    (wheel,) = (folder / "dist").glob("mmllm-*.whl")
    target = folder / "site"
    run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], folder
    )
    return target


def run(command: list[str], folder: Path, **environment: str) -> str:
    values = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_wheel_has_everything_and_runs(installed, tmp_path):
    """Without `site` (-S) no .pth file of an editable install puts the checkout on the path."""
    python = [sys.executable, "-S"]
    search_path = os.pathsep.join([str(installed), *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}])
    command = [*python, str(installed / "bin" / "mmllm")]
    for package in ("mmllm", "mmllm_kernels", "mmllm_tokenizers"):
        where = run([*python, "-c", f"import {package}; print({package}.__file__)"], tmp_path, PYTHONPATH=search_path)
        assert Path(where.strip()) == installed / package / "__init__.py"
    assert "quickstart" in run([*command, "--help"], tmp_path, PYTHONPATH=search_path)
    configs = run([*command, "configs", "ls"], tmp_path, PYTHONPATH=search_path).split()
    shipped = [path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
    assert set(shipped) <= set(configs)
    out = run([*command, "quickstart", "--out", "run", "--max_steps", "3"], tmp_path, PYTHONPATH=search_path)
    assert "Report:" in out
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
