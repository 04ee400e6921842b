"""Stratified splits."""

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from engine.errors import UserError


def stratified(labels: torch.Tensor, size: int, setting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of `size` images, stratified by class, and of the others; both sorted, and always the same.

    Raises UserError, naming the setting, if one of them would have no image of some class.
    """
    labels = labels.cpu().numpy()
    if size == len(labels):
        return torch.arange(size), torch.arange(0)
    images_of_class = np.unique(labels, return_counts=True)[1]
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=size, stratify=labels, random_state=0)
    except ValueError:  # so few images, or of a class, that scikit-learn does not try
        parts = ()
    if not parts or any(len(np.unique(labels[part])) < len(images_of_class) for part in parts):
        raise UserError(
            f"{setting} = {size}: must select and leave at least one image of each class; there are {len(labels)} "
            f"images of {len(images_of_class)} classes, {images_of_class.min()} of the rarest. Choose another size or "
            "add images"
        )
    return tuple(torch.from_numpy(np.sort(part)) for part in parts)
