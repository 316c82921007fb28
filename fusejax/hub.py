"""What is asked of the Hugging Face hub: only what is not on this machine, and only when it can be reached."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

from fusejax.errors import UserError

_TIMEOUT_S = 5.0
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(name: str) -> bool:
    """Whether `name` is on this machine, or can only be meant as a path, rather than a hub name (OWNER/NAME)."""
    path = Path(name).expanduser()
    in_a_folder = "/" in name and path.parent.is_dir()
    return path.exists() or not _NAME.fullmatch(name) or name.startswith(".") or in_a_folder


def refuse_revision(folder: str | Path, revision: str | None) -> None:
    """UserError where a local folder is asked for in a revision."""
    if revision is not None:
        raise UserError(f"{folder}: revision {revision!r}: a local folder has none; leave revision out")


def require_reachable(name: str, what: str) -> None:
    """UserError, within seconds, where `what` of `name` would have to come from a hub that cannot be reached.

    The hub's own client retries for most of a minute before it gives up.
    """
    from huggingface_hub import constants

    advice = f"{what} {name!r} is neither a folder here nor in the local cache"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{advice}, and HF_HUB_OFFLINE is set: give a local folder")
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # only the proxy knows which hosts can be reached
    url = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{advice}, and the hub {url.hostname} cannot be reached ({reason}): give a local folder, or go online"
        ) from None
