"""Stratified splits."""

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from engine.errors import UserError


def stratified(labels: torch.Tensor, size: int, setting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of `size` images, stratified by class, and of the others; both sorted, and always the same."""
    labels = labels.cpu().numpy()
    if size == len(labels):
        return torch.arange(size), torch.arange(0)
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=size, stratify=labels, random_state=0)
    except ValueError:  # a class would have no image on one of the sides
        classes = len(np.unique(labels))
        raise UserError(
            f"{setting} = {size}: must select and leave at least one image of each class: {classes} to "
            f"{len(labels) - classes} of these {len(labels)} images, if every class has two or more"
        ) from None
    return tuple(torch.from_numpy(np.sort(part)) for part in parts)
