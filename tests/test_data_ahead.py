"""Planning ahead in a thread: the same values, errors at their place, no thread left, no fork while one runs."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmllm.data import commands
from mmllm.data.loading.ahead import THREAD_NAME, Ahead
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.data_ranks import rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # machines of few cores
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def threads() -> list[threading.Thread]:
    gc.collect()
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert not threads()
    yield
    assert not threads()


def of_two(values: Sequence[Any]) -> bool:
    return len(values) >= 2


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_values_come_in_order_and_end() -> None:
    ahead = Ahead(iter(range(1000)), of_two)
    assert not threads(), "it begins with the first value"
    assert list(ahead) == list(range(1000))
    assert not threads() and next(ahead, None) is None


def test_an_error_comes_in_its_place() -> None:
    def values() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("the third is bad")

    ahead = Ahead(values(), of_two)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the third is bad"):
        next(ahead)
    assert not threads() and next(ahead, None) is None


def test_it_is_ahead_by_no_more_than_is_enough() -> None:
    made: list[int] = []
    values = (made.append(number) or number for number in itertools.count())
    with Ahead(values, of_two) as ahead:
        assert next(ahead) == 0
        wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert len(made) == 3 and next(ahead) == 1
        wait_until(lambda: len(made) == 4)


@pytest.mark.parametrize("how", ["closed", "forgotten", "forgotten in a circle", "left by an error"])
def test_the_thread_ends_with_its_iterator(how: str) -> None:
    ahead: Any = Ahead(itertools.count(), of_two)
    assert next(ahead) == 0 and len(threads()) == 1
    match how:
        case "closed":
            ahead.close()
            assert next(ahead, None) is None
        case "forgotten":
            del ahead
        case "forgotten in a circle":
            circle = [ahead]
            circle.append(circle)
            del ahead, circle
        case _:
            with pytest.raises(KeyError), ahead:
                raise KeyError
    assert not threads()


def test_no_thread_runs_while_the_process_forks() -> None:
    """A child would inherit a lock that nobody lets go of."""
    lock = threading.Lock()

    def values() -> Iterator[int]:
        for number in itertools.count():
            with lock:
                time.sleep(0.002)
            yield number

    with Ahead(values(), lambda made: len(made) > 200) as ahead:
        for number in range(20):
            assert next(ahead) == number
            child = os.fork()
            if not child:
                os._exit(0 if lock.acquire(timeout=5) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ahead")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    return root


def loader_of(made: Path, num_steps: int = 30, num_workers: int = 0, plan: Plan | None = None) -> PackedLoader:
    folder = TokenizerFolder.load(made / "tok")
    plan = plan or open_plan(recipe_from_dict(recipe_dict(made / "s", made / "tok")), 2, folder)
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    return PackedLoader(plan, dataset, num_steps, num_workers=num_workers)


def noted_windows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The windows that are planned, each with the name of the thread."""
    windows: dict[int, str] = {}
    draw = plan._window

    def noted(cursors: Any, step: int, window: int) -> Any:
        windows[window] = threading.current_thread().name
        return draw(cursors, step, window)

    monkeypatch.setattr(plan, "_window", noted)
    return windows


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_next_window_is_planned_before_it_is_asked_for(
    made: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    loader = loader_of(made, num_workers=num_workers)
    windows = noted_windows(loader._plan, monkeypatch)
    batches = iter(loader)
    for _ in range(20):
        here = next(batches).state["window"]
        wait_until(lambda here=here: here + 1 in windows)
    assert set(windows.values()) == {THREAD_NAME}
    del batches


def test_several_threads_may_plan_at_once(made: Path) -> None:
    """As the loaders of several ranks in one process do: what one has found, another may drop before it is read."""
    source = loader_of(made)._plan.sources[0]
    wanted = [source._block(epoch, 0)[1].tolist() for epoch in range(4)]

    class Interrupted(dict):
        is_new = True

        def __contains__(self, key: object) -> bool:
            is_in = super().__contains__(key)
            if self.is_new:
                self.is_new = False
                other = threading.Thread(target=lambda: [source._block(epoch, 0) for epoch in (2, 1)])
                other.start()
                other.join()
            return is_in

    for epoch in (0, 3):
        for kept in ({}, {(epoch, 0): source._block(epoch, 0)[1:]}):
            source._blocks = Interrupted(kept)
            assert source._block(epoch, 0)[1].tolist() == wanted[epoch]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_plan_comes_with_its_step(
    made: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    loader = loader_of(made, num_workers=num_workers)
    wanted = [rows(batch) for batch in loader_of(made)]
    draw = loader._plan._window

    def failing(cursors: Any, step: int, window: int) -> Any:
        if window == 2:
            raise ValueError("the third window can't be packed")
        return draw(cursors, step, window)

    monkeypatch.setattr(loader._plan, "_window", failing)
    found = []
    with pytest.raises(ValueError, match="the third window can't be packed"):
        found.extend(rows(batch) for batch in loader)
    assert not threads()
    assert found == wanted[: len(found)]
    assert loader.state_dict()["step"] == len(found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_that_start_while_a_plan_is_made_ahead(made: Path, num_workers: int) -> None:
    """As those of validation in the middle of an epoch, and of the next epoch."""
    recipe = recipe_from_dict(recipe_dict(made / "s", made / "tok"))
    data = PackedDataModule(recipe, 2, num_workers, val_recipe=recipe, num_val_sequences=6, steps_per_epoch=7)
    data.setup("fit")
    train, validation = data.train_dataloader(), data.val_dataloader()
    assert isinstance(validation, PackedLoader)
    seen, validated = [], []
    for _ in range(2):
        for number, batch in enumerate(train):
            seen.append(rows(batch))
            if number in (2, 5):
                validated.append([rows(batch) for batch in validation])
    assert seen == [rows(batch) for batch in loader_of(made, 14)]
    assert len(validated[0]) == 3 and all(scores == validated[0] for scores in validated)
