"""Lists within patterns: `${lists.hot}` stands for `{3,17,42}`.

    lists:
      hot: [3, 17, "40..47"]
    rules:
      - {match: "*.mlp.experts.${lists.hot}.*", scheme: fine}

A list that stands alone, `match: ${lists.hot}`, stays a list: that of the rule's patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mixedprec_plugin.preset.tree import Node

KEY = "lists"

_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?")
# not behind an odd number of backslashes, which make it plain text
_REFERENCE = re.compile(r"(?<!\\)((?:\\\\)*)\$\{\s*lists\.([A-Za-z0-9_-]+)\s*\}")


def expand_lists(root: Node) -> Node:
    """Write every list that stands within text as the alternatives of a glob.

    Lists that hold anything but numbers and plain text are left to the schema.
    """
    entry = root.child(KEY)
    known = entry.value if entry is not None and isinstance(entry.value, dict) else {}
    texts = {name: text for name, node in known.items() if (text := _alternatives(node))}
    return _expand(root, texts) if texts else root


def _alternatives(node: Node) -> str:
    """`[3, 17, "40..47"]` -> `{3,17,{40..47}}`; empty where the node is no list to be written."""
    items = node.value if isinstance(node.value, list) else []
    words = []
    for item in items:
        value = item.value
        if isinstance(value, bool) or not isinstance(value, int | str) or "${" in str(value):
            return ""
        text = str(value)
        words.append(f"{{{text}}}" if _RANGE.fullmatch(text) else text)
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}" if words else ""


def _expand(node: Node, texts: Mapping[str, str]) -> Node:
    if isinstance(node.value, dict):
        return Node(
            {key: _expand(below, texts) for key, below in node.value.items()}, node.location
        )
    if isinstance(node.value, list):
        return Node([_expand(below, texts) for below in node.value], node.location)
    if not isinstance(node.value, str) or "${" not in node.value:
        return node
    if _REFERENCE.fullmatch(node.value):
        return node

    def write(match: re.Match[str]) -> str:
        return match[1] + texts[match[2]] if match[2] in texts else match[0]

    return Node(_REFERENCE.sub(write, node.value), node.location)
