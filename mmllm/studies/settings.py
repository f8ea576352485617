"""An arm's config and recipe: the base's, with the keys of its level."""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmllm import paths
from mmllm.parsing import read_yaml
from mmllm.studies.study import Arm, Step, Study

STEPS_SHARE = "share_of_steps"
"""A value `{share_of_steps: 0.5}` becomes that share of the run's steps: a schedule that all horizons have alike."""
_ENDS_ELSEWHERE = (
    "max_epochs", "max_time", "min_epochs", "min_steps", "fast_dev_run", "limit_train_batches", "overfit_batches",
)  # fmt: skip
"""Of a trainer: what ends a training before or after its steps, so that it has another budget than it says."""


@dataclass(frozen=True)
class Settings:
    """One training's config and recipe, as plain values."""

    config: dict[str, Any]
    recipe: dict[str, Any]

    def with_steps(self, num_steps: int) -> Settings:
        """With a horizon, of which schedules take their shares."""
        config = copy.deepcopy(self.config)
        put(config, "trainer.max_steps", num_steps)
        put(config, "model.init_args.max_seconds", None)
        return Settings(resolved(config, num_steps), resolved(self.recipe, num_steps))

    def with_seconds(self, seconds: float) -> Settings:
        """Bounded by a clock.

        Raises:
            ValueError: a schedule is a share of steps, whose number isn't known then.
        """
        if _has_shares(self.config) or _has_shares(self.recipe):
            raise ValueError(
                f"a value is {STEPS_SHARE}, and budget is in seconds, so that nobody knows how many steps a run has; "
                f"give a budget of flops or samples, or a number of steps"
            )
        config = copy.deepcopy(self.config)
        put(config, "trainer.max_steps", -1)
        put(config, "model.init_args.max_seconds", seconds)
        return replace(self, config=config)


@dataclass(frozen=True)
class Base:
    """The base's config and recipe as they are read, once for all arms."""

    study: Study
    data: Path
    config: dict[str, Any]
    recipe: dict[str, Any]

    @staticmethod
    def read(study: Study, data: Path) -> Base:
        """Reads both; a config that isn't a file is a shipped one.

        Raises:
            FileNotFoundError, ValueError: there is none, or it isn't YAML.
        """
        return Base(study, data, read_values(study.config, data, "config"), read_values(study.recipe, data, "recipe"))

    def settings(self, arm: Arm, step: Step, run: Path) -> Settings:
        """Of one training of an arm; without a horizon.

        Raises:
            ValueError: a key isn't there, or a source; the message names the level.
        """
        study, level = self.study, self.study.level(arm)
        places = {"data": str(self.data), "run": str(run), "seed": str(arm.seed)}
        config, recipe = copy.deepcopy(self.config), copy.deepcopy(self.recipe)
        where = f"factors.{arm.factor}.levels.{arm.level}"
        for name, keys in (("set", study.set), (f"{where}.config", level.config), (f"{where}.fit", step.fit or {})):
            put_all(config, keys, name)
        for name, keys in (
            ("set_recipe", study.set_recipe), (f"{where}.recipe", level.recipe), (f"{where}.steps", step.recipe)
        ):  # fmt: skip
            put_all(recipe, keys, name)
        recipe["seed"] = arm.seed
        for source in recipe["sources"]:
            if arm.share < 1 and (not study.curve_sources or source["name"] in study.curve_sources):
                source["share"] = arm.share * (source.get("share") or 1.0)
        check_trainer(config, where)
        put(config, "seed_everything", arm.seed)
        put(config, "model.init_args.out", str(run / step.out))
        for_one_process(config, run, step.out)
        return Settings(filled(config, places), filled(recipe, places))


def check_trainer(config: Mapping[str, Any], where: str) -> None:
    """Refuses what would end a training elsewhere than its budget does.

    Raises:
        ValueError: the trainer has such a key; the message names it.
    """
    trainer = config.get("trainer") or {}
    given = [key for key in _ENDS_ELSEWHERE if trainer.get(key) not in (None, False, -1)]
    if given:
        raise ValueError(
            f"{where}: the config has trainer.{given[0]}: {trainer[given[0]]!r}, which ends a training elsewhere than "
            f"the budget does; take it out: `set: {{trainer.{given[0]}: null}}`"
        )


