"""YAML files of settings: read, changed from the command line, and checked against declared sections of keys.

A section is a pydantic model: each key is declared once, with its default and its range. Every mistake is one line that
names the file and the key, with the nearest key that there is for one that there is not.
"""

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from fusejax.errors import UserError


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
    short_form: ClassVar[str] = ""  # what may stand in its place, in words


AnySection = TypeVar("AnySection", bound=Section)


def read(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The values of a YAML file with `key=value` overrides, not validated; UserError, naming the file."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8: {error}") from None
    try:
        values = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} {_problem(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold `key: value` lines, as in configs/quickstart.yaml")
    for override in overrides or []:
        _apply(values, override)
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is a mistake; PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in seen:
                    problem = f"{key.value} is given twice, first in line {seen[key.value]}; remove one of the two"
                    raise _Twice(problem=problem, problem_mark=key.start_mark)
                seen[key.value] = line
        return super().construct_mapping(node, deep)


class _Twice(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping."""


def _parse(text: str) -> Any:
    """The value of a text in YAML; YAMLError."""
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value, default=str, skipkeys=True)  # an alias that holds itself has no end
        return value
    except (ValueError, RecursionError) as error:  # of a date that there is none, of brackets without end
        raise yaml.YAMLError(str(error)) from None


def _problem(error: yaml.YAMLError) -> str:
    said = getattr(error, "problem", None) or " ".join(str(error).split())
    return said if isinstance(error, _Twice) else f"not valid YAML: {said}"


def check(values: dict[str, Any], section: type[AnySection], where: str) -> AnySection:
    """`values` as a section of keys, or a UserError naming the key."""
    _refuse_unknown(values, section, "", where)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = _wanted_kind(section, first) or first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r})" if first["type"] not in ("missing", "value_error") else ""
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{got}") from None


def _wanted_kind(section: type[Section], error: Any) -> str:
    """What a value of the wrong kind should be, where pydantic would name its own classes; else the empty string."""
    if error["type"] in ("tuple_type", "list_type"):
        return "should be a list, [a, b]"
    if error["type"] not in ("model_type", "model_attributes_type"):
        return ""
    for part in error["loc"]:
        inner = _section_of(section, part) if isinstance(part, str) else section
        if inner is None:
            return "should be keys and values, {key: value}"
        section = inner
    instead = f"{section.short_form}, or " if section.short_form else ""
    return f"should be {instead}{{key: value}} of {', '.join(section.model_fields)}"


def defaults(section: type[Section], prefix: str = "") -> dict[str, Any]:
    """The default of every key of a section and of those below it, by its dotted name, as JSON has it."""
    found: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        inner = _section_of(section, key)
        if inner is not None:
            found |= defaults(inner, f"{prefix}{key}.")
        elif not field.is_required():
            found[f"{prefix}{key}"] = to_jsonable_python(field.default)
    return found


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override has the form key=value, for example batch.sequences=16")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: {_problem(error)}") from None
    if isinstance(value, dict) and text.endswith(":"):  # `stdlib:` is a mapping in YAML
        value = text
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        child = _step(node, part, override)
        if child is None or isinstance(child, str):
            # `target: NAME` is short for `target: {model: NAME}`; beside `mesh: auto` a key stands alone.
            child = {"model": child} if isinstance(child, str) and child != "auto" else {}
            node[int(part) if isinstance(node, list) else part] = child
        node = child
    if isinstance(node, list):
        _step(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _step(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
            raise UserError(f"{override!r}: {part!r} should be an index below {len(node)}")
        return node[int(part)]
    if not isinstance(node, dict):
        raise UserError(f"{override!r}: there is nothing below {part!r} to set")
    return node.get(part)


def _refuse_unknown(values: Any, section: type[Section], prefix: str, where: str) -> None:
    """Unknown keys get their own message, with the nearest known key."""
    if isinstance(values, list | tuple):
        for i, value in enumerate(values):
            _refuse_unknown(value, section, f"{prefix}{i}.", where)
    if not isinstance(values, dict):
        return
    known = section.model_fields
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else "known here: " + ", ".join(known)
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        inner = _section_of(section, str(key))
        if inner is not None:
            _refuse_unknown(value, inner, f"{prefix}{key}.", where)


def _section_of(section: type[Section], key: str) -> type[Section] | None:
    """The section that a key holds, alone, optional or in a tuple."""
    annotation = section.model_fields[key].annotation
    for kind in getattr(annotation, "__args__", (annotation,)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
