"""What `stats` and `show` found, as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_START = 60
"""Characters of a text."""


def stats_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Shares, lengths, fill and repeats: what `commands.stats` returned."""
    yield f"recipe {told['recipe_hash'][:16]}, steps 0-{told['steps'] - 1}" if told["steps"] else "no steps"
    rows = [("source", "wanted", "realized", "tokens", "documents", "mean", "lengths")]
    for name, share in told["share"].items():
        tokens, documents = told["tokens"][name], told["documents"][name]
        rows.append((
            name, f"{100 * told['wanted_share'][name]:.2f}%", f"{100 * share:.2f}%", f"{tokens:,}", f"{documents:,}",
            f"{tokens / documents:.1f}", _spread(told["lengths"][name]),
        ))  # fmt: skip
    yield from _aligned(rows, "<>>>>><")
    yield "tokens by task: " + ", ".join(f"{task} {count:,}" for task, count in told["tokens_by_task"].items())
    fills = told["fill_by_step"]
    yield (
        f"fill {100 * (1 - told['padding']):.2f}%, padding {100 * told['padding']:.2f}%"
        + (f"; fullest step {100 * max(fills):.2f}%, emptiest {100 * min(fills):.2f}%" if fills else "")
    )
    draws = sum(told["documents"].values())
    yield f"documents drawn more than once: {told['repeated_documents']:,}, in {draws:,} draws"
    if (tell := told["tell"]) is not None:
        ratio = "none" if tell["ratio"] is None else f"{tell['ratio']:.2f}"
        yield f"tell: {tell['documents']:,} of {tell['task']}, {ratio} general each (wanted {tell['wanted_ratio']:g})"
    for name, balance in told["balance"].items():
        yield f"{balance['column']} of {name}, balanced with alpha {balance['alpha']:g}:"
        rows = [("  value", "documents", "wanted", "realized")]
        rows += [
            (
                f"  {value or 'none'}", f"{each['documents']:,}", f"{100 * each['wanted_share']:.2f}%",
                f"{100 * each['share']:.2f}%",
            )
            for value, each in balance["values"].items()
        ]  # fmt: skip
        yield from _aligned(rows, "<>>>")
    for name, types in told["task_types"].items():
        for what, counts in types.items():
            if counts:
                said = ", ".join(f"{task or 'none'} {count:,}" for task, count in sorted(counts.items()))
                yield f"task types {what.replace('_', ' ')}, {name}: {said}"
    for name, count in told["never_masked"].items():
        if count:
            yield f"never masked, of {name}: {count:,} documents, too long or too short for masked spans"
    for name, counts in told["left_out"].items():
        if any(counts.values()):
            said = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in counts.items() if count)
            yield f"left out of {name}: {said}"


def _spread(lengths: Sequence[tuple[int, int, int]]) -> str:
    """The powers of two that hold the shortest, the middle and the longest document."""
    middle, seen = sum(count for _, _, count in lengths) / 2, 0
    for low, high, count in lengths:
        seen += count
        if seen >= middle:
            return f"{lengths[0][0]}-{lengths[-1][1]}, half to {high}" if low < lengths[-1][0] else f"{low}-{high}"
    return ""


def show_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """A step, one line a document: what `commands.show` returned, with `starts`."""
    yield f"step {shown['step']}: {shown['global_batch']} sequences, recipe {shown['recipe_hash'][:16]}"
    for number, sequence in enumerate(shown["sequences"]):
        targets = f", {sequence['targets']} targets" if "targets" in sequence else ""
        documents = sequence["documents"]
        yield f"sequence {number}: {sequence['tokens']} tokens{targets}, {len(documents)} documents, {sequence['hash']}"
        rows = [
            (
                f"  {item['source']}", item["task"], str(item["tokens"]),
                f"{item['shard']}:{item['key']}" + (f" part {item['part']}" if item["part"] >= 0 else ""),
                f"@{item['offset']}", item.get("start", ""),
            )
            for item in documents
        ]  # fmt: skip
        yield from _aligned(rows, "<<><><")
        for message in sequence.get("errors", ()):
            yield f"  error: {message}"
        if "text" in sequence:
            yield f"  {sequence['text']}"
        for text in sequence.get("trained", ()):
            yield f"  trained: {text}"


def start_of(text: str) -> str:
    """The start of a text, on one line."""
    line = " ".join(text[: 4 * _START].split())
    return line if len(line) <= _START else line[: _START - 1] + "…"


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        yield "  ".join(cells).rstrip()
