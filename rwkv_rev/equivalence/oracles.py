"""The original implementations, each as a function from tokens to logits; none runs our own model code.

    rwkv          the ``rwkv`` package of RWKV's author, all of 4, 5.0, 5.1, 5.2, 6, 7, in a process of its own
    transformers  ``RwkvForCausalLM``, RWKV-4 only
    naive         :mod:`.naive_model`, float64

Each yields float pieces ``[t, V]`` in order and raises :class:`OracleUnavailable` when it cannot run for
this original, or not in the dtype asked for: in float64 an oracle tells its own rounding from a difference.
What each implementation does that would spoil the comparison, and how it is kept from doing
so (the tests show the first three bite):

- ``rwkv`` normalises the embedding in the checkpoint's dtype (bfloat16: logits off by up to 5e-2). It gets
  a copy whose embedding and ln0 are float32; all other tensors it widens itself, exactly.
- ``rwkv`` finds the number of heads of a v5 file only where ``ln_x`` comes before ``time_decay``, so a
  one-layer file in the usual order makes it fail. The copy has its keys in that order.
- ``rwkv`` overwrites the state list it is given, and builds T x T matrices for 5.0 and 5.1: it is fed
  pieces of 256 tokens with a copied state.
- ``rwkv`` reads ``RWKV_*`` while it is imported, turns TF32 on and may print. It runs in a process without
  those variables but ``RWKV_JIT_ON=0``, its standard output discarded, which later calls find again.
- ``rwkv`` knows no float64: there the worker gives its module a ``torch`` whose float32 is float64. Of RWKV-7 it does
  not compute what float64 would tell: its e^(-1/2) has six digits.
- ``rwkv`` has another class for RWKV-7, which a variable asks for before it is imported: one process for it, one for
  the others. That class reads no tuned initial state: the worker hands it over.
- ``rwkv`` has GroupNorm eps 64e-5 written into its code: unavailable for an original of another eps.
- ``transformers`` halves the residual stream every ``rescale_every`` layers and divides its weights in
  place to do so: ``rescale_every=0``, built from the original's tensors, dtype float32 said aloud, batch 1.
"""

import atexit
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.equivalence.naive_model import LAYER_NORM_EPSILON, PUBLISHED_GROUP_NORM_EPSILON, naive_logits
from rwkv_rev.equivalence.original import Original
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.folders.temporary import temporary_folder

RWKV_PACKAGE_PIECE = 256
_WORKER = Path(__file__).with_name("rwkv_worker.py")


class OracleUnavailable(RwkvRevError):
    """This oracle cannot run for this original.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: str, instead: str = "") -> None:
        super().__init__(f"{reason}; {instead}" if instead else reason)
        self.reason = reason


def rwkv_package(original: Original, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Logits of the ``rwkv`` package on the CPU, in float32 or float64.

    Needs room in the temporary folder for a copy of the checkpoint and for the logits.

    Raises:
        OracleUnavailable: package missing, not enough room, other GroupNorm eps, or it failed.
    """
    package, called = original.config.architecture.rwkv_package, original.config.architecture.called
    if package is None:
        raise OracleUnavailable(f"the rwkv package knows no {called}", "use --oracle naive")
    try:
        importlib.metadata.version("rwkv")
    except importlib.metadata.PackageNotFoundError:
        raise OracleUnavailable("the rwkv package is not installed: pip install 'rwkv-rev[verify]'") from None
    published = math.isclose(original.group_norm_epsilon, PUBLISHED_GROUP_NORM_EPSILON)
    if original.has_group_norm and not published:
        raise OracleUnavailable(
            f"the rwkv package has GroupNorm eps {PUBLISHED_GROUP_NORM_EPSILON:g} built in, "
            f"this model's is {original.group_norm_epsilon:g}",
            "--oracle naive can check it",
        )
    if not math.isclose(original.layer_norm_epsilon, LAYER_NORM_EPSILON):
        raise OracleUnavailable(
            f"the rwkv package has LayerNorm eps {LAYER_NORM_EPSILON:g} built in, "
            f"this model's is {original.layer_norm_epsilon:g}",
            "--oracle naive can check it",
        )
    if package.inexact and dtype == torch.float64:
        raise OracleUnavailable(f"the rwkv package has {package.inexact}", "use --oracle naive")
    with temporary_folder("verify") as folder:
        checkpoint, output = Path(folder, "original.pth"), Path(folder, "logits")
        vocabulary = original.config.vocab_size
        spare = len(tokens) * vocabulary * dtype.itemsize
        _write_checkpoint(original, checkpoint, dtype, spare=spare)
        _run_worker(checkpoint.with_suffix(""), tokens, output, dtype, package.environment)
        # Not mapped: on some systems a folder with a mapped file in it cannot be removed.
        with output.open("rb") as stream:
            while chunk := stream.read(dtype.itemsize * vocabulary * 64):
                yield torch.frombuffer(bytearray(chunk), dtype=dtype).view(-1, vocabulary)


