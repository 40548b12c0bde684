"""Several processes that train one model, as one process with the whole batch would: torchrun starts them.

Each process takes a share of every batch. What is drawn for a sample depends on (seed, step, sample index) alone, so
that samples and noise are those of one process, for any number of processes and after any change of it. Whatever looks
at the whole batch (terms, adaptive weights, skipped updates, latent statistics) is averaged over all; process 0 alone
prints, judges and writes. Without torchrun everything here is the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from train.loop import choose_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced in one go, as DDP's

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints, judges and writes."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def label() -> str:
    """What a line on stderr begins with: which process says it, where it is not the first."""
    number = os.environ.get("RANK", "0") if launched() else "0"
    return "" if number == "0" else f"process {number}: "


def leave(code: int) -> int:
    """The exit code; a process of several ends here and now: what collectives left running may not outlive the rest."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process left."""
    return launched() and any(words in str(error) for words in ("Connection ", "NCCL", "Timed out", "Socket "))


@contextlib.contextmanager
def joined(device: str, timeout: float = 600.0) -> Iterator[torch.device]:
    """The device to train on; under torchrun as one of its processes, of which all but the first print nothing.

    device: auto takes GPU number LOCAL_RANK. timeout: seconds to wait for another process before it counts as lost.
    NCCL between GPUs, gloo between CPUs. ValueError on a device that is not there.
    """
    if not launched() or dist.is_initialized():
        yield choose_device(device)
        return
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, number, count = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
    dist.init_process_group(
        backend, store=fresh_store(store, number, count, timeout), rank=number, world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
            if not is_main():
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            yield chosen
        barrier()  # nobody leaves while others still talk, or process 0 writes the report
    finally:
        dist.destroy_process_group()


def fresh_store(store: Store, number: int, count: int, timeout: float) -> Store:
    """The part of `store` that this start of `count` processes has to itself, as soon as all of them are here.

    torchrun keeps one store over its restarts: without this, processes wait at the addresses of those that are gone
    (pytorch issue 135712). Each process says a name that is new; the first answers each with it and what all names make
    together, and they go on when all have come to the same answer. Messages stay small however many there are.
    RuntimeError after `timeout` seconds.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    keys, answers = ([f"{what}/{i}" for i in range(count)] for what in ("name", "answer"))
    answered, joined_at = [], ""
    store.set(keys[number], name)
    while time.monotonic() < deadline:
        if number == 0 and store.check(keys) and (names := store.multi_get(keys)) != answered:
            answered, together = names, hashlib.sha256(b"".join(names)).hexdigest()
            for answer, other in zip(answers, names, strict=True):
                store.set(answer, f"{other.decode()} {together}")
        said = store.get(answers[number]).decode().split() if store.check([answers[number]]) else []
        if said[:1] == [name]:  # of this start; the names of others may still be old, and the answer then changes
            own = dist.PrefixStore(said[1], store)  # pyright: ignore[reportPrivateImportUsage]
            if own.add("here", int(said[1] != joined_at)) == count:
                return own
            joined_at = said[1]
        time.sleep(0.05)
    raise RuntimeError(f"Timed out: not all of {count} processes were here {timeout:g} seconds after process {number}")


@dataclass(frozen=True, kw_only=True)
class Share:
    """The samples of each batch that a process works on: of each of `parts` equal parts of the batch, an equal piece.

    ValueError where `batch` is no multiple of parts times the number of processes.
    """

    batch: int
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.parts * size()):
            raise ValueError(
                f"batch: expected a multiple of {self.parts * size()} ({self.parts} parts, {size()} processes), got"
                f" {self.batch}"
            )

    @property
    def piece(self) -> int:
        """Samples of a part."""
        return self.batch // self.parts // size()

    def firsts(self, of: int | None = None) -> list[int]:
        """Index in the batch of the first sample of each piece, of this process or process `of`."""
        of = rank() if of is None else of
        return [part * (self.batch // self.parts) + of * self.piece for part in range(self.parts)]

    def samples(self, of: int | None = None) -> list[int]:
        """Indices in the batch of all samples, of this process or process `of`, piece after piece."""
        return [first + i for first in self.firsts(of) for i in range(self.piece)]

    def of_processes(self, ranks: Iterable[int]) -> list[int]:
        """Indices of the samples of some processes; of the whole batch if none is named."""
        found = [i for r in ranks for i in self.samples(r)]
        return found or list(range(self.batch))


def average(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, in place; in fp32, many tensors in one message."""
    if size() == 1:
        return
    waiting, pending = [], []
    tensors = list(tensors)
    for i, tensor in enumerate(tensors):
        waiting.append(tensor)
        if sum(t.numel() * 4 for t in waiting) < BUCKET_BYTES and i + 1 < len(tensors):
            continue
        flat = torch.cat([t.detach().reshape(-1).float() for t in waiting])
        pending.append((dist.all_reduce(flat, async_op=True), flat, waiting))
        waiting = []
    for work, flat, bucket in pending:
        assert work is not None
        work.wait()
        for tensor, mean in zip(bucket, flat.div_(size()).split([t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(mean.view(tensor.shape))


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, of the tensor's shape, in fp32; the tensor itself where the process is alone."""
    if size() == 1:
        return tensor
    result = tensor.detach().float().contiguous().clone()
    dist.all_reduce(result)
    return result.div_(size())


def mean_terms(terms: Mapping[str, Tensor], derived: Collection[str] = ()) -> tuple[dict[str, Tensor], Tensor | None]:
    """(scalars by name, averaged over all processes; fp32 [size]: 1 for each process with one that is not finite).

    One message. Not finite on one process is not finite for all. The second is None where the process is alone; terms
    named in `derived`, which follow from others or from all processes, do not count for it.
    """
    if size() == 1:
        return dict(terms), None
    own = torch.stack([t.detach().float().reshape(()) for t in terms.values()])
    broke = own.new_zeros(size())
    counts = torch.tensor([n not in derived for n in terms], device=own.device)
    broke[rank()] = (~torch.isfinite(own) & counts).any().float() * size()
    means = mean(torch.cat((own, broke)))
    return dict(zip(terms, means[: len(own)].unbind(), strict=True)), means[len(own) :]


def gathered(tensor: Tensor) -> Tensor:
    """[n, ...] of equal shapes on all processes -> [size n, ...], by rank."""
    if size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by process 0's, in place."""
    if size() > 1:
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            tensor.detach().copy_(value)


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns on process 0, on all; where it raises there (ValueError, OSError), the others leave."""
    if size() == 1:
        return function()
    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = function()
        except (ValueError, OSError) as error:
            said[1] = error
    dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise said[1] if is_main() else SystemExit(2)
    return said[0]


def barrier() -> None:
    """Waits until all processes are here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # on CPUs: no GPU is picked for it


class Agreement:
    """Lets all processes act on one process's signal after the same step.

    `of(n)` returns the greatest n of all processes at the call before: what is asked now is on its way while the next
    step is computed. Alone, n itself.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None

    def of(self, number: int) -> int:
        if size() == 1:
            return number
        answer = self.last()
        asked = torch.tensor([number])
        self._pending = (dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True), asked)
        return answer

    def last(self) -> int:
        """The answer to the last question."""
        if self._pending is None:
            return 0
        work, asked = self._pending
        self._pending = None
        work.wait()
        return int(asked)


class _Phase(nn.Module):
    """A function of a step, and the modules whose parameters it uses: what DistributedDataParallel wraps."""

    def __init__(self, function: Callable[..., Any], modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.function, self.modules_of_it = function, nn.ModuleList(modules)

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def replicated(function: Callable[..., Any], *modules: nn.Module) -> Callable[..., Any]:
    """`function`, through DistributedDataParallel where several processes train: backward averages the gradients of
    `modules`, while it computes. The function itself where the process is alone, or nothing of it is trained."""
    if size() == 1 or not any(p.requires_grad for m in modules for p in m.parameters()):
        return function
    torch._dynamo.config.optimize_ddp = False  # one graph a function, not one a bucket
    return DistributedDataParallel(_Phase(function, modules))


@contextlib.contextmanager
def accumulating(*functions: Callable[..., Any], last: bool) -> Iterator[None]:
    """Gradients of `replicated` functions stay here, to be averaged with those of the last part of a batch."""
    with contextlib.ExitStack() as stack:
        for function in functions:
            if isinstance(function, DistributedDataParallel) and not last:
                stack.enter_context(function.no_sync())
        yield
