"""The processes that share every chunk of a context: who they are, and what they tell each other.

Each of the W ranks of a :class:`ContextGroup` computes a piece of every chunk. All of them make the same calls in the
same order, in both sweeps and in every gradient; what is computed of what they gather is the same on all of them to the
bit.

An error on one rank would leave the others waiting for it. It is written down where all can read it (the store that
the processes have met by), and who waits looks there every second: on a CPU in the wait itself, on a GPU, where the
host runs ahead, by a thread that takes the waiting kernels down.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_rev.errors import ContextParallelError
from rwkv_rev.printable import shortened

LOOK = 1.0
"""Seconds between two looks for an error of another rank."""
GONE = "has ended, or cannot be reached any more"
"""What is said of a process that does not answer."""
BUNDLE = 2**25
"""Bytes of gradients that are summed in one call, where they are not one tensor: a call costs the host 0.1 ms."""
_NARROW = (torch.float16, torch.bfloat16)


class ContextGroup:
    """W ranks at one context.

    Args:
        group: their process group.
        reduce_gradients: whether parameter gradients are summed over the group before they are handed out, so that each
            rank has those of the whole context. Else each has W times those of its own tokens, for whoever takes the
            mean over all processes (DistributedDataParallel, ``fully_shard``).

    Attributes:
        rank: of this process in the group.
        size: W.
        ranks: of all its processes, among all there are.
    """

    def __init__(self, group: "dist.ProcessGroup", *, reduce_gradients: bool = True) -> None:
        self.group = group
        self.reduce_gradients = reduce_gradients
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ContextParallelError(
                "this process is none of the context group's: give each process its own group"
            )
        self.ranks = set(dist.get_process_group_ranks(group))
        self._on_gpu = "nccl" in dist.get_backend(group)
        self._store = dist.distributed_c10d._get_default_store()
        self._name = f"rwkv-rev/context/{'-'.join(map(str, sorted(self.ranks)))}"
        self._losses = 0
        self._failed: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextGroup":
        return self  # of this process, as a copy of a model is

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # no process group outlives its process

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks compute: an error of one is one of all, within seconds.

        Raises:
            ContextParallelError: names the rank that has failed, and its error, on the others.
        """
        self._losses += 1
        if self._failed:
            self._tell(self._failed)
            raise ContextParallelError(f"{self._failed}; start all processes anew")
        try:
            with self._watched():
                yield
        except BaseException as error:
            # what every rank finds out by itself, from the same numbers, or has been told
            if isinstance(error, ContextParallelError):
                raise
            if not (is_of_connections(error) or (self._on_gpu and self._failed)):
                self._tell(f"rank {self.rank} of the context group failed: {_in_one_line(error)}")
                raise
            reason = self._reason() or f"another rank of the context group {GONE}"
            self._failed = reason
            raise ContextParallelError(reason) from error

    def _tell(self, reason: str) -> None:
        with suppress(RuntimeError):  # whoever kept the store may be gone
            self._store.set(self._key, reason)

    @property
    def _key(self) -> str:
        return f"{self._name}/{self._losses}"

    def _reason(self) -> str | None:
        """What another rank has written down about this loss."""
        with suppress(RuntimeError):
            if self._store.check([self._key]):
                return str(self._store.get(self._key).decode())
        return self._failed

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """On a GPU: a thread that ends what other ranks wait for in vain."""
        if not self._on_gpu:
            yield
            return
        done = threading.Event()

        def look() -> None:
            while not done.wait(LOOK):
                if (reason := self._reason()) is not None:
                    self._failed = reason
                    self.group.abort()
                    return

        thread = threading.Thread(target=look, name="rwkv-rev context group", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _finished(self, sending: "dist.Work | None") -> None:
        """Wait for a collective, or for another rank's error."""
        if self._failed:
            raise ContextParallelError(self._failed)
        if sending is None:
            return
        if self._on_gpu:
            sending.wait()  # the stream, not the host
            return
        while True:
            try:
                sending.wait(timeout=timedelta(seconds=LOOK))
                return
            except RuntimeError as error:
                if sending.is_completed() or "timed out" not in str(error).lower():
                    raise  # the group's own patience is at an end, or the connection
            if (reason := self._reason()) is not None:
                self._failed = reason
                raise ContextParallelError(reason)

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's ``part``, of one shape and dtype: [W, ...]; no gradient."""
        sent = part.detach().contiguous().view(-1).view(torch.uint8)
        found = sent.new_empty(self.size * sent.numel())
        self._finished(
            _named("all_gather_single", "all_gather_into_tensor")(
                found, sent, group=self.group, async_op=True
            )
        )
        return found.view(part.dtype).view(self.size, *part.shape)

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """The sum over the ranks of each one's ``parts[r]`` for this rank r, from [W, ...]; no gradient."""
        wide = parts.float() if parts.dtype in _NARROW else parts
        found = wide.new_empty(wide[0].numel())
        given = wide.detach().contiguous().view(-1)
        self._finished(
            _named("reduce_scatter_single", "reduce_scatter_tensor")(
                found, given, group=self.group, async_op=True
            )
        )
        return found.view(parts.shape[1:]).to(parts.dtype)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; no gradient."""
        self._finished(dist.all_reduce(tensor, group=self.group, async_op=True))
        return tensor

    def everywhere(self, flag: bool) -> bool:
        """Whether a flag is set on all ranks."""
        return int(self.add(torch.tensor(int(flag), device=self.device))) == self.size

    def sums(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sum over the ranks of each gradient; one that some ranks have not is zero there."""
        if not gradients:
            return []
        device = next((g.device for g in gradients if g is not None), None) or self.device
        there = self.add(
            torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=device)
        ).tolist()
        if any(0 < ranks < self.size for ranks in there):
            raise ContextParallelError(
                "a parameter has a gradient on some ranks of the context group alone: code inside the model goes by "
                "the rank, or by the tokens that it sees"
            )
        summed = iter(
            self._sums([g for g, ranks in zip(gradients, there, strict=True) if ranks and g is not None])
        )
        return [next(summed) if ranks else None for ranks in there]

    def _sums(self, gradients: list[Tensor]) -> list[Tensor]:
        """Of gradients that all ranks have: small ones travel together."""
        found = [g.float() if g.dtype in _NARROW else g.contiguous() for g in gradients]
        for dtype in dict.fromkeys(wide.dtype for wide in found):
            bundle: list[Tensor] = []
            for wide in [wide for wide in found if wide.dtype == dtype]:
                if wide.nbytes >= BUNDLE:
                    self.add(wide)
                    continue
                bundle.append(wide)
                if sum(each.nbytes for each in bundle) >= BUNDLE:
                    self._add_together(bundle)
                    bundle = []
            self._add_together(bundle)
        return [wide.to(g.dtype) for g, wide in zip(gradients, found, strict=True)]

    def _add_together(self, bundle: list[Tensor]) -> None:
        """:meth:`add` of tensors of one dtype."""
        if bundle:
            together = self.add(torch.cat([each.view(-1) for each in bundle]))
            parts = together.split([each.numel() for each in bundle])
            torch._foreach_copy_([each.view(-1) for each in bundle], list(parts))

    @property
    def device(self) -> torch.device:
        """Where what the group sends lies."""
        return torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else torch.device("cpu")


def _named(name: str, before: str) -> Any:
    """A function of ``torch.distributed`` by its name since torch 2.13, or by that of before."""
    return getattr(dist, name, None) or getattr(dist, before)


def is_of_connections(error: BaseException) -> bool:
    """Whether an error says that another process is not there."""
    text = str(error)
    named = any(
        word in text
        for word in ("Connection closed", "Connection reset", "Broken pipe", "ncclRemoteError", "Timed out")
    )
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named)


def _in_one_line(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {shortened(first)}"