def _write_checkpoint(original: Original, path: Path, dtype: torch.dtype, *, spare: int) -> None:
    # Names that hold ln_x first: the package looks for them before it believes time_decay.
    names = sorted(original.tensors, key=lambda name: ".ln_x." not in name)
    tensors = {}
    for name in names:
        tensor = original.tensors[name]
        if name == "emb.weight" or ".ln0." in name:
            tensor = tensor.to(dtype)
        elif tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes whole storages
        tensors[name] = tensor
    needed = spare + sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OracleUnavailable(
            f"the rwkv package needs {needed / 1e9:.1f} GB in {path.parent.parent}, "
            f"{free / 1e9:.1f} GB are free; set TMPDIR to a larger disk or use --oracle naive"
        )
    torch.save(tensors, path)


def rwkv_process(script: Path, *arguments: object, jit: bool, variables: Mapping[str, str]) -> dict[str, Any]:
    """``args`` and ``env`` of a subprocess in which ``script`` uses the ``rwkv`` package on the CPU.

    ``variables``: the architecture's. RWKV-7's class asks PyTorch itself whether to be compiled, which takes 20 s.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RWKV_")}
    environment |= {"RWKV_JIT_ON": str(int(jit)), "RWKV_CUDA_ON": "0", "PYTORCH_JIT": str(int(jit))}
    environment |= variables
    return {"args": [sys.executable, "-P", str(script), *map(str, arguments)], "env": environment}


class _Worker:
    """A process with the ``rwkv`` package in it, which answers one request after another: importing takes seconds."""

    def __init__(self, dtype: torch.dtype, variables: Mapping[str, str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            **rwkv_process(_WORKER, int(dtype == torch.float64), jit=False, variables=variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )
        atexit.register(self.close)

    def run(self, **request: object) -> None:
        """Answer one request, whatever it takes.

        Raises:
            OracleUnavailable: with what the package said, or the process when it ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode("utf-8", "replace").strip().splitlines()
            answer = said[-1] if said else f"exit status {status}"
        if answer.strip():
            raise OracleUnavailable(f"the rwkv package failed on this checkpoint: {answer.strip()}")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.communicate()
        self._said.close()


_workers: dict[tuple[object, ...], _Worker] = {}
_one_request = threading.Lock()


def _run_worker(
    model: Path, tokens: Tensor, output: Path, dtype: torch.dtype, variables: Mapping[str, str]
) -> None:
    """Have logits written by this process's worker for ``dtype`` and variables, which a first call starts."""
    with _one_request:
        key = (
            os.getpid(),
            dtype,
            *sorted(variables.items()),
        )  # not that of the process that this one was forked from
        if key not in _workers or not _workers[key].lives:
            _workers[key] = _Worker(dtype, variables)
        try:
            _workers[key].run(
                model=str(model),
                tokens=tokens.tolist(),
                output=str(output),
                piece=RWKV_PACKAGE_PIECE,
                threads=torch.get_num_threads(),
            )
        except BaseException:  # stopped in the middle: its next answer would be to this request
            _workers.pop(key).close()
            raise


def transformers_class(
    original: Original, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Logits of ``transformers.RwkvForCausalLM`` in float32.

    Raises:
        OracleUnavailable: for RWKV-5, for float64, or a transformers without this class.
    """
    if dtype != torch.float32:
        raise OracleUnavailable("transformers rounds the keys of RWKV-4 to float32")
    if original.transformers_tensors is None:
        raise OracleUnavailable("transformers knows RWKV-4 only", "use --oracle rwkv or --oracle naive")
    try:
        from transformers import RwkvConfig, RwkvForCausalLM
    except ImportError:
        raise OracleUnavailable("this transformers has no RwkvForCausalLM", "use --oracle rwkv") from None
    tensors = {name: tensor.float() for name, tensor in original.transformers_tensors.items()}
    sizes = original.config
    config = RwkvConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        attention_hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=original.num_layers,
        context_length=max(len(tokens), 1),
        layer_norm_epsilon=original.layer_norm_epsilon,
        rescale_every=0,
        tie_word_embeddings=False,
        use_cache=False,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        model = RwkvForCausalLM(config)
    model.load_state_dict(tensors, assign=True)
    model.eval()
    with torch.no_grad():
        yield model(input_ids=tokens[None]).logits[0]


def naive(original: Original, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Logits of the scan, the truth in float64."""
    if original.scan is None:
        called = original.config.architecture.called
        raise OracleUnavailable(
            f"the architecture of {called} has no `scan`, the plain loop that logits are compared with",
            "give it one, or check what needs none: --reversal, --gradients",
        )
    yield from naive_logits(
        original.tensors,
        tokens,
        scan=original.scan,
        group_norm_epsilon=original.group_norm_epsilon,
        layer_norm_epsilon=original.layer_norm_epsilon,
        dtype=dtype,
    )


ORACLES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "rwkv": rwkv_package,
    "transformers": transformers_class,
    "naive": naive,
}
