"""One process, or several that torchrun starts. A single process never communicates."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError, explain_system_errors, first_line

T = TypeVar("T")


class RankError(UserError):
    """An error on this rank only, which reports it; any other UserError occurs on all ranks, and rank 0 reports it."""


class PeerLost(RankError):
    """Contact with another process was lost."""

    status = 1

    def end_process(self) -> NoReturn:
        """At once: a thread of the broken process group can abort an exit through the interpreter."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


class OrderlyStop(SystemExit):
    """All ranks end now, as they have agreed."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's index on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


gpu_group: Any = None  # NCCL's, which reduces tensors on GPUs; the default group is gloo's


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if torchrun started this process. Rank 0 reports a UserError that all ranks meet."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    timeout = timedelta(hours=2)  # of gloo: one process of a machine may be downloading
    # torchrun keeps its store when it restarts the processes (--max-restarts): each attempt needs keys of its own.
    store, this_rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=this_rank, world_size=size, timeout=timeout)
    if on_gpus:
        global gpu_group
        gpu_group = dist.new_group(backend="nccl", timeout=timedelta(minutes=10))
    try:
        yield
    except OrderlyStop:
        dist.destroy_process_group()
        raise
    except UserError as error:
        if rank() > 0 and not isinstance(error, RankError):
            raise SystemExit(error.status) from None
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).split(". ")[0]  # without gloo's source file and line
        raise PeerLost(
            f"rank {rank()} of {world_size()} lost contact with another process ({reason}), whose own message, or "
            "torchrun's below, gives the cause. Run the same command again to resume from the last checkpoint"
        ) from None
    dist.destroy_process_group()  # not after an error: NCCL would wait for the other ranks


on_rank0_now = False  # whether rank 0 is inside a function of `on_rank0`, whose inner ones then just run


def on_rank0(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: the function runs on rank 0; its result, or the error that it raises, is returned or raised on all."""

    @functools.wraps(function)
    def everywhere(*args: Any, **kwargs: Any) -> T:
        global on_rank0_now
        if world_size() == 1 or on_rank0_now:
            return function(*args, **kwargs)
        outcome: list[Any] = [None, None]
        if rank() == 0:
            on_rank0_now = True
            try:
                with explain_system_errors():
                    outcome[0] = function(*args, **kwargs)
            except (UserError, SystemExit) as error:
                outcome[1] = error
            finally:
                on_rank0_now = False
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        result, raised = outcome
        if raised:
            raise raised
        return result

    return everywhere


def main_process_first(function: Callable[[], T]) -> T:
    """Call `function` on every rank, on local rank 0 of each machine first, so that only one process downloads.

    An error that one rank raises is raised on all.
    """
    if world_size() == 1:
        return function()
    for first in (True, False):
        error: UserError | SystemExit | None = None
        if (local_rank() == 0) == first:
            try:
                with explain_system_errors():
                    result = function()
            except (UserError, SystemExit) as raised:
                error = raised
        errors: list[Any] = [None] * world_size()
        dist.all_gather_object(errors, error)
        if any(errors):
            raise next(filter(None, errors))
    return result


def all_reduce_max(*values: int) -> list[int]:
    """The maximum of each value over the ranks, exchanged on the CPU, so that no GPU has to be synchronised."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, as a new tensor."""
    tensor = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(tensor, group=gpu_group if tensor.is_cuda else None)
    return tensor


def shard(n: int) -> slice:
    """This rank's part of range(n). The parts partition it in order; their sizes differ by at most 1."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def data_parallel(model: nn.Module, device: str) -> nn.Module:
    """The model as several processes train it, with averaged gradients; the model itself in a single process.

    Buffers are not sent: every rank starts with the same, and `average_batchnorm_statistics` follows each step.
    """
    if world_size() == 1:
        return model
    on_gpu = torch.device(device).type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[torch.device(device)] if on_gpu else None,
        process_group=gpu_group if on_gpu else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def average_batchnorm_statistics(model: nn.Module, share: float) -> None:
    """Average BatchNorm's running statistics over the ranks, each weighted by its `share` of the batch."""
    if world_size() == 1:
        return
    statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if not statistics:
        return
    averages = all_reduce_sum(torch.cat(statistics) * share).split([len(buffer) for buffer in statistics])
    for buffer, average in zip(statistics, averages, strict=True):
        buffer.copy_(average)
