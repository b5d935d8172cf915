"""The HTTP and WebSocket side of a server: ComfyUI's addresses and answers, so that its frontend and scripts work.

Bound to loopback unless told otherwise. A request from another site's page is refused by its Origin, one under a
foreign name by its Host; where others may reach the server, each request must bring a token.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import io
import json
import logging
import mimetypes
import platform
import re
import secrets
import shutil
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from aiohttp import WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError

from ...nodes import host as hosts
from ...vidgen_core.errors import FileError, MissingLibraryError, UserError
from ...vidgen_core.media import open_image
from ...vidgen_core.memory.host import FOLDERS, folders_of
from ...vidgen_core.weights.header import read_header
from ..custom_nodes import Packs
from ..executor import Checked, Classes, PromptError, examine, failed, node_errors
from ..plan import answer
from ..render import runs_as_installed
from . import messages, uploads
from .catalog import object_info
from .clients import Client, Event
from .host import ServerHost
from .jobs import Job, Jobs, now_ms
from .places import KINDS, Places, without_mark
from .refusals import Refused as _Refused
from .refusals import refused as _refused

log = logging.getLogger("vidgen")

PACK = "comfyui-vidgen"
ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_JSON_BYTES = 16 * 2**20
MAX_NODES = 5000
MAX_DEPTH = 100
"""of lists and tables in each other"""
_LARGE_JSON_CHARS = 2**18
"""so much is read beside the event loop"""
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 256 * 2**20
"""of the requests that wait"""
MAX_CLIENTS = 500

_FOR_ALL = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin", "X-Frame-Options": "SAMEORIGIN"}
"""headers: no guessing of types, no token in other sites' logs, no page of another site around ours"""
_HARMLESS = frozenset({"image", "video", "audio"})
_ACTIVE = frozenset({"image/svg+xml"})
_COOKIE = "vidgen_token"
_ASKED_AT_START: dict[str, Any] = {"comfy.templates.json": [], "workflows/.index.json": {"favorites": []}}
"""files that the frontend reads whether they are there or not; a 404 would be an error in its console"""
_NEVER_KEPT = frozenset({"Comfy.TutorialCompleted"})
"""settings; without this one the frontend opens its templates at the first start, which are ours"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where a server listens and where its files are."""

    folder: Path
    """with input, output, temp and user"""
    listen: str = "127.0.0.1"
    port: int = 8188
    token: str | None = None
    """must come with every request; None on loopback only"""
    device: str | None = None
    models: Sequence[Path] = ()
    custom_nodes: Sequence[Path] = ()
    """packs of others, or folders with some"""
    has_page: bool = True
    """serve the frontend, and not only the API"""

    @property
    def is_private(self) -> bool:
        return self.listen in LOOPBACK


