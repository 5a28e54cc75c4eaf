"""A link from the internet to this server, through Gradio's relay: for showing something to somebody, never without a password.

Promises: no link without an API key, since the relay makes the server public; the link's requests pass the same door as all others. The relay ends
TLS and could read along. Cost: the first use downloads Gradio's tunnel program (12 MB, its checksum is checked by Gradio) and asks its server.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from intervale.core.errors import OutsideError, UserError
from intervale.serve.door import Keys


def refuse_open(keys: Keys) -> None:
    """Raises: UserError where a link would open the server to everybody."""
    if not keys.digests:
        raise UserError(
            "--share makes the server public, and there is no password",
            "give --api-key-file FILE (one key a line) or INTERVALE_API_KEYS: browsers are asked for the key, programs send it",
        )


def share_link(port: int) -> str:
    """The public https address of this machine's port; it lives as long as this process. Raises: OutsideError when there is none to be had."""
    import secrets

    from gradio import networking

    # By default it writes into the working folder, which may be anybody's.
    networking.CERTIFICATE_PATH = str(Path(tempfile.mkdtemp(prefix="intervale-share-")) / "certificate.pem")
    try:
        address = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise OutsideError(
            "the share link could not be made: Gradio's relay cannot be reached", "check the network, or try again"
        ) from error
    return "https://" + address.partition("://")[2]


def share(port: int, told: Callable[[str], None], failed: Callable[[OutsideError], None]) -> threading.Thread:
    """Make the link beside the running server, and tell it, or why there is none: the server goes on either way."""

    def work() -> None:
        try:
            told(share_link(port))
        except OutsideError as error:
            failed(error)

    thread = threading.Thread(target=work, name="intervale-share", daemon=True)
    thread.start()
    return thread
