"""Image features into the text's embeddings: pure, and the one place where features meet their places."""

from __future__ import annotations

import torch


def splice(embeddings_BSH: torch.Tensor, features_NPH: torch.Tensor, image_mask_BS: torch.Tensor) -> torch.Tensor:
    """Put the features of N images, P each, at the image places of the text, in order of appearance.

    embeddings [B, S, H], features [N, P, H], image_mask [B, S] bool -> [B, S, H]. Differentiable in both. Raises
    ValueError when the places and the features differ in number: one image too many would shift every later one.
    """
    num_places, num_features = int(image_mask_BS.sum()), features_NPH.shape[0] * features_NPH.shape[1]
    if num_places != num_features:
        raise ValueError(
            f"{num_places} image places in the text, but {features_NPH.shape[0]} images of {features_NPH.shape[1]} "
            f"features give {num_features}"
        )
    if not num_places:
        return embeddings_BSH
    return embeddings_BSH.masked_scatter(image_mask_BS[..., None], features_NPH.to(embeddings_BSH.dtype))
