"""The entries of codebooks: weighted k-means before a layer is coded, least squares under its Hessian after."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Codebook

SAMPLE = 1 << 15  # vectors that k-means looks at, at most
PART = 1 << 10  # vectors whose distances to all entries are in memory at a time
ROUNDS = 10  # of k-means; least squares under the Hessian goes on from there
STEPS = 3  # of conjugate gradients: few, since codes move again and entries are near already


def k_means(vectors: Tensor, importance: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """Centroids float32 `[entries, length]` of `vectors [count, length]`, whose squared errors count by `importance`.

    k-means++ and then Lloyd's rounds, on a random sample where there are many vectors. Of fewer different vectors than
    entries each is a centroid; what is left over is zero.
    """
    if len(vectors) > SAMPLE:
        chosen = torch.randperm(len(vectors), generator=random)[:SAMPLE].to(vectors.device)
        vectors, importance = vectors[chosen], importance[chosen]
    centroids = _spread_out(vectors, importance, entries, random)
    pulled = importance * vectors
    for _ in range(ROUNDS):
        nearest = nearest_entries(vectors, importance, centroids)
        total = torch.zeros_like(centroids).index_add_(0, nearest, importance)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, pulled)
        centroids = torch.where(total > 0, sums / total.clamp_min(1e-30), centroids)
    return centroids


def nearest_entries(vectors: Tensor, importance: Tensor, centroids: Tensor) -> Tensor:
    """The number of the entry with the least weighted squared error for each of `vectors`, int64 `[count]`."""
    inputs = torch.cat([importance * vectors, importance], 1)
    table = torch.cat([centroids, -0.5 * centroids.square()], 1).T
    return torch.cat([(part @ table).argmax(1) for part in inputs.split(PART)])


def _spread_out(vectors: Tensor, importance: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """k-means++: entries are vectors, each drawn by how far it is from those before."""
    centroids = vectors.new_zeros(entries, vectors.shape[1])
    draws = torch.rand(entries, generator=random, dtype=torch.float64).tolist()
    distance = importance.sum(1)  # of the first, all that counts
    for entry, draw in enumerate(draws):
        reach = distance.double().cumsum(0)
        if float(reach[-1]) <= 0:
            break
        place = min(int(torch.searchsorted(reach, draw * float(reach[-1]), right=True)), len(vectors) - 1)
        centroids[entry] = vectors[place]
        away = (importance * (vectors - vectors[place]).square()).sum(1)
        distance = away if entry == 0 else torch.minimum(distance, away)
    return centroids


def refit_entries(w: Codebook, target: Tensor, hessian: Tensor, shown: Tensor | None) -> Codebook:
    """`w` with entries nearer to least squares of tr(E H E^T), all at once, for the codes and scales that it has.

    E is `target [out, in]` less what of `w` is `shown`. The normal equations are solved by a few conjugate gradients,
    scaled by their diagonal; where float16 leaves none of their gain, `w` as it is.
    """
    scale = w.scale.float() if shown is None else w.scale.float() * shown
    codes, (entries, length) = w.codes.long().flatten(), w.centroids.shape
    fill = -w.width % length

    def matrix(centroids: Tensor) -> Tensor:
        return centroids[codes].reshape(len(w.codes), -1)[:, : w.width] * scale

    def gather(slopes: Tensor) -> Tensor:
        vectors = torch.nn.functional.pad(slopes * scale, (0, fill)).reshape(-1, length)
        return torch.zeros(entries, length, device=vectors.device).index_add_(0, codes, vectors)

    stored = dense(w) if shown is None else dense(w) * shown
    missing = target - stored
    weight = gather(hessian.diagonal() * scale.expand_as(target))
    weight = torch.where(weight > 0, weight, 1.0)
    residual = gather(missing @ hessian)
    moved, direction = torch.zeros_like(residual), residual / weight
    energy = (residual * direction).double().sum()
    for _ in range(STEPS):
        if not bool(energy > 0):
            break
        answer = gather(matrix(direction) @ hessian)
        curvature = (direction * answer).double().sum()
        if not bool(curvature > 0):
            break
        share = (energy / curvature).float()
        moved = moved + share * direction
        residual = residual - share * answer
        energy, before = (residual * residual / weight).double().sum(), energy
        direction = residual / weight + (energy / before).float() * direction
    most = torch.finfo(torch.float16).max
    found = replace(w, centroids=(w.centroids.float() + moved).clamp(-most, most).to(torch.float16))
    change = matrix(found.centroids.float() - w.centroids.float())
    gain = (change * ((2 * missing - change) @ hessian)).double().sum()
    return found if bool(gain > 0) else w
