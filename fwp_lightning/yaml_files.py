"""YAML files of plain values: mappings, lists, texts, numbers, true, false and null, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fwp_lightning.errors import UserError

# far beyond any configuration, far below what breaks the stack or fills the memory
DEEPEST, MOST_VALUES, LONGEST_KEY = 50, 100_000, 200
# whether a number is one is decided before Python reads its digits, which takes long for very many
MOST_DIGITS = 400
# what ends a line, rings a bell or turns the direction of writing
UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as people write it: 1e-3 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            where = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"a key is a list or a mapping at {where}; write a text")
            if key_node.value in seen:
                raise UserError(f"the key {key_node.value!r} stands twice, again at {where}; keep one of them")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; a missing, broken or hostile file is one sentence."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8.") from error
    try:
        return _plain_mapping(text)
    except UserError as error:
        raise UserError(f"{path}: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}{place} is not YAML: {problem}.") from error
    except ValueError as error:
        # a date that no calendar has
        raise UserError(f"{path} holds a value that is none: {error}.") from error


def _plain_mapping(text: str) -> dict[str, Any]:
    _require_harmless(text)
    content = yaml.load(text, _Loader)  # a SafeLoader, see above
    if not isinstance(content, dict):
        raise UserError(f"it must hold a mapping of keys to values, not {type(content).__name__}")
    # aliases make large things of small files, and endless ones
    for number, _ in enumerate(_values(content, 0)):
        if number > MOST_VALUES:
            raise UserError(f"it holds more than {MOST_VALUES:,} values; write fewer, or fewer aliases")
    return _with_text_keys(content)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def _require_harmless(text: str) -> None:
    """Refuse what would be dangerous to build: tags, which name Python objects, endless nesting, endless numbers."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        where = f"line {event.start_mark.line + 1}" if event.start_mark else "it"
        if tag := getattr(event, "tag", None):
            raise UserError(f"{where} has the tag {tag!r}; write plain values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"{where} is nested more than {DEEPEST} levels deep; write it flatter")
        digits: str = getattr(event, "value", "")
        if len(digits) > MOST_DIGITS and re.fullmatch(r"[-+0-9_.:eExXa-fA-F]+", digits):
            raise UserError(f"{where} has a number of {len(digits)} digits; write a shorter one")


def _values(value: Any, depth: int) -> Iterator[None]:
    """Yield once for every value that is reached, aliases followed; what is not plain is an error."""
    if depth > DEEPEST:
        raise UserError(f"an alias makes it more than {DEEPEST} levels deep; write it flatter")
    yield
    match value:
        case dict():
            for key, item in value.items():
                _require_key(key)
                yield from _values(item, depth + 1)
        case list():
            for item in value:
                yield from _values(item, depth + 1)
        case str():
            if found := UNPRINTABLE.search(value):
                raise UserError(f"a text has the character {found[0]!r}, which cannot be printed; leave it out")
        case None | bool() | int() | float():
            pass
        case _:
            raise UserError(f"{value!s} is a {type(value).__name__} in YAML; put quotes around it")


def _require_key(key: Any) -> None:
    if not isinstance(key, str | bool | int | float) or not str(key).strip():
        raise UserError(f"{key!r} is no key; write a text")
    if len(str(key)) > LONGEST_KEY:
        raise UserError(f"the key {str(key)[:30]!r}... is longer than {LONGEST_KEY} characters; write a shorter one")
    if UNPRINTABLE.search(str(key)) or "\n" in str(key) or "\t" in str(key):
        raise UserError(f"the key {key!r} has a character that cannot be printed; leave it out")
