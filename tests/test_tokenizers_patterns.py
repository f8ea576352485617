from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm_tokenizers.patterns import PATTERNS, apply_pattern, invert_pattern, num_positions

SIZE = 11


def filler_of(pattern: str, num_codebooks: int) -> int:
    return SIZE * num_codebooks if pattern == "flatten" else SIZE


@given(
    num_codebooks=st.integers(1, 6),
    num_frames=st.integers(0, 9),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 999),
)
@settings(max_examples=300, deadline=None)
def test_patterns_invert_exactly(num_codebooks, num_frames, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    codes_KF = torch.randint(SIZE, (num_codebooks, num_frames), generator=generator)
    filler = filler_of(pattern, num_codebooks)
    patterned_KP = apply_pattern(codes_KF, pattern, filler)
    assert patterned_KP.shape == (
        1 if pattern == "flatten" else num_codebooks,
        num_positions(num_frames, num_codebooks, pattern),
    )
    inverse_KF = invert_pattern(patterned_KP, pattern, filler, num_codebooks)
    assert torch.equal(inverse_KF, codes_KF)
    assert inverse_KF.dtype == codes_KF.dtype


def test_delay_by_hand():
    codes_KF = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert apply_pattern(codes_KF, "delay", 9).tolist() == [[1, 2, 3, 9], [9, 4, 5, 6]]


def test_flatten_by_hand():
    codes_KF = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert apply_pattern(codes_KF, "flatten", 20).tolist() == [[1, 14, 2, 15, 3, 16]]


def test_parallel_by_hand():
    codes_KF = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert apply_pattern(codes_KF, "parallel", 9).tolist() == codes_KF.tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stream_cut_off_loses_only_its_last_frames(pattern):
    codes_KF = torch.randint(SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
    filler = filler_of(pattern, 3)
    patterned_KP = apply_pattern(codes_KF, pattern, filler)
    for length in range(patterned_KP.shape[1] + 1):
        inverse_KF = invert_pattern(patterned_KP[:, :length], pattern, filler, 3)
        assert torch.equal(inverse_KF, codes_KF[:, : inverse_KF.shape[1]])


def test_misplaced_codes_are_named():
    codes_KF = torch.randint(SIZE, (2, 4))
    delayed_KP = apply_pattern(codes_KF, "delay", SIZE)
    delayed_KP[1, 2] = SIZE
    with pytest.raises(ValueError, match="frame 1 of codebook 1 holds no unit"):
        invert_pattern(delayed_KP, "delay", SIZE, 2)
    flat_1P = apply_pattern(codes_KF, "flatten", 2 * SIZE)
    flat_1P[0, 3] = 0
    with pytest.raises(ValueError, match="frame 1 of codebook 1 holds no unit"):
        invert_pattern(flat_1P, "flatten", 2 * SIZE, 2)


def test_wrong_calls_are_named():
    codes_KF = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="pattern is 'zigzag'; it must be one of parallel, delay, flatten"):
        apply_pattern(codes_KF, "zigzag", SIZE)
    with pytest.raises(ValueError, match=r"codes lie in \[0, 11\]"):
        apply_pattern(codes_KF + torch.tensor([[0], [11]]), "delay", SIZE)
    with pytest.raises(ValueError, match="filler is 11 with 2 codebooks"):
        apply_pattern(codes_KF, "flatten", SIZE)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        apply_pattern(codes_KF[0], "delay", SIZE)
    with pytest.raises(ValueError, match=r"needs \[2, positions\]"):
        invert_pattern(codes_KF[:1], "delay", SIZE, 2)
