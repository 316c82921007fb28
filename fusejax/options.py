"""Options of commands that have several forms: which were given, and which have no use in the form at hand."""

import argparse
from typing import Any

from fusejax.errors import UserError


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of these options that were given."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if not (value is None or value is False)}


def refuse(options: argparse.Namespace, form: str, *names: str) -> None:
    """UserError where an option is given that this form of a command has no use for."""
    useless = ", ".join(map(flag, given(options, *names)))
    if useless:
        command = options.command
        raise UserError(f"{command} {form}: has no use for {useless} (see fusejax {command} --help)")
