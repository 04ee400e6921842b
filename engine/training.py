"""A training run: optimizer, schedule, running loss and history, saved and restored exactly."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from engine import named
from engine.checkpoints import RETRAIN, nonfinite_tensors
from engine.console import Progress, duration
from engine.datasets import Batch, Dataset, batches
from engine.device import DROPOUT, compiled, seed_torch
from engine.distributed import (
    all_reduce_max,
    all_reduce_sum,
    average_batchnorm_statistics,
    data_parallel,
    rank,
    shard,
    world_size,
)
from engine.errors import Diverged, UserError, first_line
from engine.estimate import UNKNOWN, Estimate
from engine.images import normalisation_of
from engine.named import is_named
from engine.recipes import Recipe
from engine.settings import Model


def make_optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    """The recipe's optimizer; one of the user's is called with the parameters and the learning rate."""
    if is_named(recipe.optimizer):
        optimizer = named.call("optimizer", recipe.optimizer, list(model.parameters()), recipe.lr)
        if not isinstance(optimizer, torch.optim.Optimizer) or not takes_nothing(optimizer.step):
            raise UserError(
                f"optimizer = {recipe.optimizer!r}: must return an optimizer of PyTorch whose step takes no argument"
            )
        return optimizer
    parameters, decay = model.parameters(), recipe.weight_decay
    fused = True if torch.device(device).type in ("cpu", "cuda") else None
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(
        parameters, recipe.lr, recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov, fused=fused
    )


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The recipe's schedule over `steps` steps of the optimizer; one of the user's is called with both."""
    if is_named(recipe.schedule):
        scheduler = named.call("schedule", recipe.schedule, optimizer, steps)
        if not isinstance(scheduler, LRScheduler) or not takes_nothing(scheduler.step):
            raise UserError(
                f"schedule = {recipe.schedule!r}: must return a scheduler of PyTorch whose step takes no argument"
            )
        return scheduler
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return LambdaLR(optimizer, lambda step: 1.0)


def takes_nothing(step: Callable[..., Any]) -> bool:
    """Whether a step can be called without arguments; LBFGS needs a closure, ReduceLROnPlateau a metric."""
    try:
        inspect.signature(step).bind()
    except TypeError:
        return False
    return True


