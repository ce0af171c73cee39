"""What a rank says when another one died or fell silent: communication errors told from all others, as one line."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from parallel.pipeline.executor import PeerLost, is_communication

REPOSITORY = Path(__file__).resolve().parent.parent


def lost_peer(error: BaseException) -> str | None:
    """One line when `error` comes from the network or a peer (which action, or else which file and function waited);
    None for any other error."""
    if isinstance(error, PeerLost):
        return _plain(str(error))
    text = str(error).strip()
    if not is_communication(error):
        return None
    where = "starting the process group"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts and path.name != "__main__.py":
            where = f"{frame.name} ({path.relative_to(REPOSITORY)})"
    return f"{where} lost a peer: {_plain(text) or type(error).__name__}"


def _plain(text: str) -> str:
    """The first line without gloo's own source file before it and its general advice after it."""
    first = text.splitlines()[0] if text else ""
    return re.sub(r"\[\S+\.cc:\d+\] ", "", first).partition(" This is typically")[0]
