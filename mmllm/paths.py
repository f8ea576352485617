"""Where the shipped configs and recipes lie: inside the package (wheel) or beside it (checkout)."""

from __future__ import annotations

import shutil
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of LightningCLI configs."""
    return _shipped("configs")


def recipes_dir() -> Path:
    """The folder of data recipes."""
    return _shipped("data_recipes")


def list_configs() -> list[str]:
    """Names of all shipped files, as `copy_config` takes them: `quickstart/decoder.yaml`, `data_recipes/…`."""
    files = [*configs_dir().rglob("*.yaml"), *configs_dir().glob("launch/*.s*")]
    configs = [path.relative_to(configs_dir()).as_posix() for path in files]
    recipes = [f"data_recipes/{path.relative_to(recipes_dir()).as_posix()}" for path in recipes_dir().rglob("*.yaml")]
    return sorted(configs) + sorted(recipes)


def find_config(name: str) -> Path:
    """A file of this path, or the shipped config of this name (`.yaml` may be left out); else the path as it is."""
    path = Path(name)
    shipped = f"{name.removesuffix('.yaml')}.yaml"
    return config_path(shipped) if not path.is_file() and shipped in list_configs() else path


def config_path(name: str) -> Path:
    """The file of a shipped config.

    Raises:
        ValueError: no config has that name.
    """
    names = list_configs()
    wanted = name if name in names or name.endswith(".yaml") else f"{name}.yaml"
    if wanted not in names:
        raise ValueError(f"no shipped config is called {name!r}; `mmllm configs ls` lists them: {', '.join(names)}")
    if wanted.startswith("data_recipes/"):
        return recipes_dir() / wanted.removeprefix("data_recipes/")
    return configs_dir() / wanted


def copy_config(name: str, destination: str | Path) -> Path:
    """Copies a shipped config to a file or into a folder.

    Returns:
        The file written.

    Raises:
        ValueError: no config has that name.
        FileExistsError: the file is there already.
    """
    source, destination = config_path(name), Path(destination)
    if destination.is_dir():
        destination = destination / source.name
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it or give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, destination))


def _shipped(name: str) -> Path:
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of mmllm has no {name}/; install it again from a whole checkout")