def without_numpy(value: Any) -> Any:
    """A state with Python's numbers in place of NumPy's, which a checkpoint does not load."""
    if isinstance(value, dict):
        return {key: without_numpy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def best_epoch(history: Sequence[dict[str, float]]) -> int:
    """The epoch, counted from 1, with the highest accuracy on the validation images; the first of several."""
    return 1 + int(np.argmax([record["validation_accuracy"] for record in history]))


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss: the sum of its terms."""
    return torch.stack(list(terms.values())).sum()


class Meter:
    """Loss, accuracy, gradients and finiteness over an epoch, accumulated on the device; only reading synchronises."""

    def __init__(self, device: str, sums: torch.Tensor | None = None):
        # of batch losses, of correct predictions, and of the norms of the gradients of the hard and of the soft loss
        self.sums = torch.zeros(4, device=device) if sums is None else sums.to(device)
        self.names: list[str] = []
        self.nonfinite = torch.zeros(1, device=device)  # steps in which the logits, and each term, were not finite

    @torch.no_grad()
    def update(
        self, logits: torch.Tensor, labels: torch.Tensor, terms: dict[str, torch.Tensor], loss: torch.Tensor
    ) -> None:
        """Add a step: logits (B, C), labels (B,), the terms and their sum, each weighted by its share of the batch."""
        self.sums[:2] += torch.stack([loss, (logits.argmax(1) == labels).sum()])
        self.names = ["logits", *(f"{name} loss" for name in terms)]
        self.nonfinite = self.nonfinite + ~torch.stack([logits.float().sum(), *terms.values()]).isfinite()

    def measure_gradients(self, logits: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Add the norms of the gradients of the hard and the soft loss at the logits (B, C), before `backward`."""
        gradients = (torch.autograd.grad(terms[name], logits, retain_graph=True)[0] for name in ("hard", "soft"))
        self.sums[2:] += torch.stack([gradient.norm() for gradient in gradients])

    def check(self, where: str) -> None:
        """Raise Diverged, naming what became NaN or infinite first: what has been so for the most steps."""
        counts = all_reduce_max(*self.nonfinite.int().tolist())
        if any(counts):
            diverged(self.names[counts.index(max(counts))], where)


def explain_share(recipe: Recipe, share: float) -> str | None:
    """A sentence if the soft loss has a share of the gradient far from the one that its weight suggests; else None.

    With weights a and s of the hard and the soft loss, that is s / (a + s). The gradient of KL(p_v || p_z) at the
    student's logits is (p_z - p_v) / T, where p_z - p_v itself shrinks like 1 / T; so without the factor T^2 the odds
    of the share, soft to hard, are 1 / T^2 of those with it. If the latter are s / a, the share without the factor is
    (s / T^2) / (a + s / T^2): 11% for the original's a = 0.25, s = 0.75, T = 5. A confident teacher makes both larger.
    """
    hard, soft, scale = recipe.alpha, recipe.weight_of_soft_loss, recipe.temperature**2
    if not (hard and soft and share < 1):
        return None
    suggested = recipe.suggested_soft_share
    if 1 / 5 < share / (1 - share) / (soft / hard) < 10:
        return None
    if not recipe.scale_soft_loss:
        expected = soft / scale / (hard + soft / scale)
        why = f"without the factor T^2 = {scale:g} about {expected:.0%} are expected (scale_soft_loss)"
    elif share < suggested:
        why = "the teacher's probabilities differ little from the student's"
    else:
        why = "its gradients are larger than those of the hard loss"
    return f"the soft loss has {share:.0%} of the gradient at the logits, its weight suggests {suggested:.0%}: {why}"


def diverged(what: str, where: str) -> NoReturn:
    raise Diverged(
        f"{where}: the {what} became NaN or infinite. The last good checkpoint is kept; train again with a lower lr "
        "(and --overwrite, or another --run)"
    )


class Training:
    """A model in training: everything needed to resume it exactly, its progress, and when to save or to stop.

    `network` is trained in place on so many `images`, from `state` on if there is one. `write` receives the state from
    which a later run resumes exactly: after an epoch (see `epoch_save_due`), every few minutes, and when `stop` returns
    a signal. `forward` is the network as it runs: compiled, on several processes.
    """

    def __init__(
        self,
        network: nn.Module,
        model: Model,
        images: int,
        state: dict[str, Any] | None = None,
        write: Callable[[dict[str, Any]], None] = lambda state: None,
        stop: Callable[[], int] = lambda: 0,
        estimate: Estimate = UNKNOWN,
    ):
        self.network, self.model, self.recipe, self.config = network, model, model.recipe, model.config
        self.write, self.stop, self.later = write, stop, estimate.later
        own = shard(self.config.batch_size)
        self.images_per_step = own.stop - own.start  # on this rank
        self.share = self.images_per_step / self.config.batch_size
        self.steps = images // self.config.batch_size  # per epoch
        self.forward = compiled(data_parallel(network, self.config.device), self.config, estimate.model)
        self.optimizer = make_optimizer(network, self.recipe, self.config.device)
        self.scheduler = make_scheduler(self.optimizer, self.recipe, self.recipe.epochs * self.steps)
        self.meter = Meter(self.config.device)
        self.history: list[dict[str, float]] = []  # a record for each epoch
        self.best: dict[str, torch.Tensor] | None = None  # with keep = best, the weights of the best epoch so far
        self.step = 0  # done of the current epoch
        self.started = self.saved = time.perf_counter()
        try:
            if state:
                self.load_state_dict(state)
        except Exception as error:  # of many types, for a file that was made by hand
            raise UserError(f"{model.path}: cannot be resumed ({first_line(error)}); {RETRAIN}") from None

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.network.state_dict(),
            "optimizer": without_numpy(self.optimizer.state_dict()),
            "scheduler": without_numpy(self.scheduler.state_dict()),
            "history": list(self.history),
            "best": self.best,
            "step": self.step,
            "totals": all_reduce_sum(self.meter.sums).cpu(),
            "seconds": time.perf_counter() - self.started if self.step else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fused = self.optimizer.param_groups[0].get("fused")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group in self.optimizer.param_groups:
            if "fused" in group:
                group["fused"] = fused  # as this device has it, not the one that the state was saved on
        for parameter, moments in self.optimizer.state.items():
            for key, moment in moments.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    # In the parameter's memory format: the fused optimizers pair elements by their place in memory.
                    moments[key] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
        self.history, self.step, self.best = state["history"], state["step"], state.get("best")
        self.meter = Meter(self.config.device, state["totals"] * (rank() == 0))
        self.started -= state["seconds"]

    def batches(self, dataset: Dataset) -> Iterator[Batch]:
        """The training batches of the current epoch, or what is left of it. Shows its progress."""
        if self.step == 0:
            self.meter, self.started = Meter(self.config.device), time.perf_counter()
        self.network.train()
        epoch, seed, normalisation = len(self.history), self.model.seed, normalisation_of(self.network)
        subset = dataset.subset(self.recipe.train_size, self.recipe.train_subset)
        title = f"{self.model} epoch {epoch + 1}/{self.recipe.epochs}"
        total, done = (count * self.images_per_step for count in (self.steps, self.step))
        with Progress(title, total, done) as self.progress:
            for batch in batches(dataset.train, subset, self.config, seed, epoch, self.step, normalisation):
                seed_torch(DROPOUT, seed, epoch, self.step, rank())  # a resumed run draws the same masks
                yield batch

    def measure_and_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, terms: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The sum of the `terms`, for `backward`; they, the logits (B, C) and the labels (B,) are measured.

        DDP averages the gradients over the ranks, whose parts of the batch may differ in size.
        """
        if "soft" in terms and self.step % max(1, self.steps // 50) == 0:
            self.meter.measure_gradients(logits, terms)
        loss = total(terms)
        self.meter.update(logits, labels, terms, loss.detach() * self.share)
        return loss * (self.share * world_size())

    def finish_step(self) -> bool:
        """Count a step; show the progress and save when that is due. Returns whether to stop, after saving."""
        average_batchnorm_statistics(self.network, self.share)
        self.step += 1
        show, save, stop = all_reduce_max(self.progress.update(self.images_per_step), self.save_due, self.stop())
        if show or self.step % 50 == 0:
            self.check()
        if show:
            self.progress.describe(self.describe(self.progress.rate))
        if save or stop:
            self.save()
        return bool(stop)

    def add_record(self, record: dict[str, float]) -> None:
        """Add an epoch to the history; with keep = best, keep its weights if it is the best so far."""
        self.history.append(record)
        if self.recipe.keep == "best" and best_epoch(self.history) == len(self.history):
            self.best = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def finish_epoch(self, evaluated: bool) -> bool:
        """Save when that is due. Returns whether to stop, after saving; so if the evaluation was interrupted."""
        save, stop = all_reduce_max(self.epoch_save_due, not evaluated or self.stop())
        if save or stop:
            self.save()
        return bool(stop)

    @property
    def save_due(self) -> bool:
        return time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes

    @property
    def epoch_save_due(self) -> bool:
        """Whether to save after an epoch: after the first and the last, and if the last save was over 10 s ago."""
        return len(self.history) in (1, self.recipe.epochs) or time.perf_counter() - self.saved > 10

    @property
    def averages(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, hits, *_ = all_reduce_sum(self.meter.sums).tolist()
        return loss / self.step, hits / (self.step * self.config.batch_size)

    @property
    def soft_share(self) -> float | None:
        """Share of the soft loss in the gradient at the logits, in the epoch so far; None without a teacher."""
        *_, hard, soft = all_reduce_sum(self.meter.sums).tolist()
        return soft / ((hard + soft) or 1.0) if self.recipe.teacher else None

    def check(self) -> None:
        """Raise Diverged if the logits or a term of the loss has not been finite."""
        self.meter.check(self.position)

    @property
    def position(self) -> str:
        return f"{self.model}: epoch {len(self.history) + 1}, step {self.step}, lr = {self.recipe.lr:g}"

    def save(self) -> None:
        """Write the state, unless it has diverged; the weights can diverge a step before the logits do.

        So can a buffer, such as a running variance, which only evaluation uses.
        """
        self.check()
        if wrong := nonfinite_tensors(self.network.state_dict()):
            parameters = {name for name, _ in self.network.named_parameters()}
            what = "weights" if parameters.intersection(wrong) else f"buffer {wrong[0]}"
            diverged(what, self.position)
        self.write(self.state_dict())
        self.saved = time.perf_counter()

    def describe(self, rate: float) -> str:
        """The loss, and the time left at this many images per second, for this model and for those after it."""
        left = (self.recipe.epochs - len(self.history)) * self.steps - self.step
        seconds = left * self.config.batch_size / world_size() / max(rate, 1e-9)
        run = f" of this model, {duration(seconds + self.later)} of the run" if self.later else ""
        return "loss {:.4f}, accuracy {:.2%}, ".format(*self.averages) + f"{duration(seconds)} left{run}"
