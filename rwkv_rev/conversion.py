"""Convert a checkpoint into a Hugging Face model folder, in one pass and without changing a value.

    find (hub.py) -> open (reading.py) -> detect (detection.py) -> stream (rewriter.py) -> verify -> rename

Beyond the memory-mapped source at most one tensor is held while weights are written. The folder appears
whole, after verification, or not at all (safe_output.py). ``conversion.json`` in it says what the weights came from,
without the paths of this machine.
"""

import functools
import json
import platform
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache

from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.card import model_card
from rwkv_rev.converters.converted import RECORD_NAME
from rwkv_rev.converters.detection import Detected, detect
from rwkv_rev.converters.inspection import notes_on
from rwkv_rev.converters.names import by_foreign, tensor_table
from rwkv_rev.converters.reading import Checkpoint, open_checkpoint
from rwkv_rev.converters.rewriter import Entry, Shard, parse_size, shard_layout, write_shards
from rwkv_rev.errors import CheckpointError, ConfigError, OutputError, VerificationFailed
from rwkv_rev.folders.folder import TOKENIZER_NAMES
from rwkv_rev.folders.hub import Expected, LocalCheckpoint, expected_files, resolve
from rwkv_rev.folders.safe_output import check_output, check_place, require_space, whole_directory
from rwkv_rev.folders.source import Source, parse_source
from rwkv_rev.folders.whereabouts import remember
from rwkv_rev.printable import shortened
from rwkv_rev.progress import Progress
from rwkv_rev.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VERIFY_TOKENS = 256


@dataclass(frozen=True)
class Conversion:
    """What a conversion made, or with ``dry_run`` would make.

    Attributes:
        directory: the model folder.
        files: name and size in bytes of each source file.
        config: of the converted model; None only for a dry run of a repository that is not in the cache.
        record: contents of ``conversion.json``; without the SHA-256 sums after a dry run.
        shards: the safetensors files and what is in them.
        verification: the report, if verification was asked for.
        written: False after a dry run.
        notes: what people should know of how the source was read.
    """

    directory: Path
    files: tuple[tuple[str, int | None], ...]
    config: RwkvRevConfig | None = None
    record: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    verification: Any = None
    written: bool = True
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "directory": str(self.directory),
            "written": self.written,
            "files": [{"file": name, "bytes": size} for name, size in self.files],
            "shards": [
                {"file": shard.filename, "bytes": shard.nbytes, "tensors": len(shard.entries)}
                for shard in self.shards
            ],
            "config": None if self.config is None else self.config.to_dict(),
            "record": self.record,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "notes": list(self.notes),
        }


