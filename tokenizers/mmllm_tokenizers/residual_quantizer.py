"""Residual vector quantization.

The quantizer is ours, because the `encodec` package's leaves the commitment losses of all codebooks but the first
without gradient (its own warning: encodec issue 25).

Shapes: N clips, F frames, K codebooks, V codes a codebook, D latent width, R vectors (N * F), S sums kept by a search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from mmllm_kernels import nearest_code
from mmllm_tokenizers.codec_config import CodecConfig
from mmllm_tokenizers.kmeans import kmeans


@dataclass
class QuantizerOutput:
    """What `ResidualQuantizer.forward` gives."""

    quantized_NDF: Tensor
    """The sum of the chosen codes of what is spoken; its gradient with respect to the latents is the identity."""
    codes_NKF: Tensor
    commit_loss: Tensor
    """Scalar: mean squared distance of each residual from its code, averaged over the codebooks in use."""


class ResidualQuantizer(nn.Module):
    """Residual vector quantization: each codebook quantizes what the ones before it left over.

    Codebooks are moving averages of the vectors assigned to them; they begin as k-means centroids of the first batch
    after the warm-up; codes that fall out of use are replaced. Where latents are computed, and so never change,
    codebooks are and stay centroids of all the warm-up's batches (rank 0's): several rounds over these leave less error
    than averages. Under torch.distributed the statistics of all ranks are summed and rank 0's random choices are used,
    so that codebooks stay equal.

    Source: SoundStream (https://arxiv.org/abs/2107.03312) and EnCodec (https://arxiv.org/abs/2210.13438).
    Differs from the `encodec` package in the straight-through estimator, which is applied once, to the sum
    (quantized residuals are detached), and in dead codes, whose averages are reset with them.
    """

    codebooks: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor
    num_batches: Tensor
    first_vectors: Tensor
    """[R, D] of the warm-up so far, where latents are computed. No part of a saved codec: a training keeps it."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_codebooks, config.codebook_size, config.dimension)
        # Random until the first training batch, so that an untrained codec works, if badly.
        codebooks_KVD = torch.randn(shape) * (0.5 ** torch.arange(config.num_codebooks))[:, None, None]
        self.register_buffer("codebooks", codebooks_KVD)
        self.register_buffer("counts", torch.ones(shape[:2]))
        self.register_buffer("sums", codebooks_KVD.clone())
        self.register_buffer("idle", torch.zeros(shape[:2], dtype=torch.int64))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("first_vectors", torch.zeros(0, config.dimension), persistent=False)

    def forward(self, latents_NDF: Tensor) -> QuantizerOutput:
        """Quantizes; in training mode also updates the codebooks.

        Args:
            latents_NDF: the encoder's output.
        """
        num_clips, dimension, num_frames = latents_NDF.shape
        if self.training:
            num_batches = int(self.num_batches)
            self.num_batches += 1
            if num_batches <= self.config.warmup_batches:
                self._keep(_vectors(latents_NDF).detach())
            if num_batches < self.config.warmup_batches:
                codes_NKF = latents_NDF.new_zeros(num_clips, self.config.num_codebooks, num_frames, dtype=torch.int64)
                return QuantizerOutput(latents_NDF, codes_NKF, 0.0 * latents_NDF.mean())
            if num_batches == self.config.warmup_batches:
                self.end_warmup()
        active_NK = self._active_codebooks(num_clips, latents_NDF.device)
        found_RK = self._search(_vectors(latents_NDF).detach()) if self.config.search_width > 1 else None
        quantized_NDF = torch.zeros_like(latents_NDF)
        codes, losses = [], []
        residual_NDF = latents_NDF
        for codebook in range(self.config.num_codebooks):
            vectors_RD = _vectors(residual_NDF).detach()
            codes_R = nearest_code(vectors_RD, self.codebooks[codebook]) if found_RK is None else found_RK[:, codebook]
            chosen_RD = self.codebooks[codebook][codes_R]
            if self.training and not self.config.has_computed_latents:
                self._update(codebook, vectors_RD, codes_R)
            chosen_NDF = chosen_RD.view(num_clips, num_frames, dimension).transpose(1, 2)
            active_N11 = active_NK[:, codebook, None, None]
            losses.append(((residual_NDF - chosen_NDF).square() * active_N11).mean())
            quantized_NDF = quantized_NDF + chosen_NDF * active_N11
            # `chosen` is a constant here: the next commitment loss still reaches the encoder through the residual.
            residual_NDF = residual_NDF - chosen_NDF
            codes.append(codes_R.view(num_clips, num_frames))
        straight_through_NDF = latents_NDF + (quantized_NDF - latents_NDF).detach()
        commit_loss = torch.stack(losses).sum() * (num_clips / active_NK.sum())
        return QuantizerOutput(straight_through_NDF, torch.stack(codes, dim=1), commit_loss)

    def end_warmup(self) -> None:
        """Sets up the codebooks with the vectors that the warm-up kept; nothing if it kept none, or has ended."""
        if len(self.first_vectors):
            self._initialize(self.first_vectors)
            self.first_vectors = self.first_vectors[:0].clone()

    @torch.no_grad()
    def encode(self, latents_NDF: Tensor) -> Tensor:
        """Codes [N, K, F] of latents."""
        num_clips, _, num_frames = latents_NDF.shape
        residual_RD = _vectors(latents_NDF)
        if self.config.search_width > 1:
            return self._search(residual_RD).view(num_clips, num_frames, -1).transpose(1, 2).contiguous()
        codes = []
        for codebook_VD in self.codebooks:
            codes_R = nearest_code(residual_RD, codebook_VD)
            residual_RD = residual_RD - codebook_VD[codes_R]
            codes.append(codes_R.view(num_clips, num_frames))
        return torch.stack(codes, dim=1)

    def decode(self, codes_NKF: Tensor) -> Tensor:
        """Latents [N, D, F] of codes, of all codebooks or of the first few."""
        quantized_NFD = self.codebooks[0][codes_NKF[:, 0]]
        for codebook in range(1, codes_NKF.shape[1]):
            quantized_NFD = quantized_NFD + self.codebooks[codebook][codes_NKF[:, codebook]]
        return quantized_NFD.transpose(1, 2)

    @torch.no_grad()
    def _search(self, vectors_RD: Tensor) -> Tensor:
        """Codes [R, K] whose sum is nearest, of `search_width` sums S that are kept after each codebook.

        The nearest code of each codebook in turn is not the nearest sum: what it leaves may suit the next badly.
        Beam search for residual quantizers: Babenko and Lempitsky 2014 (additive quantization, CVPR).
        """
        residual_RSD = vectors_RD[:, None]
        codes_RSK = torch.zeros(len(vectors_RD), 1, 0, dtype=torch.int64, device=vectors_RD.device)
        for codebook, codebook_VD in enumerate(self.codebooks):
            if codebook == self.config.spoken_codebooks:  # what is spoken is not to be worse for what is only heard
                residual_RSD, codes_RSK = _nearest_sum(residual_RSD, codes_RSK)
            distances_RSV = residual_RSD.square().sum(dim=2, keepdim=True) - 2 * residual_RSD @ codebook_VD.T
            distances_RV = (distances_RSV + codebook_VD.square().sum(dim=1)).flatten(1)
            width = min(self.config.search_width, distances_RV.shape[1])
            best_RS = distances_RV.topk(width, dim=1, largest=False).indices
            sums_RS, chosen_RS = best_RS // len(codebook_VD), best_RS % len(codebook_VD)
            residual_RSD = residual_RSD.take_along_dim(sums_RS[..., None], dim=1) - codebook_VD[chosen_RS]
            codes_RSK = torch.cat([codes_RSK.take_along_dim(sums_RS[..., None], dim=1), chosen_RS[..., None]], dim=2)
        return _nearest_sum(residual_RSD, codes_RSK)[1][:, 0]

    @torch.no_grad()
    def _keep(self, vectors_RD: Tensor) -> None:
        """Remembers vectors for the first codebooks: of learnt latents, which change, those of the last batch alone."""
        kept_RD = self.first_vectors if self.config.has_computed_latents else self.first_vectors[:0]
        self.first_vectors = torch.cat([kept_RD, vectors_RD.float()])

    def _active_codebooks(self, num_clips: int, device: torch.device) -> Tensor:
        """Float [N, K]: 1 where a clip is decoded from a codebook: one that is spoken; in training some use fewer."""
        num_spoken = self.config.decoded_codebooks
        numbers_1K = torch.arange(self.config.num_codebooks, device=device)[None]
        active_NK = (numbers_1K < num_spoken).float().expand(num_clips, -1)
        if not self.training or num_spoken == 1 or self.config.quantizer_dropout == 0.0:
            return active_NK
        dropped_N = torch.rand(num_clips, device=device) < self.config.quantizer_dropout
        num_kept_N = torch.randint(1, num_spoken + 1, (num_clips,), device=device)
        return torch.where(dropped_N[:, None], (numbers_1K < num_kept_N[:, None]).float(), active_NK)

    @torch.no_grad()
    def _initialize(self, vectors_RD: Tensor) -> None:
        residual_RD = vectors_RD.float()
        for codebook in range(self.config.num_codebooks):
            centroids_VD, counts_V = kmeans(residual_RD, self.config.codebook_size, num_iterations=10, seed=codebook)
            _broadcast(centroids_VD)
            _broadcast(counts_V)
            counts_V = counts_V.float().clamp(min=1.0)
            self.codebooks[codebook] = centroids_VD
            self.counts[codebook] = counts_V
            self.sums[codebook] = centroids_VD * counts_V[:, None]
            residual_RD = residual_RD - centroids_VD[nearest_code(residual_RD, centroids_VD)]

    @torch.no_grad()
    def _update(self, codebook: int, vectors_RD: Tensor, codes_R: Tensor) -> None:
        """Moves one codebook's averages towards the batch, then replaces dead codes."""
        size, decay = self.config.codebook_size, self.config.decay
        vectors_RD = vectors_RD.float()
        counts_V = torch.bincount(codes_R, minlength=size).float()
        sums_VD = torch.zeros_like(self.sums[codebook]).index_add_(0, codes_R, vectors_RD)
        if _is_distributed():
            distributed.all_reduce(counts_V)
            distributed.all_reduce(sums_VD)
        self.counts[codebook].mul_(decay).add_(counts_V, alpha=1.0 - decay)
        self.sums[codebook].mul_(decay).add_(sums_VD, alpha=1.0 - decay)
        self.idle[codebook] = torch.where(counts_V > 0, 0, self.idle[codebook] + 1)
        dead_V = self.idle[codebook] >= self.config.dead_code_batches
        if bool(dead_V.any()):
            fresh_VD = vectors_RD[torch.randint(len(vectors_RD), (size,), device=vectors_RD.device)]
            _broadcast(fresh_VD)
            mean_count = self.counts[codebook].mean()
            self.counts[codebook] = torch.where(dead_V, mean_count, self.counts[codebook])
            self.sums[codebook] = torch.where(dead_V[:, None], fresh_VD * mean_count, self.sums[codebook])
            self.idle[codebook].masked_fill_(dead_V, 0)
        self.codebooks[codebook] = self.sums[codebook] / self.counts[codebook][:, None].clamp(min=1e-5)


def _nearest_sum(residual_RSD: Tensor, codes_RSK: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sums that a search keeps the one that leaves least, [R, 1, D] and [R, 1, K]."""
    nearest_R11 = residual_RSD.square().sum(dim=2).argmin(dim=1)[:, None, None]
    return residual_RSD.take_along_dim(nearest_R11, dim=1), codes_RSK.take_along_dim(nearest_R11, dim=1)


def _vectors(latents_NDF: Tensor) -> Tensor:
    """[N, D, F] as vectors [N * F, D]."""
    return latents_NDF.transpose(1, 2).reshape(-1, latents_NDF.shape[1])


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _broadcast(tensor: Tensor) -> None:
    """Rank 0's value on every rank."""
    if _is_distributed():
        distributed.broadcast(tensor, src=0)
