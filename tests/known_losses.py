"""Distillation losses in PyTorch's own functions: random members of the family that `diagnose` knows, and of others."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from diagnose import examine


def kl(log_q, p):
    return F.kl_div(log_q, p, reduction="batchmean")


def log_p(logits, t=1.0):
    return F.log_softmax(logits / t, 1)


def p(logits, t=1.0):
    return F.softmax(logits / t, 1)


def jensen_shannon(z, v, t):
    middle = (p(z, t) + p(v, t)) / 2
    return (kl(middle.log(), p(z, t)) + kl(middle.log(), p(v, t))) / 2


def standardised(logits):
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)


def decoupled(z, v, y, t, others=8.0):
    """Its gradient, from KL = TCKD + (1 - p_v(y)) NCKD (Zhao et al. 2022), where p_v(y) is a constant."""
    rows = torch.arange(len(y))
    weights = 1 - p(v, t)[rows, y]
    q_z, q_v = p(z, t)[rows, y], p(v, t)[rows, y]
    target = q_v * (q_v / q_z).log() + (1 - q_v) * ((1 - q_v) / (1 - q_z)).log()
    whole = F.kl_div(log_p(z, t), p(v, t), reduction="none").sum(1)
    return (target + others * (whole - target) / weights).mean()


FAMILY = {  # by the name that is expected
    "KL(teacher || student)": lambda z, v, y, t: kl(log_p(z, t), p(v, t)),
    "KL reversed (student || teacher)": lambda z, v, y, t: kl(log_p(v, t), p(z, t)),
    "Jensen-Shannon divergence": lambda z, v, y, t: jensen_shannon(z, v, t),
    "squared error of logits": lambda z, v, y, t: F.mse_loss(z, v, reduction="sum") / len(z),
    "squared error of probabilities": lambda z, v, y, t: F.mse_loss(p(z, t), p(v, t), reduction="sum") / len(z),
    "CE with hard labels of the teacher": lambda z, v, y, t: F.cross_entropy(z / t, v.argmax(1)),
    "KL(teacher || student), only the teacher softened,": lambda z, v, y, t: kl(log_p(z), p(v, t)),
    "KL(teacher || student), only the student softened,": lambda z, v, y, t: kl(log_p(z, t), p(v)),
    "KL(teacher || student) of standardised logits": lambda z, v, y, t: kl(
        log_p(standardised(z), t), p(standardised(v), t)
    ),
    "decoupled KL (DKD)": decoupled,
    "kl_div of probabilities where log-probabilities belong": lambda z, v, y, t: kl(p(z, t), p(v, t)),
    "KL(teacher || student) after softmax twice (both, T outside)": lambda z, v, y, t: kl(log_p(p(z), t), p(p(v), t)),
    "KL(teacher || student) after softmax twice (student)": lambda z, v, y, t: kl(log_p(p(z, t)), p(v, t)),
}


def kd(hard, soft, t, loss=kl):
    """hard CE + soft loss(log q, p)."""
    return lambda z, v, y: hard * F.cross_entropy(z, y) + soft * loss(log_p(z, t), p(v, t))


def divided_by_classes(log_q, q):
    return kl(log_q, q) / q.shape[1]


# The formulas of public implementations, with example weights and temperatures. Sources: docs/diagnosis.md
IMPLEMENTATIONS = {
    "ghnmqdtg/Teacher-Student-Model-From-Scratch": kd(0.25, 0.75, 5),
    "haitongli/knowledge-distillation-pytorch": kd(0.1, 0.9 * 16, 4, divided_by_classes),
    "HobbitLong/RepDistiller": kd(0.1, 0.9 * 16, 4),
    "megvii-research/mdistiller, KD": kd(0.1, 0.9 * 16, 4),
    "megvii-research/mdistiller, DKD": lambda z, v, y: F.cross_entropy(z, y) + 16 * decoupled(z, v, y, 4),
    "sunshangquan/logit-standardization-KD": lambda z, v, y: (
        0.1 * F.cross_entropy(z, y) + 9 * 4 * kl(log_p(standardised(z), 2), p(standardised(v), 2))
    ),
    "facebookresearch/deit": kd(0.5, 0.5 * 9, 3, divided_by_classes),
    "yoshitomo-matsubara/torchdistill": kd(0.5, 0.5 * 16, 4),
    "yoshitomo-matsubara/torchdistill, alpha = 0": kd(0, 1, 4),
    "SforAiDl/KD_Lib": lambda z, v, y: 0.5 * F.cross_entropy(z, y) + 0.5 * 400 * F.mse_loss(p(v, 20), p(z, 20)),
    "keras-team/keras-io": kd(0.1, 0.9, 10),
    "IntelLabs/distiller": kd(0.5, 0.5, 4),
    "pytorch/tutorials": lambda z, v, y: (
        0.75 * F.cross_entropy(z, y) - 0.25 * 4 * (p(v, 2) * log_p(z, 2)).sum() / len(z)
    ),
    "open-mmlab/mmrazor": lambda z, v, y: F.cross_entropy(z, y) - 16 * (p(v, 4) * log_p(z, 4)).sum() / len(z),
    "AberHu/Knowledge-Distillation-Zoo, Logits": lambda z, v, y: F.cross_entropy(z, y) + 0.1 * F.mse_loss(z, v),
    "hunto/DIST_KD": lambda z, v, y: F.cross_entropy(z, y) + OUTSIDE["DIST"](z, v, y, 1, None),
}


def log_uniform(generator, low, high):
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def family_member(seed):
    """A random loss a CE + w soft(T), its expected name, a, w and T, and the number of classes."""
    generator = random.Random(seed)
    a, w = (log_uniform(generator, 0.01, 10) for _ in range(2))
    t, classes = log_uniform(generator, 0.5, 20), round(log_uniform(generator, 2, 1000))
    of_two_classes = ("KL(teacher || student) of standardised logits", "decoupled KL (DKD)")
    name = generator.choice([name for name in FAMILY if classes > 2 or name not in of_two_classes])
    return lambda z, v, y: a * F.cross_entropy(z, y) + w * FAMILY[name](z, v, y, t), name, a, w, t, classes


def pearson(a, b):
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def each_kl(z, v, t):
    return F.kl_div(log_p(z, t), p(v, t), reduction="none").sum(1)


def at_the_top(logits, k=3):
    return logits.gather(1, logits.argsort(1)[:, -k:])


# Of z, v, y, a temperature t and a number x from 0.3 to 0.7
OUTSIDE = {
    "L1 of logits": lambda z, v, y, t, x: F.l1_loss(z, v),
    "Huber of logits": lambda z, v, y, t, x: F.huber_loss(z, v, delta=x),
    "L1 of probabilities": lambda z, v, y, t, x: F.l1_loss(p(z, t), p(v, t)),
    "cosine of logits": lambda z, v, y, t, x: 1 - F.cosine_similarity(z, v, dim=1).mean(),
    "DIST": lambda z, v, y, t, x: 2 - pearson(p(z, t), p(v, t)).mean() - pearson(p(z, t).T, p(v, t).T).mean(),
    "squared error of centred logits": lambda z, v, y, t, x: F.mse_loss(
        z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    ),
    "two temperatures": lambda z, v, y, t, x: kl(log_p(z, t), p(v, t)) + x * kl(log_p(z, 3 * t), p(v, 3 * t)),
    "student at another temperature": lambda z, v, y, t, x: kl(log_p(z, t), p(v, t * (1 + x))),
    "both directions": lambda z, v, y, t, x: kl(log_p(z, t), p(v, t)) + x * kl(log_p(v, t), p(z, t)),
    "KL and logits": lambda z, v, y, t, x: kl(log_p(z, t), p(v, t)) + 0.01 * F.mse_loss(z, v),
    "Hellinger": lambda z, v, y, t, x: F.mse_loss(p(z, t).sqrt(), p(v, t).sqrt()),
    "alpha-beta": lambda z, v, y, t, x: -(p(v, t) ** x * p(z, t) ** (1 - x)).sum(1).mean(),
    "Renyi": lambda z, v, y, t, x: ((p(v, t) ** x * p(z, t) ** (1 - x)).sum(1).log() / (x - 1)).mean(),
    "weighted by the teacher": lambda z, v, y, t, x: (p(v).amax(1) ** x * each_kl(z, v, t)).mean(),
    "weighted by the student's loss": lambda z, v, y, t, x: (
        F.cross_entropy(z, y, reduction="none").detach() ** x * each_kl(z, v, t)
    ).mean(),
    "where the teacher is right": lambda z, v, y, t, x: ((v.argmax(1) == y) * each_kl(z, v, t)).mean(),
    "thresholded teacher": lambda z, v, y, t, x: -(p(v, t).clamp(min=x / 5) * log_p(z, t)).sum(1).mean(),
    "mixed with the label": lambda z, v, y, t, x: F.cross_entropy(
        z / t, x * p(v, t) + (1 - x) * F.one_hot(y, z.shape[1])
    ),
    "NKD": lambda z, v, y, t, x: (
        -(p(v)[range(len(y)), y] * log_p(z)[range(len(y)), y]).mean() + x * each_kl(z, v, t).mean()
    ),
    "sigmoid": lambda z, v, y, t, x: F.binary_cross_entropy_with_logits(z / t, torch.sigmoid(v / t)),
    "entropy of the student": lambda z, v, y, t, x: kl(log_p(z, t), p(v, t)) + x * (p(z) * log_p(z)).sum(1).mean(),
    "focal": lambda z, v, y, t, x: ((1 - p(z)[range(len(y)), y]) ** x * F.cross_entropy(z, y, reduction="none")).mean(),
    "shifted teacher": lambda z, v, y, t, x: kl(log_p(z, t), p(v + x * torch.arange(v.shape[1]), t)),
    "distances between images": lambda z, v, y, t, x: F.mse_loss(torch.pdist(z), x * torch.pdist(v)),
    "top classes": lambda z, v, y, t, x: kl(log_p(at_the_top(z), t), p(at_the_top(v), t)),
}


def outside_member(seed):
    """A random loss that is not of the family, its name, and the number of classes."""
    generator = random.Random(seed)
    name = list(OUTSIDE)[seed % len(OUTSIDE)]
    a, w = (log_uniform(generator, 0.1, 10) for _ in range(2))
    t, x = log_uniform(generator, 0.5, 20), generator.uniform(0.3, 0.7)
    classes = round(log_uniform(generator, 4, 100))
    return lambda z, v, y: a * F.cross_entropy(z, y) + w * OUTSIDE[name](z, v, y, t, x), name, classes


def check_family_member(seed):
    loss, name, hard, soft, temperature, classes = family_member(seed)
    found = examine(loss, num_classes=classes)
    assert found.name == name
    assert (found.hard_weight, found.soft_weight) == (pytest.approx(hard, rel=0.01), pytest.approx(soft, rel=0.01))
    if name != "squared error of logits":
        assert found.temperature == pytest.approx(temperature, rel=0.01)


def check_outside_member(seed):
    loss, _, classes = outside_member(seed)
    assert examine(loss, num_classes=classes).name == "not recognised"