class ConversionDiffers(VerificationFailed):
    """The converted model does not compute what its original computes; ``report`` says where."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class _Settings:
    dtype: str
    group_norm_eps: float | None
    tokenizer: str | None
    verify: bool
    progress: bool


@checked
def convert(
    source: str | Path | Source,
    output: str | Path | None = None,
    *,
    file: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    group_norm_eps: float | None = None,
    verify: bool = False,
    force: bool = False,
    max_shard_size: str | int = "5GB",
    tokenizer: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Convert an RWKV-4/5 checkpoint into a model folder of Hugging Face layout.

    Args:
        source: a Hub id, a ``.pth`` file, a folder in Hugging Face layout, or ``bundled:NAME``.
        output: folder to make; None makes one in the current folder, named after the source.
        file: which ``.pth`` of a repository that holds several, by name or glob.
        revision: branch, tag or commit of a Hub repository.
        dtype: stored dtype; ``auto`` keeps every tensor's own.
        group_norm_eps: eps of RWKV-5's GroupNorm, ``1e-5`` for checkpoints made without the division by 8.
        verify: compare logits with the original implementation over 256 tokens before the folder appears.
        force: replace an existing model folder, at the very end.
        max_shard_size: largest safetensors file, for example ``"5GB"``.
        tokenizer: ``world``, ``byte``, ``neox``, a folder or a Hub id instead of the one chosen by the
            vocabulary's size; ``none`` leaves the tokenizer out.
        progress: tell on stderr how far it is, by bytes.
        dry_run: plan, but write and download nothing.

    Raises:
        SourceError: if the source cannot be found or told apart.
        CheckpointError: if it is damaged, not RWKV-4/5, holds NaN, or does not fit ``dtype``.
        OutputError: if the folder exists without ``force`` or cannot be written.
        ConversionDiffers: if ``verify`` finds a difference; nothing is left behind.
    """
    if group_norm_eps is not None and not (
        isinstance(group_norm_eps, float | int) and 0 < group_norm_eps < 1 and group_norm_eps is not True
    ):
        raise ConfigError(
            f"group_norm_eps = {shortened(group_norm_eps)} must be a number above 0 and below 1"
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    parse_size(max_shard_size)
    parsed = source if isinstance(source, Source) else parse_source(str(source), file=file, revision=revision)
    read = [] if tokenizer in TOKENIZER_NAMES else [tokenizer]
    if output is not None and not dry_run:  # refuse before anything is downloaded
        if parsed.kind in ("file", "directory"):
            _refuse_overlap([parsed.path], Path(output))
        check_output(Path(output).absolute(), force=force, directory=True, inputs=read)
    expected = expected_files(parsed)
    directory = Path(output) if output is not None else Path(default_name(parsed, expected))
    if not dry_run:
        check_output(directory.absolute(), force=force, directory=True, inputs=read)
    else:
        check_place(directory.absolute())
    if dry_run and not _is_here(parsed, expected):
        return Conversion(directory, expected.files, written=False)
    local = resolve(parsed, progress=progress)
    _refuse_overlap(local.files, directory)
    settings = _Settings(dtype, group_norm_eps, tokenizer, verify, progress)

    with open_checkpoint(local) as checkpoint:
        if checkpoint.config.get("model_type") == RwkvRevConfig.model_type:
            raise CheckpointError(f"{parsed} is already converted; use it as it is, or export it first")
        architecture = detect(checkpoint)
        config = _config(checkpoint, architecture, settings)
        if group_norm_eps is not None and not config.architecture.has_group_norm:
            raise ConfigError(
                f"group_norm_eps = {group_norm_eps} is without effect: {config.architecture.called} has no GroupNorm; "
                "leave it out"
            )
        shards = shard_layout(_entries(checkpoint, architecture, config, dtype), max_shard_size)
        record = _record(local, checkpoint, architecture, settings)
        notes = notes_on(checkpoint)
        report = None
        if not dry_run:
            require_space(directory.parent, sum(shard.nbytes for shard in shards))
            with whole_directory(directory, force=force) as folder:
                report = _fill(folder, directory, local, checkpoint, config, record, shards, settings)
            if parsed.kind in ("file", "directory"):
                remember(record, parsed.path)
    return Conversion(
        directory, expected.files, config, record, tuple(shards), report, written=not dry_run, notes=notes
    )


def default_name(source: Source, expected: Expected) -> str:
    """Folder name made from a source: its ``.pth`` file's name or the repository's, with ``-rev`` added."""
    if source.kind == "bundled":
        name = source.location
    elif len(expected.files) == 1 and Path(expected.files[0][0]).suffix in (".pth", ".pt"):
        name = Path(expected.files[0][0]).stem
    elif source.kind == "hub":
        name = source.location.split("/")[-1]
    else:
        path = Path(source.location).resolve()
        name = path.stem if path.is_file() else path.name
    return f"{name}-rev"


def _is_here(source: Source, expected: Expected) -> bool:
    """Whether reading the source would download nothing."""
    return source.kind != "hub" or all(
        isinstance(try_to_load_from_cache(source.location, name, revision=expected.commit), str)
        for name, _ in expected.files
    )


def _fill(
    folder: Path,
    directory: Path,
    local: LocalCheckpoint,
    checkpoint: Checkpoint,
    config: RwkvRevConfig,
    record: dict[str, Any],
    shards: list[Shard],
    settings: _Settings,
) -> Any:
    """Write everything into ``folder``, complete ``record``, and return the verification's report."""
    from transformers import GenerationConfig

    from rwkv_rev.tokenization import choose_tokenizer

    if settings.tokenizer != "none":
        choose_tokenizer(
            config.vocab_size, override=settings.tokenizer, source_directory=local.directory
        ).save_pretrained(str(folder))
    config.save_pretrained(str(folder))
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
    ).save_pretrained(str(folder))

    rows = {row.name: row for row in tensor_table(config, record["layout"])}

    def read(entry: Entry) -> torch.Tensor:
        return rows[entry.name].of(checkpoint.tensor(entry.source))

    stop = threading.Event()
    # Hashing takes as long as writing and leaves the interpreter to others, so both run at once.
    with ThreadPoolExecutor(1) as beside:
        hashes = beside.submit(checkpoint.sha256, stop)
        try:
            total = sum(shard.nbytes for shard in shards)
            with Progress("converting", total, "bytes", wanted=settings.progress) as shown:
                write_shards(shards, folder, read, shown.add)
            record["sha256"] = hashes.result()
        finally:
            stop.set()
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    report = None
    if settings.verify:
        from rwkv_rev.equivalence.verification import verify_directory

        # of the Hub's the record names the very commit
        original = local.source if local.commit is None else None
        report = verify_directory(folder, original=original, tokens=VERIFY_TOKENS, progress=settings.progress)
        report = replace(report, directory=str(directory))  # the folder has a temporary name until the end
        if not report.passed:
            raise ConversionDiffers(f"{report.summary}; nothing was written (--no-verify writes it)", report)
    public_report = None if report is None else replace(report, original=record["source"])
    (folder / "README.md").write_text(model_card(config, record, public_report), encoding="utf-8")
    return report


