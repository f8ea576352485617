"""YAML as it is meant: a key that is there twice is an error, not the last of both."""

from pathlib import Path

import pytest

from mmllm.parsing import read_yaml


def test_a_key_twice_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\n")
    with pytest.raises(ValueError, match=r"a\.yaml: not YAML: the key 'c' is there twice\n.*line 5"):
        read_yaml(path)
    path.write_text("a: 1\n'a': 2\n")
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        read_yaml(path)


def test_keys_that_are_merged_may_be_given_anew(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "x: &x {a: 1, b: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: *y, a: 4}\nlist: [{a: 1}, {a: 2}]\n1: 5\n'1': 6\n"
    )
    values = read_yaml(path)
    assert values["y"] == {"a": 1, "b": 3} and values["z"] == {"a": 4, "b": 3}
    assert values[1] == 5 and values["1"] == 6, "a number and a text"
