"""Are teacher and student set up as they should be? They run on copies, so that nothing of yours changes."""

import copy

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, binomtest
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


def examine_models(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, ...]) -> list[str]:
    """Sentences on what may go wrong in distilling `teacher` into `student`; an empty list if nothing is found.

    The batch holds 100 images or more, labels (B,), and the teacher's logits (B, C) if they are stored. Both models are
    in the mode in which they are used, and return logits (B, C).
    """
    images, labels, *stored = batch
    if set(map(id, student.parameters())) & set(map(id, teacher.parameters())):
        return ["Student and teacher are the same object, or share parameters."]
    found, model = [], copy.deepcopy(teacher)
    with torch.no_grad():
        if not torch.allclose(model(images), model(images), atol=1e-4):
            found.append("The teacher's logits change from call to call: dropout is alive. Call teacher.eval().")
        for dropout in [module for module in model.modules() if isinstance(module, _DropoutNd)]:
            dropout.eval()
        if not torch.allclose(model(images)[:2], model(images[:2]), rtol=1e-2, atol=1e-2):
            found.append("The teacher's logits depend on the rest of the batch: training mode. Call teacher.eval().")
        logits, of_student = model.eval()(images), copy.deepcopy(student).eval()(images)
    for name, outputs in (("teacher", logits), ("student", of_student)):
        if outputs.min() >= 0 and (outputs.sum(1) - 1).abs().max() < 1e-3:
            found.append(f"The {name} returns probabilities, not logits: a loss would apply softmax twice.")
    if stored and not torch.allclose(stored[0], logits, rtol=0.05, atol=0.05):
        distances, own = torch.cdist(stored[0], logits), (stored[0] - logits).norm(dim=1)
        elsewhere = (distances.amin(1) < 0.1 * own).float().mean() > 0.5
        what = "in another order than the images" if elsewhere else "not the teacher's on these images"
        found.append(f"The stored logits are {what}.")

    n, classes = logits.shape
    right, right_student = (outputs.argmax(1) == labels for outputs in (logits, of_student))
    accuracy, places = right.float().mean(), (labels.cpu(), logits.argmax(1).cpu())
    counts = torch.zeros(classes, classes).index_put(places, torch.ones(n), accumulate=True)
    chance = (counts.sum(0) @ counts.sum(1)).item() / n**2
    if binom.sf(int(right.sum()) - 1, n, chance) > 0.01:
        matched = counts[linear_sum_assignment(-counts)].sum() / n
        why = f"another normalisation, perhaps (here mean {images.mean():.2f}, deviation {images.std():.2f})"
        if matched > 0.6:
            why = f"another class order, in which {matched:.0%} would be right"
        found.append(f"The teacher is right on {accuracy:.0%} of the images, near chance; {why}.")
    worse, better = int((right_student & ~right).sum()), int((right & ~right_student).sum())
    if worse and binomtest(worse, worse + better, alternative="greater").pvalue < 0.05:
        found.append(
            f"The teacher knows less than the student: {accuracy:.0%} against {right_student.float().mean():.0%}."
        )
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        found.append("Gradients of the teacher are on: harmless if it runs under torch.no_grad().")
    return found