def _entries(
    checkpoint: Checkpoint, architecture: Detected, config: RwkvRevConfig, dtype: str
) -> Iterator[Entry]:
    """What to write, in the source's own order: reading touches every file of it once."""
    rows = by_foreign(tensor_table(config, architecture.layout))
    for name in checkpoint.names():
        for row in rows[name]:
            yield Entry(row.name, name, row.shape, DTYPES.get(dtype, checkpoint.dtype(name)))


def _config(checkpoint: Checkpoint, architecture: Detected, settings: _Settings) -> RwkvRevConfig:
    overrides: dict[str, Any] = {"architectures": ["RwkvRevForCausalLM"]}
    if settings.group_norm_eps is not None:
        overrides["group_norm_epsilon"] = settings.group_norm_eps
    if settings.dtype != "auto":
        overrides["dtype"] = DTYPES[settings.dtype]
    else:  # the narrowest that holds every stored value: from_pretrained(dtype="auto") loses nothing
        stored = [checkpoint.dtype(name) for name in checkpoint.names()]
        overrides["dtype"] = functools.reduce(torch.promote_types, stored)
    return architecture.to_config(**overrides)


def _record(
    local: LocalCheckpoint, checkpoint: Checkpoint, architecture: Detected, settings: _Settings
) -> dict[str, Any]:
    import transformers

    counts = Counter(str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names())
    return {
        "source": _public_name(local.source),
        "file": local.chosen,
        "revision": local.source.revision,
        "commit": local.commit,
        "sha256": {},
        "layout": architecture.layout,
        "wrappers": list(checkpoint.wrappers),  # prefixes of the source's names, which exports leave out
        "unusual_shapes": {name: list(shape) for name, shape in architecture.unusual_shapes.items()},
        "group_norm_eps": settings.group_norm_eps,  # as asked for; None is the published default
        "dtypes": dict(counts),
        "versions": {
            "rwkv-rev": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _public_name(source: Source) -> str:
    """A source as others may read it: of a file or folder of this machine the name alone."""
    return source.path.resolve().name if source.kind in ("file", "directory") else str(source)


def _refuse_overlap(sources: Sequence[Path], output: Path) -> None:
    if not output.is_dir():
        return
    inside = output.resolve()
    for file in sources:
        if inside in (file.resolve(), *file.resolve().parents):
            raise OutputError(f"{output} holds the source {file.name}; choose another --output")
