"""``vidgen serve``: the page with our nodes, until ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import webbrowser
from collections.abc import Callable
from urllib.parse import urlencode

from aiohttp import web

from ...vidgen_core.errors import SettingsError
from ..custom_nodes import load_packs, own_packs
from .app import Server, ServerSettings


def new_server(settings: ServerSettings) -> Server:
    """A server with the nodes that a render knows, and the packs that were named.

    Raises:
        FileError: there is nothing at the place of a named pack.
    """
    return Server(settings, load_packs(settings.custom_nodes, own_packs()))


def new_runner(server: Server) -> web.AppRunner:
    # Packed requests are refused; unpacking them first is what they are made for.
    return web.AppRunner(server.application(), access_log=None, shutdown_timeout=2, auto_decompress=False)


def serve(settings: ServerSettings, *, say: Callable[[str], None], is_opening: bool = False) -> None:
    """Listen until the process is asked to stop.

    Raises:
        UserError: no page, no token where one is needed, or the port is taken.
    """
    bound = _bind(settings)  # before anything slow
    with contextlib.closing(bound):
        server = new_server(settings)
        server.packs.tell_problems()
        asyncio.run(_serve(server, bound, say, is_opening))


async def _serve(server: Server, bound: socket.socket, say: Callable[[str], None], is_opening: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no signal handlers in the loop; there KeyboardInterrupt ends asyncio.run.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    runner = new_runner(server)
    await runner.setup()
    try:
        await web.SockSite(runner, bound).start()
        address = _address(server.settings, bound)
        say(f"VidGen is at {address}\nFiles: {server.places.root}\nctrl-C stops it.")
        if is_opening:
            webbrowser.open(address)
        await stop.wait()
    finally:
        await runner.cleanup()


def _bind(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.listen, settings.port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise SettingsError(
            f"The server cannot listen there ({error})",
            given=f"{settings.listen}, port {settings.port}",
            do="use another --port (0 takes a free one), or stop the program that has it",
        ) from error
    bound.listen(128)
    return bound


def _address(settings: ServerSettings, bound: socket.socket) -> str:
    host = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    query = f"/?{urlencode({'token': settings.token})}" if settings.token else ""
    return f"http://{host}:{bound.getsockname()[1]}{query}"
