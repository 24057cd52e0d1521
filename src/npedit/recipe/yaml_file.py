"""YAML as it is meant: a key that stands twice in one mapping is an error, not a silent choice of the last."""

from __future__ import annotations

from typing import Any

import yaml

from npedit.errors import UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": its keys may be overridden, that is its purpose
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float | bool | None):
                if key in seen:
                    raise UserError(
                        f"expected each key once; got {key!r} in line {seen[key]} and again in line {line}; delete one"
                    )
                seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The plain values in YAML text; `source` names the text in messages, as a path does.

    Raises:
        UserError: the text is not YAML, or a key stands twice in one mapping; key and lines are named.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506: a child of SafeLoader
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"expected YAML; got {source}, where {error}; correct the file") from None
