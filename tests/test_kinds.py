"""Who knows a generation, a cell or a memory by its name: nobody outside of its own folder."""

import ast
import re

import pytest
from test_imports import ROOT, parsed, sources
from told_apart import classes, folder_of, kinds, own_attributes, told_apart


def test_nobody_tells_kinds_apart() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for module, path in sources().items()
        for what in told_apart(path.read_text(encoding="utf-8"), folder_of(module))
    }
    assert found == set()


def test_kinds_are_found() -> None:
    assert kinds() >= {
        *("TimeMixRwkv4", "TimeMixRwkv5", "TimeMixRwkv7", "ChannelMix", "LinearAttention", "FeedForward"),
        *("Whole", "FixedPoint", "Additive", "LossyState"),
    }
    assert {"Architecture", "ReversibleCell", "MemoryRemnant", "Block"} <= classes().keys()
    assert own_attributes()["mantissa"] == own_attributes()["kept_heads"] == "reversal"
    assert {"tensors", "fingerprint", "plan", "layer", "weight"}.isdisjoint(own_attributes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("isinstance(memory, (int, fixed_point.FixedPoint))", "FixedPoint"),
        ("if isinstance(cell, ReversibleCell | Other): pass", "ReversibleCell"),
        ("for base in (ReversibleCell, ResidualBlock):\n    isinstance(code, base)", "ResidualBlock"),
        ("any(isinstance(code, base) for base in (Part, Cost))", "Part"),
        ("issubclass(type(memory), Additive)", "Additive"),
        ("type(remnant) is MemoryRemnant", "MemoryRemnant"),
        ("memory.__class__ == fixed_point.FixedPoint", "FixedPoint"),
        ("type(remnant) in (KeptSteps, MemoryRemnant)", "KeptSteps"),
        ("match memory:\n    case MemoryRemnant(): pass", "MemoryRemnant"),
        ("match memory:\n    case fixed_point.FixedPoint(mantissa=m): pass", "FixedPoint"),
        ("type(m).__name__ == 'MemoryRemnant'", "MemoryRemnant"),
        ("m.__class__.__qualname__ in ('Additive', 'Whole')", "Whole"),
        ("{FixedPoint: 1, Whole: 2}[type(memory)]", "FixedPoint"),
        ("@size.register(MemoryRemnant)\ndef _(m): pass", "MemoryRemnant"),
        ("hasattr(memory, 'mantissa')", "mantissa"),
        ("getattr(memory, 'mantissa', None)", "mantissa"),
        ("'mantissa' in vars(memory)", "mantissa"),
        ("'mantissa' in memory.__dict__", "mantissa"),
        ("if config.rwkv_version == '4': pass", "4"),
        ("gate = version in ('5.1', '5.2')", "5.1"),
        ("wide = '6' != name", "6"),
        ("version == 'linear-attention'", "linear-attention"),
        ("if name == 'coupled-5.2': pass", "coupled-5.2"),
        ("config.rwkv_version == 'coupled'", "version"),
        ("match version:\n    case '5.0': pass", "5.0"),
        ("vectors = {'4': 18, '5.2': 22}[version]", "5.2"),
        ("heads = version[0] == '5'", "version"),
        ("config['rwkv_version'][:1] == '5'", "version"),
        ("config.get('rwkv_version') == 'five'", "version"),
        ("'5' in model.config.rwkv_version", "version"),
        ("heads = version.startswith('5')", "version"),
        ("heads = version.startswith(('5', '6'))", "version"),
        ("heads = version.split('.')[0] in ('5', '6')", "version"),
        ("re.match('[56]', version)", "version"),
        ("float(config.rwkv_version) >= 5", "version"),
        ("int(version[0]) > 4", "version"),
        ("architecture is RWKV5_2", "RWKV5_2"),
        ("from rwkv_rev.architectures.rwkv7 import RWKV7", "RWKV7"),
        ("from rwkv_rev.architectures import rwkv7_scan", "rwkv7_scan"),
        ("goose = is_rwkv7(tensors)", "is_rwkv7"),
        ("def for_rwkv4(model): pass", "for_rwkv4"),
        ("from rwkv_rev.cells import ChannelMix as Mix", "ChannelMix"),
        ("from rwkv_rev import cells\ncells.TimeMixRwkv4(8)", "TimeMixRwkv4"),
    ],
)
def test_the_search_finds(text: str, expected: str) -> None:
    assert expected in told_apart(text, "bptt")


@pytest.mark.parametrize(
    ("text", "folder", "expected"),
    [
        ("isinstance(memory, FixedPoint)", "cells", {"FixedPoint"}),
        ("type(remnant) is MemoryRemnant", "wkv", {"MemoryRemnant"}),
        ("hasattr(memory, 'mantissa')", "architectures", {"mantissa"}),
        ("config.rwkv_version[0] == '5'", "cells", {"version"}),
        ("isinstance(cell, ChannelMix)", "reversal", {"ChannelMix"}),
        ("isinstance(memory, FixedPoint)\nhasattr(memory, 'mantissa')", "reversal", set()),
        ("families = version.split('.')[0]\nversion.startswith('5')", "architectures", set()),
        ("from rwkv_rev.reversal.fixed_point import FixedPoint\nFixedPoint.of(x)", "cells", set()),
    ],
)
def test_a_folder_may_know_its_own(text: str, folder: str, expected: set[str]) -> None:
    assert told_apart(text, folder) == expected


@pytest.mark.parametrize(
    "text",
    [
        "print('RWKV-4')\nshape = {'version': '5.2'}\nversion = '4'",
        "known.version == other.version",
        "torch.__version__.startswith('2')",
        "hasattr(tensor, 'full_tensor')\nisinstance(x, Tensor)",
        "from rwkv_rev.architectures.architecture import Architecture\ndef f(a: Architecture): pass",
        "format_version != 1",
    ],
)
def test_the_search_finds_no_more(text: str) -> None:
    assert told_apart(text) == set()


FOREIGN = re.compile(
    r"time_(decay|faaaa|first|maa|mix_|state)|(^|\.)(att|ffn|emb)\.|feed_forward\.|attention\.|^x_[rwkvag]$|^r_k$"
)
"""Names of tensors in other tools' files."""
KNOW_FOREIGN = {
    "rwkv_rev/benchmark/kernels.py": "reads a checkpoint's first layer for what recurrences are measured on",
    "rwkv_rev/benchmark/rwkv_timer.py": "runs the rwkv package",
    "rwkv_rev/equivalence/oracles.py": "runs the rwkv package",
    "rwkv_rev/equivalence/rwkv_worker.py": "runs the rwkv package",
    "rwkv_rev/state_file.py": "says of a tuned state that it is none of a conversation",
}


def test_foreign_names_are_known_where_checkpoints_are_read() -> None:
    found = set()
    for module, path in sources().items():
        nodes = list(ast.walk(parsed(path.read_text(encoding="utf-8"))))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in prose]
        if any(isinstance(text, str) and FOREIGN.search(text) for text in texts):
            found.add((module.split(".")[1], path.relative_to(ROOT).as_posix()))
    assert {
        name for folder, name in found if folder not in ("architectures", "converters")
    } == KNOW_FOREIGN.keys()
    assert {"architectures", "converters"} <= {folder for folder, _ in found}