def for_one_process(config: dict[str, Any], run: Path, name: str) -> None:
    """Logs and checkpoints of the base would be every run's: each has a log of its own, and begins anew if it is ended.

    Callbacks that write are left out: what a study compares is scored afterwards.
    """
    trainer = config.setdefault("trainer", {})
    logger = {"save_dir": str(run), "name": f"{name}.logs", "version": ""}
    trainer["logger"] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}]
    writes = ("ModelCheckpoint", "Samples", "RoutingLog")
    trainer["callbacks"] = [
        callback for callback in trainer.get("callbacks", ()) if not str(callback["class_path"]).endswith(writes)
    ]
    trainer["enable_checkpointing"] = False


# --------------------------------------------------------------------------------------------------------- dotted keys
def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a key; None takes it out. In a list an item is named by its `name`, or by the end of its `class_path`.

    Raises:
        ValueError: a part of the key leads to what has no keys, or names no item.
    """
    *parents, last = dotted.split(".")
    place: Any = values
    for depth, key in enumerate(parents):
        if isinstance(place, dict):
            found = place.get(key)
            place[key] = place = {} if found is None else found
        elif isinstance(place, list):
            place = _item(place, key, dotted)
        if not isinstance(place, dict | list):
            raise ValueError(f"{'.'.join(parents[: depth + 1])} is {place!r}, which has no key {last!r}")
    if isinstance(place, list):
        item = _item(place, last, dotted, is_needed=not isinstance(value, Mapping))
        if item is not None:
            place.remove(item)
        if value is not None:
            place.append(value)
    elif value is None:
        place.pop(last, None)
    else:
        place[last] = copy.deepcopy(value)


def _item(items: list[Any], key: str, dotted: str, is_needed: bool = True) -> Any:
    for item in items:
        if isinstance(item, dict) and (item.get("name") == key or str(item.get("class_path")).endswith(f".{key}")):
            return item
    if not is_needed:
        return None
    names = [str(item.get("name") or item.get("class_path")) for item in items if isinstance(item, dict)]
    raise ValueError(f"{dotted} names {key!r}, and the list has {', '.join(names) or 'no item with a name'}")


def put_all(values: dict[str, Any], keys: Mapping[str, Any], where: str) -> None:
    """Sets keys; errors say where these stand."""
    for dotted, value in keys.items():
        try:
            put(values, dotted, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


# -------------------------------------------------------------------------------------------------------- placeholders
def filled(value: Any, places: Mapping[str, str]) -> Any:
    """With `{name}` in all texts replaced; in patterns of files, by what stands for itself."""
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    if isinstance(value, str):
        for name, text in places.items():
            value = value.replace(f"{{{name}}}", glob.escape(text) if "*" in value else text)
    return value


def resolved(value: Any, num_steps: int) -> Any:
    """With `{share_of_steps: s}` as a number of steps, 1 at least where s is above 0."""
    if isinstance(value, dict):
        if set(value) == {STEPS_SHARE}:
            share = value[STEPS_SHARE]
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"{STEPS_SHARE} is {share!r}; it must be a number from 0 to 1")
            return max(1, round(share * num_steps)) if share else 0
        return {key: resolved(item, num_steps) for key, item in value.items()}
    return [resolved(item, num_steps) for item in value] if isinstance(value, list) else value


def _has_shares(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {STEPS_SHARE} or any(_has_shares(item) for item in value.values())
    return isinstance(value, list) and any(_has_shares(item) for item in value)


def read_values(name: str, data: Path, what: str) -> dict[str, Any]:
    """A config or a recipe: a file, or a shipped one by name.

    Raises:
        FileNotFoundError, ValueError: there is none, or it isn't YAML.
    """
    path = Path(filled(name, {"data": str(data)}))
    if not path.is_file():
        path = paths.config_path(f"data_recipes/{name}" if what == "recipe" and "/" not in name else name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a {what} is a mapping of keys, and this is {type(values).__name__}")
    return values
