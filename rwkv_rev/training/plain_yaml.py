"""YAML of which every reader makes the same: PyYAML's own, less what it reads otherwise than people write it.

PyYAML follows YAML 1.1, where ``0400`` is 256, ``1:30`` is 90 and ``1_0`` is 10; YAML 1.2 has none of these, and both
let the last one win where a key stands twice. All of it is refused by name, as are aliases, of which a few lines can
make more than memory holds.
"""

from pathlib import Path
from typing import Any

import yaml

from rwkv_rev.counts import is_plain
from rwkv_rev.errors import ConfigError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.printable import shortened

MOST_YAML_BYTES = 1 << 20  # PyYAML reads a megabyte in seconds


class NotPlain(ValueError):
    """A YAML text that readers disagree about; the message has its line."""


class PlainLoader(yaml.SafeLoader):
    """Raises NotPlain for what is refused, and what PyYAML raises otherwise."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings have no aliases (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """With dashes as good as underscores in keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if isinstance(key, yaml.ScalarNode) and name in seen:
                raise NotPlain(f"{shortened(key.value)} stands there twice{_place(key)}; write it once")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if not is_plain(node.value):
            raise NotPlain(
                f"{shortened(node.value)}{_place(node)} is read otherwise by other readers of YAML: write a plain "
                "decimal number, or a text in quotes"
            )
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


def read_yaml(path: Path) -> dict[Any, Any]:
    """What a file of settings holds, nothing where it is empty.

    Raises:
        ConfigError: for a file that cannot be read, is too large, or holds no such YAML.
    """
    refuse_special(path, ConfigError)
    try:
        if (size := path.stat().st_size) > MOST_YAML_BYTES:
            raise ConfigError(f"{path} holds no settings: it has {size:,} bytes")
        values = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except NotPlain as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid YAML: {shortened(' '.join(str(error).split()), 300)}"
        ) from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values or {}


def parse_yaml(text: str) -> Any:
    """What a YAML text says; ValueError for whatever its parser raises."""
    try:
        return yaml.load(text, PlainLoader)
    except NotPlain:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"


for _tag in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", PlainLoader.construct_number)
