"""YAML of a catalog, read as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gateway_plugin.errors import ConfigError


class _AsWritten(yaml.SafeLoader):
    """YAML that keeps numbers and dates as written, and refuses a mapping with the same key twice.

    YAML reads ``010`` as 8 and ``1.10`` as 1.1; values in ``args`` and ``env`` are text, and numbers are parsed where
    one is expected. Of two entries with one name the first would be lost silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As the parent's; raises ``ComposerError`` for a duplicate key."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                said = f"'{key.value}' is there twice, first in line {lines[key.value]}"
                raise yaml.composer.ComposerError(None, None, said, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


_AsWritten.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _AsWritten.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def read_yaml(path: Path) -> object:
    """The document in the file ``path``. Raises ``ConfigError``."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_AsWritten)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}: is not valid YAML{where}: {first}") from None
