"""YAML as it is meant: a key that is there twice is an error, not the last of both."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mmllm.parsing import parse, read_yaml


def test_a_key_twice_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\n")
    with pytest.raises(ValueError, match=r"a\.yaml: not YAML: the key 'c' is there twice\n.*line 5"):
        read_yaml(path)
    path.write_text("a: 1\n'a': 2\n")
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        read_yaml(path)
    for text, key in (("1: a\n0x1: b\n", "0x1"), ("1: a\ntrue: b\n", "true"), ("<<: {a: 1}\n<<: {b: 2}\n", "<<")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"the key '{key}' is there twice"):
            read_yaml(path)


def test_keys_that_are_merged_may_be_given_anew(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "x: &x {a: 1, b: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: *y, a: 4}\nlist: [{a: 1}, {a: 2}]\n1: 5\n'1': 6\n"
    )
    values = read_yaml(path)
    assert values["y"] == {"a": 1, "b": 3} and values["z"] == {"a": 4, "b": 3}
    assert values[1] == 5 and values["1"] == 6, "a number and a text"


def test_dates_stay_text_as_in_manifests(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 2001-02-03\nb: 2001-02-03 04:05:06\n")
    assert read_yaml(path) == {"a": "2001-02-03", "b": "2001-02-03 04:05:06"}


@dataclass(frozen=True)
class Named:
    levels: dict[str, int]


def test_a_number_and_the_same_text_are_no_two_names():
    assert parse(Named, {"levels": {1: 2, "a": 3}}) == Named({"1": 2, "a": 3})
    with pytest.raises(ValueError, match="levels has the key 1 twice, as text and as int"):
        parse(Named, {"levels": {1: 2, "1": 3}})
