from __future__ import annotations

import pytest
import torch

from mmllm.model.audio_projectors import AudioProjector, AudioProjectorConfig, CodeEmbedding


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("pool", [1, 3])
def test_clips_do_not_depend_on_their_neighbours(kind, pool):
    torch.manual_seed(0)
    embedding = CodeEmbedding(2, 9, 12).double()
    projector = (
        AudioProjector(AudioProjectorConfig(kind, pool=pool, num_hidden_layers=3, kernel_size=5), 12, 16)
        .double()
        .eval()
    )
    codes_CFK = torch.full((3, 17, 2), -1)
    lengths = [5, 17, 1]
    for c, length in enumerate(lengths):
        codes_CFK[c, :length] = torch.randint(0, 9, (length, 2))
    together = projector(codes_CFK, embedding)
    assert together.shape == (3, -(-17 // pool), 16)
    for c, length in enumerate(lengths):
        alone = projector(codes_CFK[c : c + 1, :length], embedding)[0]
        torch.testing.assert_close(together[c, : len(alone)], alone, rtol=1e-10, atol=1e-12)


def test_code_embedding_sums_and_skips():
    embedding = CodeEmbedding(3, 4, 6)
    table_KVD = embedding.table.weight.view(3, 5, 6)
    codes = torch.tensor([[[1, -1, 4], [0, 2, 3]], [[-1, -1, -1], [3, 3, 3]]])
    out = embedding(codes)
    torch.testing.assert_close(out[0, 0], table_KVD[0, 1] + table_KVD[2, 4])
    torch.testing.assert_close(out[0, 1], table_KVD[0, 0] + table_KVD[1, 2] + table_KVD[2, 3])
    assert out[1, 0].abs().max() == 0


def test_training_masks_frames_and_codebooks_only_in_training():
    torch.manual_seed(0)
    embedding = CodeEmbedding(4, 9, 12)
    config = AudioProjectorConfig("linear", pool=1, frame_mask=0.3, mask_span=5, code_dropout=0.5)
    projector = AudioProjector(config, 12, 16)
    codes_CFK = torch.randint(0, 9, (200, 100, 4))
    share = projector._hidden_frames(codes_CFK).float().mean().item()
    assert abs(share - 0.3) < 0.03
    dropped = projector._drop_codebooks(codes_CFK) < 0
    assert not dropped[..., 0].any()
    assert abs(dropped[:, 0, 3].float().mean().item() - 0.5) < 0.12
    assert torch.equal(dropped[:, 0], dropped[:, -1])
    assert torch.equal(projector.eval()(codes_CFK, embedding), projector(codes_CFK, embedding))
    assert not torch.equal(projector.train()(codes_CFK, embedding), projector(codes_CFK, embedding))


def test_bad_audio_projectors_are_named():
    for values, message in [
        ({"pool": 0}, "pool is 0"),
        ({"kernel_size": 4}, "must be odd"),
        ({"frame_mask": 1.0}, r"\[0, 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            AudioProjectorConfig(**values)


def test_bands_are_stretched_moved_and_hidden_in_training_alone() -> None:
    torch.manual_seed(0)
    config = AudioProjectorConfig(spectrum=20, warp=0.2, band_mask=4)
    projector = AudioProjector(config, latent_width=24, width=8)
    ramp_CFL = torch.arange(1.0, 25.0).expand(64, 3, 24)
    out_CFL = projector._altered_bands(ramp_CFL)
    assert torch.equal(out_CFL[..., 20:], ramp_CFL[..., 20:])  # what is no spectrum stays
    bands_CFM = out_CFL[..., :20]
    assert torch.equal(bands_CFM, bands_CFM[:, :1].expand_as(bands_CFM))  # all frames of a clip alike
    is_hidden_CM = bands_CFM[:, 0] == 0
    assert set(is_hidden_CM.sum(dim=1).tolist()) == {0, 1, 2, 3, 4}
    steps_CM = bands_CFM[:, 0].diff(dim=1)
    inside_CM = (
        ~is_hidden_CM[:, 1:] & ~is_hidden_CM[:, :-1] & (bands_CFM[:, 0, 1:] < 19.9) & (bands_CFM[:, 0, :-1] > 1.1)
    )
    stretch = steps_CM[inside_CM]  # a ramp's slope is how far it is stretched
    assert stretch.min() > 0.79 and stretch.max() < 1.21 and stretch.std() > 0.05
    codes_CFK = torch.randint(0, 4, (2, 6, 2))
    embedding = CodeEmbedding(2, 4, 24)
    projector.eval()
    assert torch.equal(projector(codes_CFK, embedding), projector(codes_CFK, embedding))


def test_band_changes_need_a_spectrum() -> None:
    with pytest.raises(ValueError, match="need spectrum"):
        AudioProjectorConfig(warp=0.1)
    with pytest.raises(ValueError, match=r"warp is 0\.7"):
        AudioProjectorConfig(spectrum=20, warp=0.7)


def test_a_flat_table_embeds_a_frame_as_separate_ones_do() -> None:
    torch.manual_seed(0)
    codebooks_KVD = torch.randn(3, 5, 8)
    separate, flat = CodeEmbedding(3, 5, 8), CodeEmbedding(1, 15, 8)
    separate.initialize(codebooks_KVD)
    flat.initialize(codebooks_KVD.reshape(1, 15, 8))
    codes_CFK = torch.randint(-1, 5, (2, 7, 3))
    ratio = flat(codes_CFK) / separate(codes_CFK)  # each is scaled to unit variance as a whole
    told = (codes_CFK >= 0).any(dim=-1)
    assert torch.allclose(ratio[told], ratio[told][0, 0].expand_as(ratio[told]), rtol=1e-3)
    position = torch.tensor([[2 * 5 + 4]])  # in the stream: unit 4 of codebook 2
    assert torch.allclose(flat(position)[0], flat(torch.tensor([[-1, -1, 4]]))[0])


def test_the_first_codebooks_alone_are_embedded_as_if_the_others_were_missing() -> None:
    """Units may have fewer codebooks than what is heard; one table serves both."""
    torch.manual_seed(0)
    embedding = CodeEmbedding(8, 5, 12)
    codes = torch.randint(0, 5, (2, 7, 8))
    missing = codes.clone()
    missing[..., 4:] = -1
    assert torch.equal(embedding(codes[..., :4]), embedding(missing))
    assert not torch.allclose(embedding(codes[..., :4]), embedding(codes))
