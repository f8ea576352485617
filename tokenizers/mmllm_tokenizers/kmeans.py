"""K-means, for the first codebooks of a codec and for discrete speech units.

Shapes: T vectors, D features, V clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm_kernels import nearest_code


@torch.no_grad()
def kmeans(x_TD: Tensor, num_clusters: int, num_iterations: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from a k-means++ start; empty clusters restart at badly served vectors.

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (SODA 2007).

    The same input gives the same result. With fewer vectors than clusters, the rest are copies with a
    little noise (a thousandth of the spread), so that they can part later.

    Args:
        x_TD: vectors to cluster, T >= 1.
        num_clusters: V.
        num_iterations: how many times vectors are assigned and centroids moved.
        seed: of the first choice.

    Returns:
        (centroids_VD, counts_V int64): the centroids and how many vectors each has.

    Raises:
        ValueError: there is no vector, or no cluster is asked for.
    """
    num_vectors = x_TD.shape[0]
    if num_vectors < 1 or num_clusters < 1:
        raise ValueError(f"got {num_vectors} vectors for {num_clusters} clusters; both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    centroids_VD = _first_centroids(x_TD, num_clusters, generator)
    for _ in range(num_iterations):
        codes_T = nearest_code(x_TD, centroids_VD)
        counts_V = torch.bincount(codes_T, minlength=num_clusters)
        sums_VD = torch.zeros_like(centroids_VD).index_add_(0, codes_T, x_TD)
        centroids_VD = torch.where(
            (counts_V > 0)[:, None], sums_VD / counts_V.clamp(min=1)[:, None].to(x_TD.dtype), centroids_VD
        )
        empty_V = (counts_V == 0).nonzero()[:, 0]
        if len(empty_V) and num_vectors > num_clusters:
            errors_T = (x_TD - centroids_VD[codes_T]).square().sum(dim=1)
            worst = errors_T.topk(len(empty_V)).indices
            centroids_VD[empty_V] = x_TD[worst]
    counts_V = torch.bincount(nearest_code(x_TD, centroids_VD), minlength=num_clusters)
    return centroids_VD, counts_V


def _first_centroids(x_TD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    num_vectors = x_TD.shape[0]
    if num_vectors < num_clusters:
        first_VD = x_TD.repeat(-(-num_clusters // num_vectors), 1)[:num_clusters].clone()
        noise_VD = torch.randn(first_VD.shape, generator=generator).to(first_VD)
        noise_VD[:num_vectors] = 0.0
        return first_VD + noise_VD * (1e-3 * x_TD.std(unbiased=False) + 1e-6)
    draws_V = torch.rand(num_clusters, generator=generator).to(x_TD)
    chosen = [int(draws_V[0] * (num_vectors - 1))]
    distances_T = x_TD.new_full((num_vectors,), float("inf"))
    for draw in draws_V[1:]:
        distances_T = torch.minimum(distances_T, (x_TD - x_TD[chosen[-1]]).square().sum(dim=1))
        # The next one is drawn with a probability in proportion to its squared distance.
        totals_T = distances_T.cumsum(0)
        chosen.append(min(int(torch.searchsorted(totals_T, draw * totals_T[-1])), num_vectors - 1))
    return x_TD[torch.tensor(chosen, device=x_TD.device)].clone()