class Server:
    """The application around a queue of jobs.

    Args:
        settings: see :class:`ServerSettings`.
        packs: the nodes, and the pages of packs besides this one.
    """

    def __init__(self, settings: ServerSettings, packs: Packs) -> None:
        if not settings.is_private and not settings.token:
            raise _needs_token(settings.listen)
        self.settings, self.packs = settings, packs
        self.classes: Classes = packs.classes
        self.titles: Mapping[str, str] = packs.titles
        self.modules: Mapping[str, str] = packs.modules
        self.places = Places(settings.folder)
        self.page = frontend_folder() if settings.has_page else None
        self.clients: dict[str, Client] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.log_lines = _LogLines(self._say_log)
        self.jobs = Jobs(self.classes, self.new_host, self.say)

    def new_host(self) -> ServerHost:
        return ServerHost(
            run_on=self.settings.device,
            folders=self.settings.models,
            places=self.places,
            output_folder=self.places.folder("output"),
        )

    # --- telling clients; from any thread ---

    def say(self, event: str | bytes, data: Mapping[str, Any] | None = None, *, to: str | None = None) -> None:
        message = event if isinstance(event, bytes) else Event(event, data or {})
        self._from_any_thread(self._push, message, to)

    def _from_any_thread(self, tell: Callable[..., None], *what: Any) -> None:
        loop = self.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(tell, *what)

    def _push(self, message: Event | bytes, to: str | None) -> None:
        for client_id, client in self.clients.items():
            if to is None or to == client_id:
                client.push(message)

    def _say_log(self, entry: Mapping[str, str]) -> None:
        self._from_any_thread(self._push_log, Event("logs", {"entries": [entry]}))

    def _push_log(self, message: Event) -> None:
        for client in self.clients.values():
            if client.wants_logs:
                client.push(message)

    # --- the application ---

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_JSON_BYTES)
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/features", self.get_features),
            ("GET", "/users", self.get_users),
            ("GET", "/system_stats", self.get_system_stats),
            ("GET", "/settings", self.get_settings),
            ("POST", "/settings", self.post_settings),
            ("GET", "/settings/{name}", self.get_setting),
            ("POST", "/settings/{name}", self.post_setting),
            ("GET", "/userdata", self.list_userdata),
            ("GET", "/userdata/{name:.+}", self.get_userdata),
            ("POST", "/userdata/{name:.+}/move/{target:.+}", self.move_userdata),
            ("POST", "/userdata/{name:.+}", self.post_userdata),
            ("DELETE", "/userdata/{name:.+}", self.delete_userdata),
            ("GET", "/i18n", self.get_i18n),
            ("GET", "/extensions", self.get_extensions),
            ("GET", "/object_info", self.get_object_info),
            ("GET", "/object_info/{name}", self.get_object_info),
            ("GET", "/global_subgraphs", self.get_nothing),
            ("GET", "/global_subgraphs/{id}", self.get_unknown),
            ("GET", "/node_replacements", self.get_nothing),
            ("GET", "/embeddings", self.get_empty_list),
            ("GET", "/models", self.get_model_folders),
            ("GET", "/models/{folder}", self.get_models),
            ("GET", "/experiment/models", self.get_model_places),
            ("GET", "/experiment/models/{folder}", self.get_placed_models),
            ("GET", "/view_metadata/{folder}", self.get_model_metadata),
            ("GET", "/prompt", self.get_prompt),
            ("POST", "/prompt", self.post_prompt),
            ("POST", "/vidgen/plan", self.post_plan),
            ("GET", "/queue", self.get_queue),
            ("POST", "/queue", self.post_queue),
            ("GET", "/history", self.get_history),
            ("GET", "/history/{id}", self.get_history),
            ("POST", "/history", self.post_history),
            ("GET", "/jobs", self.get_jobs),
            ("POST", "/jobs/cancel", self.cancel_jobs),
            ("GET", "/jobs/{id}", self.get_job),
            ("POST", "/jobs/{id}/cancel", self.cancel_jobs),
            ("POST", "/interrupt", self.post_interrupt),
            ("POST", "/free", self.post_free),
            ("GET", "/view", self.get_view),
            ("POST", "/upload/image", self.post_upload),
            ("POST", "/upload/mask", self.post_upload),
            ("GET", "/workflow_templates", self.get_templates),
            ("GET", "/workflow_templates/{pack}/{name}", self.get_template),
        ]
        for method, path, handler in table:
            for whole in ("/api" + path, path):
                # A GET route answers HEAD, too, which is how programs ask for a file's size.
                app.router.add_get(whole, handler) if method == "GET" else app.router.add_route(method, whole, handler)
        app.router.add_get("/ws", self.websocket)
        app.router.add_get("/api/ws", self.websocket)
        app.router.add_get("/internal/logs", self.get_log_text)
        app.router.add_get("/internal/logs/raw", self.get_logs)
        app.router.add_patch("/internal/logs/subscribe", self.subscribe_to_logs)
        app.router.add_get("/internal/folder_paths", self.get_folder_paths)
        app.router.add_get("/internal/files/{kind}", self.get_files)
        for path in ("/user.css", "/api/userdata/user.css"):
            app.router.add_get(path, self.get_user_css)
        app.router.add_get("/templates/index.json", self.get_empty_list)
        app.router.add_get("/templates/index_logo.json", self.get_nothing)
        app.router.add_get("/templates/index.{language}.json", self.get_empty_list)
        for pack, folder in self._pages().items():
            app.router.add_static(f"/extensions/{pack}", folder)
        app.router.add_get("/", self.get_page)
        if self.page is not None:
            app.router.add_static("/", self.page)
        app.on_startup.append(self._begin)
        app.on_shutdown.append(self._say_goodbye)
        app.on_cleanup.append(self._end)
        return app

    def _pages(self) -> dict[str, Path]:
        """Pack -> its files for the page."""
        return {PACK: ROOT / "web"} | {pack: folder for pack, folder in self.packs.web.items() if pack != PACK}

    async def _begin(self, app: web.Application) -> None:
        self.loop = asyncio.get_running_loop()
        logging.getLogger("vidgen").addHandler(self.log_lines)

    async def _say_goodbye(self, app: web.Application) -> None:
        for client in list(self.clients.values()):
            await client.socket.close(code=1001, message=b"the server stops")

    async def _end(self, app: web.Application) -> None:
        await asyncio.to_thread(self.jobs.close)
        logging.getLogger("vidgen").removeHandler(self.log_lines)
        shutil.rmtree(self.places.root / "temp", ignore_errors=True)

    # --- who may ask ---

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            new_token = self._check_caller(request)
            if request.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise _refused(415, "send the request as it is, not packed", "packed")
            response = await handler(request)
        except _Refused as refused:
            return web.json_response(messages.finite(refused.body), status=refused.status)
        except FileError as error:
            return web.json_response(_refused(404, str(error), "file").body, status=404)
        except UserError as error:
            return web.json_response(_refused(400, str(error)).body, status=400)
        except (HttpProcessingError, web.RequestPayloadError):
            return web.json_response(_refused(400, "the body of the request is damaged").body, status=400)
        if not response.prepared:
            for name, value in _FOR_ALL.items():
                response.headers.setdefault(name, value)
            if request.path.startswith("/extensions/"):
                response.headers["Cache-Control"] = "no-cache"
        if new_token:
            response.set_cookie(_COOKIE, new_token, httponly=True, samesite="Strict")
        return response

    def _check_caller(self, request: web.Request) -> str | None:
        """A token that came in the address and should become a cookie."""
        host = _host_name(request.headers.get("Host", ""))
        origin = request.headers.get("Origin")
        if origin is not None and origin.lower().partition("://")[2] != request.headers.get("Host", "").lower():
            raise _refused(403, "this request comes from the page of another site", "forbidden")
        if request.headers.get("Sec-Fetch-Site") == "cross-site" and request.method != "GET":
            raise _refused(403, "this request comes from the page of another site", "forbidden")
        if self.settings.is_private:
            # A foreign name that points to this machine is how pages of strangers reach local servers.
            if host not in LOOPBACK:
                raise _refused(403, "the server answers under its local names only", "forbidden")
            if self.settings.token is None:
                return None
        token = self.settings.token or ""
        in_address = request.query.get("token")
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        for given in (in_address, bearer, request.cookies.get(_COOKIE)):
            if given and hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (given, token))):
                return given if given == in_address else None
        raise _refused(401, "the token is missing or wrong: open the address that the server printed", "unauthorized")

    # --- small answers ---

    async def get_nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def get_empty_list(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def get_features(self, request: web.Request) -> web.Response:
        return web.json_response(messages.FEATURES)

    async def get_users(self, request: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    async def get_user_css(self, request: web.Request) -> web.Response:
        return web.Response(text="", content_type="text/css")

    async def get_unknown(self, request: web.Request) -> web.Response:
        raise _refused(404, "there is no such thing", "not_found")

    # --- models ---

    async def get_model_folders(self, request: web.Request) -> web.Response:
        return web.json_response(sorted(FOLDERS.values()))

    async def get_models(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(self.new_host().names, _kind_of(request)))

    async def get_model_places(self, request: web.Request) -> web.Response:
        places = self._model_places()
        return web.json_response([{"name": name, "folders": folders} for name, folders in places.items()])

    async def get_placed_models(self, request: web.Request) -> web.Response:
        kind, host = _kind_of(request), self.new_host()
        folders = self._model_places()[FOLDERS[kind]]

        def placed() -> list[dict[str, Any]]:
            return [{"name": name, "pathIndex": _place_of(host.find(kind, name), folders)} for name in host.names(kind)]

        return web.json_response(await asyncio.to_thread(placed))

    async def get_folder_paths(self, request: web.Request) -> web.Response:
        return web.json_response(self._model_places())

    def _model_places(self) -> dict[str, list[str]]:
        """ComfyUI's name of each folder of models -> where it is: in the box first, then where the user said."""
        roots = [Path(root) for root in self.settings.models]
        return {
            name: [str(BUNDLED), *(str(root / folder) for root in roots for folder in folders_of(kind))]
            for kind, name in FOLDERS.items()
        }

    async def get_model_metadata(self, request: web.Request) -> web.Response:
        host, name = self.new_host(), request.query.get("filename", "")

        def read() -> Mapping[str, str]:
            return read_header(host.find(_kind_of(request), name)).metadata

        return web.json_response(dict(await asyncio.to_thread(read)))

    async def get_system_stats(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(system_stats, self.new_host()))

    async def get_page(self, request: web.Request) -> web.StreamResponse:
        if self.page is None:
            return web.json_response({"vidgen": "this server has no page; POST /prompt takes workflows"})
        return web.FileResponse(self.page / "index.html", headers={"Cache-Control": "no-store"})

    async def get_i18n(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(_translations))

    async def get_extensions(self, request: web.Request) -> web.Response:
        found = [] if self.page is None else _scripts(self.page / "extensions", "/extensions")
        for pack, folder in self._pages().items():
            found += _scripts(folder, f"/extensions/{quote(pack)}")
        return web.json_response(found)

    async def get_object_info(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name")
        classes = self.classes if name is None else {name: self.classes[name]} if name in self.classes else {}

        def declare() -> dict[str, Any]:
            with hosts.using(self.new_host()):
                return object_info(classes, self.titles, self.modules)

        # A stranger's declaration may hold what JSON has no word for.
        return web.json_response(
            messages.finite(await asyncio.to_thread(declare)), dumps=partial(json.dumps, default=str)
        )

    async def get_logs(self, request: web.Request) -> web.Response:
        return web.json_response({"size": {"cols": 120, "rows": 40}, "entries": list(self.log_lines.entries)})

    async def get_log_text(self, request: web.Request) -> web.Response:
        return web.json_response("".join(f"{entry['t']} - {entry['m']}" for entry in list(self.log_lines.entries)))

    async def subscribe_to_logs(self, request: web.Request) -> web.Response:
        body = await self._json(request)
        client_id = body.get("clientId")
        client = self.clients.get(client_id) if isinstance(client_id, str) else None
        if client is not None:
            client.wants_logs = body.get("enabled") is True
        return web.json_response({})

    async def get_files(self, request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        if kind not in KINDS:
            raise _refused(400, "the kind of folder is input, output or temp")
        folder = self.places.folder(kind)
        return web.json_response(sorted(path.name for path in folder.iterdir() if path.is_file()))

    # --- prompts ---

    async def get_prompt(self, request: web.Request) -> web.Response:
        return web.json_response({"exec_info": {"queue_remaining": self.jobs.remaining()}})

    async def post_prompt(self, request: web.Request) -> web.Response:
        body = await self._json(request)
        prompt = body.get("prompt")
        if prompt is None:
            raise _refused(400, "the request has no prompt", "no_prompt")
        if isinstance(prompt, Mapping) and len(prompt) > MAX_NODES:
            raise _refused(400, f"the workflow has {len(prompt)} nodes; {MAX_NODES} are allowed", "invalid_prompt")
        if self.jobs.remaining() >= MAX_WAITING:
            raise _refused(429, f"{MAX_WAITING} prompts are waiting already", "queue_full")
        targets = body.get("partial_execution_targets")
        if targets is not None and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
            raise _refused(400, "partial_execution_targets is a list of node ids")
        extra = body.get("extra_data") or {}
        client_id = body.get("client_id")
        if not isinstance(extra, Mapping) or not isinstance(client_id, str | None):
            raise _refused(400, "extra_data is a table and client_id a text")
        if not isinstance(extra.get("extra_pnginfo"), Mapping | None):
            raise _refused(400, "extra_pnginfo is a table")
        num_bytes = len(await request.read())
        if self.jobs.num_waiting_bytes() + num_bytes > MAX_WAITING_BYTES:
            raise _refused(429, f"prompts of {MAX_WAITING_BYTES // 2**20} MB are waiting already", "queue_full")
        job_id = self._new_id(body.get("prompt_id"))
        number = self._number(body)
        try:
            checked = await asyncio.to_thread(self._examine, prompt, targets)
        except PromptError as error:
            raise _Refused(400, error.to_json()) from error
        errors = node_errors(prompt, checked.problems, checked.dependents)
        extra = {**extra, "create_time": now_ms()} | ({} if client_id is None else {"client_id": client_id})
        job = Job(
            id=job_id,
            number=number,
            prompt=prompt,
            outputs=checked.outputs,
            extra_data=extra,
            client_id=client_id,
            num_bytes=num_bytes,
        )
        if not self.jobs.put(job):
            raise _known_id()
        return web.json_response({"prompt_id": job_id, "number": number, "node_errors": messages.finite(errors)})

    async def post_plan(self, request: web.Request) -> web.Response:
        body = await self._json(request)

        def plan() -> dict[str, Any]:
            with hosts.using(self.new_host()):
                return answer(body)

        return web.json_response(messages.finite(await asyncio.to_thread(plan)))

    def _examine(self, prompt: Any, targets: list[str] | None) -> Checked:
        with hosts.using(self.new_host()):
            checked = examine(prompt, self.classes, targets)
        if not checked.outputs:
            raise failed(prompt, checked)
        return checked

    def _new_id(self, given: object) -> str:
        if given is None:
            return str(uuid.uuid4())
        with contextlib.suppress(ValueError):
            if isinstance(given, str) and str(uuid.UUID(given)) == given:
                if self.jobs.find(given) is not None:
                    raise _known_id()
                return given
        raise _refused(400, "prompt_id must be a UUID in small letters with dashes", "invalid_prompt_id")

    def _number(self, body: Mapping[str, Any]) -> float:
        """Its place in the queue: smaller runs first."""
        number = body.get("number")
        if number is not None:
            if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
                raise _refused(400, "number is a number")
            return number
        next_number = self.jobs.next_number()
        return -next_number if body.get("front") is True else next_number

    async def get_queue(self, request: web.Request) -> web.Response:
        jobs = self.jobs.overview()
        return await _told(
            lambda: {
                "queue_running": [] if jobs.running is None else [_entry(jobs.running)],
                "queue_pending": [_entry(job) for job in jobs.waiting],
            }
        )

    async def post_queue(self, request: web.Request) -> web.Response:
        body = await self._json(request)
        if body.get("clear"):
            self.jobs.remove()
        self.jobs.remove(_ids(body, "delete"))
        return web.json_response({})

    async def get_history(self, request: web.Request) -> web.Response:
        wanted = request.match_info.get("id")
        done = [job for job in self.jobs.overview().done if wanted in (None, job.id)]
        most = min(_whole(request.query, "max_items", len(done)), len(done))
        return await _told(lambda: {job.id: _record(job) for job in done[len(done) - most :]})

    async def post_history(self, request: web.Request) -> web.Response:
        body = await self._json(request)
        self.jobs.forget(None if body.get("clear") else _ids(body, "delete"))
        return web.json_response({})

    async def get_jobs(self, request: web.Request) -> web.Response:
        known = self.jobs.overview()
        jobs = [*([known.running] if known.running else []), *known.waiting, *reversed(known.done)]
        wanted = request.query.get("status")
        if wanted:
            jobs = [job for job in jobs if job.status in wanted.split(",")]
        offset, limit = _whole(request.query, "offset", 0), _whole(request.query, "limit", 200)
        page = {"offset": offset, "limit": limit, "total": len(jobs), "has_more": offset + limit < len(jobs)}
        return await _told(
            lambda: {"jobs": [_summary(job) for job in jobs[offset : offset + limit]], "pagination": page}
        )

    async def get_job(self, request: web.Request) -> web.Response:
        job = self.jobs.find(request.match_info["id"])
        if job is None:
            raise _refused(404, "there is no such job", "not_found")
        workflow = {"prompt": job.prompt, "extra_data": job.extra_data}
        return await _told(lambda: _summary(job) | {"outputs": dict(job.shown), "workflow": workflow})

    async def cancel_jobs(self, request: web.Request) -> web.Response:
        job_id = request.match_info.get("id")
        ids = {job_id} if job_id else _ids(await self._json(request), "job_ids")
        self.jobs.remove(ids)
        for one in ids:
            self.jobs.interrupt(one)
        return web.json_response({"cancelled": True})

    async def post_interrupt(self, request: web.Request) -> web.Response:
        body = await self._json(request, may_be_empty=True)
        job_id = body.get("prompt_id")
        if not isinstance(job_id, str | None):
            raise _refused(400, "prompt_id is a text")
        self.jobs.interrupt(job_id)
        return web.json_response({})

    async def post_free(self, request: web.Request) -> web.Response:
        body = await self._json(request, may_be_empty=True)
        if body.get("unload_models") or body.get("free_memory"):
            self.jobs.free()
        return web.json_response({})

    async def _json(self, request: web.Request, *, may_be_empty: bool = False) -> Mapping[str, Any]:
        """The request's body, a table; anything else is refused."""
        text = await _text(request)
        body = {} if may_be_empty and not text.strip() else await _parsed(text)
        if not isinstance(body, Mapping):
            raise _refused(400, "the request is no table in JSON")
        return body

    # --- files ---

    async def get_view(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        name, kind = without_mark(query.get("filename", ""), query.get("type", "output"))
        path = self._shown(kind, query.get("subfolder", ""), name)
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
        is_harmless = content_type.partition("/")[0] in _HARMLESS and content_type not in _ACTIVE
        if "preview" in query and content_type.startswith("image/") and is_harmless:
            small = await asyncio.to_thread(_small_picture, path, query["preview"])
            if small is not None:
                return web.Response(body=small[0], content_type=small[1], headers=headers)
        way = "inline" if is_harmless else "attachment"
        plain_name = re.sub(r'[^ -~]|["\\]', "_", path.name)
        headers["Content-Disposition"] = f'{way}; filename="{plain_name}"'
        headers["Content-Type"] = content_type if is_harmless else "application/octet-stream"
        return web.FileResponse(path, headers=headers)

    def _shown(self, kind: str, subfolder: str, name: str) -> Path:
        """A file of a folder of this server, or, as the loaders find it, an example that the shipped workflows read."""
        try:
            return self.places.find(kind, subfolder, name)
        except FileError:
            example = hosts.find_example(name) if kind == "input" and not subfolder else None
            if example is None:
                raise
            return example

    async def post_upload(self, request: web.Request) -> web.Response:
        async with uploads.received(request, self.places) as form:
            return web.json_response(await uploads.keep(form, self.places))

    async def get_templates(self, request: web.Request) -> web.Response:
        names = (path.stem for path in (ROOT / "workflows").glob("*.json"))
        return web.json_response({PACK: sorted(names, key=lambda name: (not runs_as_installed(name), name))})

    async def get_template(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        known = {
            path.name: path for path in (ROOT / "workflows").iterdir() if path.suffix in (".json", ".jpg", ".webp")
        }
        if request.match_info["pack"] != PACK or name not in known:
            raise _refused(404, "there is no such workflow", "not_found")
        return web.FileResponse(known[name])

    # --- what a user keeps ---

    def _user_file(self, name: str) -> Path:
        return self.places.place("user", f"default/{name}")

    @property
    def _settings_file(self) -> Path:
        return self._user_file("comfy.settings.json")

    def _read_settings(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._settings_file.read_text("utf-8"))
        except (OSError, ValueError):  # none yet, or damaged by hand: the defaults
            return {}
        return kept if isinstance(kept, dict) else {}

    def _keep_settings(self, changes: Mapping[str, Any]) -> None:
        kept = self._read_settings() | {name: value for name, value in changes.items() if name not in _NEVER_KEPT}
        _write(self._settings_file, json.dumps(messages.finite(kept), indent=1).encode())

    async def get_settings(self, request: web.Request) -> web.Response:
        return web.json_response(self._read_settings())

    async def get_setting(self, request: web.Request) -> web.Response:
        return web.json_response(self._read_settings().get(request.match_info["name"]))

    async def post_settings(self, request: web.Request) -> web.Response:
        self._keep_settings(await self._json(request))
        return web.json_response({})

    async def post_setting(self, request: web.Request) -> web.Response:
        self._keep_settings({request.match_info["name"]: await _parsed(await _text(request))})
        return web.json_response({})

    async def list_userdata(self, request: web.Request) -> web.Response:
        query = request.query
        folder = self._user_file(query.get("dir", "")) if query.get("dir") else self.places.place("user", "default")
        if not folder.is_dir():
            return web.json_response([])
        is_deep = query.get("recurse", "").lower() == "true"
        files = sorted(path for path in (folder.rglob("*") if is_deep else folder.iterdir()) if path.is_file())
        if query.get("full_info", "").lower() == "true":
            return web.json_response([_about(path, folder) for path in files])
        names = [path.relative_to(folder).as_posix() for path in files]
        is_split = query.get("split", "").lower() == "true"
        return web.json_response([[name, *name.split("/")] for name in names] if is_split else names)

    async def get_userdata(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        path = self._user_file(name)
        if not path.is_file():
            if name in _ASKED_AT_START:
                return web.json_response(_ASKED_AT_START[name])
            raise _refused(404, "there is no such file", "not_found")
        headers = {"X-Content-Type-Options": "nosniff", "Content-Type": "application/octet-stream"}
        return web.FileResponse(path, headers=headers)

    async def post_userdata(self, request: web.Request) -> web.Response:
        path = self._user_file(request.match_info["name"])
        if path.exists() and request.query.get("overwrite", "true").lower() == "false":
            raise _refused(409, "there is a file of this name already", "exists")
        try:
            content = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise _refused(413, f"the file is larger than {MAX_JSON_BYTES // 2**20} MB", "too_large") from error
        _write(path, content)
        is_full = request.query.get("full_info", "").lower() == "true"
        return web.json_response(self._told(path) if is_full else self._told(path)["path"])

    async def delete_userdata(self, request: web.Request) -> web.Response:
        path = self._user_file(request.match_info["name"])
        if not path.is_file():
            raise _refused(404, "there is no such file", "not_found")
        with _telling(path):
            path.unlink()
        return web.Response(status=204)

    async def move_userdata(self, request: web.Request) -> web.Response:
        path, target = (self._user_file(request.match_info[part]) for part in ("name", "target"))
        if not path.is_file():
            raise _refused(404, "there is no such file", "not_found")
        if target.exists() and request.query.get("overwrite", "").lower() != "true":
            raise _refused(409, "there is a file of this name already", "exists")
        _make_parent(target)
        with _telling(target):
            path.replace(target)
        return web.json_response(self._told(target))

    def _told(self, path: Path) -> dict[str, Any]:
        return _about(path, self.places.place("user", "default"))

    # --- the WebSocket ---

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        if len(self.clients) >= MAX_CLIENTS:
            raise _refused(429, f"{MAX_CLIENTS} clients are listening already", "too_many_clients")
        socket = web.WebSocketResponse(heartbeat=30, max_msg_size=2**20)
        await socket.prepare(request)
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        client = Client(socket, request.transport)
        before, self.clients[client_id] = self.clients.get(client_id), client
        status = {"exec_info": {"queue_remaining": self.jobs.remaining()}}
        client.push(Event("status", {"status": status, "sid": client_id}))
        writer = asyncio.create_task(client.write_out())
        if before is not None:
            await before.socket.close()
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self._heard(client, message.data)
        finally:
            writer.cancel()
            if self.clients.get(client_id) is client:
                del self.clients[client_id]
        return socket

    def _heard(self, client: Client, text: str) -> None:
        with contextlib.suppress(_Refused):  # a client that talks nonsense gets no answer
            said = _parse(text)
            if isinstance(said, Mapping) and said.get("type") == "feature_flags":
                client.push(Event("feature_flags", messages.FEATURES))


# --- pieces of answers ------------------------------------------------------------------------------------------------


def _entry(job: Job) -> list[Any]:
    return [job.number, job.id, job.prompt, job.extra_data, job.outputs]


def _record(job: Job) -> dict[str, Any]:
    status = {
        "status_str": "success" if job.status == "completed" else "error",
        "completed": job.status == "completed",
        "messages": [[event, data] for event, data in job.events],
    }
    meta = {node_id: {"node_id": node_id, "display_node": node_id, "real_node_id": node_id} for node_id in job.shown}
    return {"prompt": _entry(job), "outputs": job.shown, "status": status, "meta": meta}


def _summary(job: Job) -> dict[str, Any]:
    files = [
        (node_id, kind, item)
        for node_id, shown in list(job.shown.items())  # a running job goes on meanwhile
        for kind, items in shown.items()
        if isinstance(items, Sequence)
        for item in items
        if isinstance(item, Mapping) and "filename" in item
    ]
    preview = None
    if files:
        node_id, _, item = files[0]
        family = (mimetypes.guess_type(str(item["filename"]))[0] or "").partition("/")[0]
        preview = {**item, "nodeId": node_id, "mediaType": {"video": "video", "audio": "audio"}.get(family, "images")}
    workflow = (job.extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
    told = {
        "id": job.id,
        "status": job.status,
        "create_time": job.created_ms,
        "execution_start_time": job.started_ms,
        "execution_end_time": job.ended_ms,
        "priority": job.number,
        "outputs_count": len(files),
        "previewable_outputs_count": len(files),
        "preview_output": preview,
        "execution_error": job.error,
        "workflow_id": workflow.get("id") if isinstance(workflow, Mapping) else None,
    }
    return {name: value for name, value in told.items() if value is not None or name in ("preview_output",)}


def _ids(body: Mapping[str, Any], name: str) -> set[str]:
    ids = body.get(name) or []
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise _refused(400, f"{name} is a list of ids")
    return set(ids)


def _whole(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    return min(int(text), 10**9) if text.isascii() and text.isdigit() and len(text) < 12 else default


async def _told(body: Callable[[], Any]) -> web.Response:
    """An answer of any size, made beside the event loop."""
    text = await asyncio.to_thread(lambda: json.dumps(messages.finite(body())))
    return web.json_response(text=text)


async def _text(request: web.Request) -> str:
    try:
        return await request.text()
    except web.HTTPRequestEntityTooLarge as error:
        raise _refused(413, f"the request is larger than {MAX_JSON_BYTES // 2**20} MB", "too_large") from error
    except (UnicodeDecodeError, LookupError) as error:
        raise _refused(400, "the request is no UTF-8 text") from error


async def _parsed(text: str) -> Any:
    return _parse(text) if len(text) < _LARGE_JSON_CHARS else await asyncio.to_thread(_parse, text)


def _parse(text: str) -> Any:
    """JSON that is not nested without end."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise _refused(400, f"the request is no JSON ({error})", "invalid_json") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for one in level for child in _inner(one)]
        if not level:
            return value
    raise _too_deep()


def _inner(value: Any) -> Iterable[Any]:
    """The lists and tables directly in a list or table."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (one for one in inner if isinstance(one, dict | list))


def _too_deep() -> _Refused:
    return _refused(400, f"the request is nested more than {MAX_DEPTH} deep")


def _known_id() -> _Refused:
    return _refused(409, "there is a prompt with this prompt_id already", "invalid_prompt_id")


def _place_of(path: Path, folders: Sequence[str]) -> int:
    return next((number for number, folder in enumerate(folders) if path.is_relative_to(folder)), 0)


def _kind_of(request: web.Request) -> str:
    """Our word for the folder of models in the address."""
    folder = request.match_info["folder"]
    kind = next((kind for kind, name in FOLDERS.items() if name == folder), None)
    if kind is None:
        raise _refused(404, "there is no such folder of models", "not_found")
    return kind


def _host_name(netloc: str) -> str:
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def _about(path: Path, folder: Path) -> dict[str, Any]:
    stat = path.stat()
    times = {"modified": int(stat.st_mtime * 1000), "created": int(stat.st_ctime * 1000)}
    return {"path": path.relative_to(folder).as_posix(), "size": stat.st_size, **times}


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """What the file system refuses, as an error of ours."""
    try:
        yield
    except OSError as error:
        raise FileError(f"This cannot be written ({error.strerror})", given=path.name) from error


def _make_parent(path: Path) -> None:
    with _telling(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Under a name of its own first, so that a crash leaves the old file."""
    _make_parent(path)
    fresh = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with _telling(path):
            fresh.write_bytes(content)
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _small_picture(path: Path, wanted: str) -> tuple[bytes, str] | None:
    """A picture in another format, as the frontend asks with ``webp;90``; None where it cannot be read."""
    kind, _, quality = wanted.partition(";")
    kind = "jpeg" if kind in ("jpg", "jpeg") else "webp"
    number = min(100, max(1, int(quality))) if quality.isascii() and quality.isdigit() and len(quality) < 4 else 90
    out = io.BytesIO()
    try:
        with open_image(path) as picture:
            picture.convert("RGB" if kind == "jpeg" else "RGBA").save(out, kind, quality=number)
    except FileError:
        return None
    return out.getvalue(), f"image/{kind}"


def _scripts(folder: Path, address: str) -> list[str]:
    return [f"{address}/{path.relative_to(folder).as_posix()}" for path in sorted(folder.rglob("*.js"))]


def _translations() -> dict[str, Any]:
    """language -> {"nodeDefs": ..., "main": ...} of the pack's locales folder."""
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "locales").glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text("utf-8"))
    return found


class _LogLines(logging.Handler):
    """The last lines of the log, for the frontend's panel."""

    def __init__(self, tell: Callable[[Mapping[str, str]], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell
        self.entries: collections.deque[dict[str, str]] = collections.deque(maxlen=500)

    def emit(self, record: logging.LogRecord) -> None:
        time_text = logging.Formatter().formatTime(record)
        entry = {"t": time_text, "m": f"{record.getMessage()}\n"}
        self.entries.append(entry)
        self._tell(entry)


def system_stats(host: ServerHost) -> dict[str, Any]:
    """ComfyUI's description of the machine."""
    import torch

    from ...vidgen_core.memory.host import available_memory, total_memory

    device = host.device()
    free = total = available_memory()
    total = total_memory()
    name = platform.processor() or "cpu"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    numbers = {"vram_total": total, "vram_free": free, "torch_vram_total": total, "torch_vram_free": free}
    return {
        "system": {
            "os": sys.platform,
            "ram_total": total_memory(),
            "ram_free": available_memory(),
            "comfyui_version": "0.3.64",
            "required_frontend_version": None,
            "installed_templates_version": None,
            "required_templates_version": None,
            "python_version": sys.version,
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            # The frontend asks no other host when it reads this.
            "argv": ["--disable-api-nodes"],
        },
        "devices": [{"name": name, "type": device.type, "index": device.index, **numbers}],
    }


def frontend_folder() -> Path:
    """The page of ``comfyui-frontend-package``.

    Raises:
        MissingLibraryError: it is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("comfyui_frontend_package")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "static"
    if folder is None or not (folder / "index.html").is_file():
        raise MissingLibraryError(
            "The page of the server is not installed",
            expected="the package comfyui-frontend-package",
            do='pip install "comfyui-vidgen[serve]", or use --api-only',
        )
    return folder


def _needs_token(address: str) -> UserError:
    return UserError(
        "Others could use this machine through the server",
        given=f"--listen {address}",
        expected="a secret that each request must bring",
        do="add --token with a long random text, or leave --listen out",
    )
