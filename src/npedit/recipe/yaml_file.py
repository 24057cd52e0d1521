"""YAML in which a duplicate key in one mapping is an error. PyYAML takes the last one without a message."""

from __future__ import annotations

from typing import Any

import yaml

from npedit.errors import UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": the keys of a merge may be overridden
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float | bool | None):
                if key in lines:
                    raise UserError(
                        f"expected each key once; got {key!r} in line {lines[key]} and again in line {line}; delete one"
                    )
                lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The plain values in YAML text; `source` names the text in messages, as a path does.

    Raises:
        UserError: the text is not YAML, or a mapping has a duplicate key; key and lines are named.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506: a child of SafeLoader
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"expected YAML; got {source}, where {error}; correct the file") from None
