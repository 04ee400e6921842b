"""A teacher that is only logits, in an .npz file: of a CLIP, an ensemble or a service.

Arrays `train` (N, C) and, if there is one, `test` (M, C), in the order of the data set; or in any order with the names
of the image files in `train_names` (N,) and `test_names` (M,), such as "train/CLASS/FILE" or as much of its end as is
unique. They are used for an image and its mirror image alike.
"""

import zipfile
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from engine.datasets import Dataset, Split
from engine.errors import UserError, at_most_ten, first_line
from engine.recipes import Recipe

NOWHERE = -1  # in place of an id: no file ends like this, or several do


def read_logits(recipe: Recipe, dataset: Dataset) -> torch.Tensor:
    """Logits (R, C) float32 of all images of the data set in the order of `Split.ids`, NaN where the file has none.

    Raises UserError if the file cannot be read, lacks an image, or is in another order than the labels.
    """
    path = recipe.logits_file
    try:
        with np.load(str(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:  # of a foreign or an empty file
        raise UserError(f"{path}: cannot be read as an .npz file ({first_line(error)})") from None
    names = recipe.class_names or dataset.classes
    if missing := set(dataset.classes) - set(names):
        raise UserError(f"{path}: class_names lacks {', '.join(at_most_ten(sorted(missing)))} of the data set")
    columns = [names.index(name) for name in dataset.classes]
    table = torch.full((sum(dataset.sizes.values()), len(columns)), torch.nan)
    for part in ("train", "test"):
        logits = arrays.get(part)
        if logits is None and part == "train":
            raise UserError(f"{path}: holds no array 'train'; it has {', '.join(arrays) or 'none'}")
        if logits is None:
            continue
        if logits.ndim != 2 or logits.shape[1] != len(names) or logits.dtype.kind != "f":
            raise UserError(
                f"{path}: {part} must be numbers with a fraction, (N, {len(names)}), a column for each class; it is "
                f"{logits.dtype} {logits.shape}"
            )
        places = rows_of(path, part, len(logits), arrays.get(f"{part}_names"), dataset)
        known = places >= 0
        table[places[known]] = torch.from_numpy(logits[:, columns]).float()[known]
    check_rows(path, "training", table, dataset.train, dataset)
    if "test" in arrays:
        check_rows(path, "test", table, dataset.test, dataset)
    return table


def rows_of(path: str | None, part: str, count: int, names: np.ndarray | None, dataset: Dataset) -> torch.Tensor:
    """The `ids` (count,) of the images that the rows of an array belong to; -1 for those of no image."""
    first, size = (dataset.sizes["train"] if part == "test" else 0), dataset.sizes.get(part, 0)
    if names is None:
        if count != size:
            raise UserError(
                f"{path}: {part} has {count:,} rows, and the data set has {size:,} {part} images; without {part}_names "
                "there must be a row for each, in its order"
            )
        return torch.arange(first, first + size)
    if len(names) != count or not dataset.names:
        raise UserError(f"{path}: {part}_names must be the names of {count:,} files of a data set that is a folder")
    own = range(first, first + size) if size else range(len(dataset.names))
    here: dict[str, int] = {}
    for id_ in own:
        for end in ends(dataset.names[id_]):
            here[end] = NOWHERE if end in here else id_
    anywhere = {end for name in dataset.names for end in ends(name)}
    longest = (next((end for end in ends(str(name)) if end in anywhere), "") for name in names)
    found = [here.get(end, NOWHERE) for end in longest]  # a file of another part is not here
    known = [id_ for id_ in found if id_ != NOWHERE]
    for id_, rows in Counter(known).most_common(1):
        if rows > 1:
            raise UserError(f"{path}: {part}_names has {rows} rows for {dataset.names[id_]}")
    return torch.tensor(found)


def ends(name: str) -> list[str]:
    """ "train/cat/1.png", "cat/1.png", "1.png" """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def check_rows(path: str | None, part: str, table: torch.Tensor, split: Split, dataset: Dataset) -> None:
    """Raise UserError if logits are missing, or agree with the labels no more than in a random order."""
    assert split.ids is not None
    logits, labels = table[split.ids], split.labels.cpu()
    for problem, wrong in (("no", logits.isnan()), ("infinite", logits.isinf())):
        if found := split.ids[wrong.any(1)].tolist():
            which = f", such as {dataset.names[found[0]]}" if dataset.names else ""
            raise UserError(f"{path}: has {problem} logits of {len(found):,} of {len(labels):,} {part} images{which}")
    classes, predicted = len(dataset.classes), logits.argmax(1)
    counts = torch.zeros(classes, classes, dtype=torch.int64)  # of predicted and true class
    counts.index_put_((predicted, labels), torch.ones_like(labels), accumulate=True)
    agreement = counts.trace().item() / len(labels)
    rows, columns = linear_sum_assignment(-counts)
    best = counts[rows, columns].sum().item() / len(labels)
    chance = (counts.sum(0) / len(labels) * (counts.sum(1) / len(labels))).sum().item()
    by_chance = agreement < 1 and agreement <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5
    if by_chance or (best > 0.5 and agreement < best / 2):
        raise UserError(
            f"{path}: the largest logit is that of the label for {agreement:.1%} of the {part} images. In a random "
            f"order it would be for {chance:.1%}, and with other columns for {best:.1%}. The images or the classes "
            f"({', '.join(at_most_ten([*dataset.classes]))}) have another order; add names of files (train_names, "
            "test_names) or class_names"
        )
