"""A worker of a batch that is a running server: ComfyUI, or ``vidgen serve``, through the API that both have.

Files that a prompt names are sent first, if they lie in the input folder here: ``POST /upload/image`` takes any kind.
The prompt goes to ``POST /prompt``, its progress comes over the WebSocket, what became of it stands in ``/history``,
and its files come from ``/view``. The WebSocket is only for news: where it is cut, the history still knows.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from ..vidgen_core.errors import Cancelled, FileError, MissingLibraryError, SettingsError
from .batch import Job, JobFailed, WorkerLost
from .events import Tell
from .executor import Classes, Prompt, input_specs
from .graph import to_ui
from .stop import Stop

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession, ClientWebSocketResponse, FormData

ANSWER_S = 30.0
"""how long a server may take for a small answer"""
QUIET_S = 5.0
"""no news for so long: ask whether the prompt is still known"""
RETURN_S = 60.0
"""how long a lost server may take to come back"""
_LOOK_S = 0.5
_CHUNK = 2**18
_FULL = 429
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    url: str
    """such as ``http://127.0.0.1:8188``, without a slash at the end"""
    token: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


def parse_servers(text: str) -> list[Address]:
    """``"http://a:8188,b:8188/?token=secret"`` -> where the servers are.

    Raises:
        SettingsError: one of them is no address, or is given twice.
    """
    found = []
    for one in filter(None, map(str.strip, text.split(","))):
        try:
            parts = urlsplit(one if "://" in one else f"http://{one}")
            is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of the port
            is_good = False
        if not is_good:
            raise SettingsError("This is no address of a server", given=one, expected="such as http://127.0.0.1:8188")
        token = parse_qs(parts.query).get("token", [None])[0]
        found.append(Address(f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), token))
    urls = [address.url for address in found]
    if not found or len(set(urls)) < len(urls):
        what = "A server is given twice" if found else "There is no server"
        raise SettingsError(what, given=text, expected="addresses with commas between them")
    return found


def connect(
    addresses: Sequence[Address], stop: Stop, input_folder: Path | None = None
) -> tuple[list[ServerWorker], dict[str, type]]:
    """A worker for each server, all of which answer, and stand-ins for the node types of the first one.

    Args:
        input_folder: whose files are sent to the servers where prompts name them.

    Raises:
        MissingLibraryError: aiohttp is not installed.
        SettingsError: a server does not answer, wants a token, or is something else.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "Talking to servers needs a library", expected="aiohttp", do='pip install "comfyui-vidgen[serve]"'
        ) from error
    declared = [asyncio.run(_declared(address)) for address in addresses]
    classes = stand_ins(declared[0])
    return [ServerWorker(address, stop, classes, input_folder) for address in addresses], classes


async def _declared(address: Address) -> Mapping[str, Any]:
    import aiohttp

    try:
        async with _api(address) as api, api.get("/object_info") as answer:
            if answer.status in (401, 403):
                raise SettingsError(
                    "The server lets nobody in without its token",
                    given=address.url,
                    do="give the address that the server printed, with ?token=... at its end",
                )
            declared = await answer.json(content_type=None) if answer.status == 200 else None
    except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError, UnicodeDecodeError, JSONDecodeError) as error:
        raise SettingsError(
            f"The server does not answer ({_reason(error)})", given=address.url, do="start it, or leave it out"
        ) from error
    if not isinstance(declared, Mapping) or not all(isinstance(one, Mapping) for one in declared.values()):
        raise SettingsError(
            "This is no server of ComfyUI's kind", given=address.url, expected="an answer at /object_info"
        )
    return declared


@dataclass(frozen=True, slots=True)
class _Api:
    """A server's addresses."""

    session: ClientSession
    url: str

    def get(self, path: str, query: Mapping[str, str] | None = None) -> AbstractAsyncContextManager[ClientResponse]:
        return self.session.get(self.url + path, params=query)

    def post(self, path: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[ClientResponse]:
        return self.session.post(self.url + path, json=body)

    def head(self, path: str, query: Mapping[str, str]) -> AbstractAsyncContextManager[ClientResponse]:
        return self.session.head(self.url + path, params=query)

    def send(self, path: str, form: FormData) -> AbstractAsyncContextManager[ClientResponse]:
        return self.session.post(self.url + path, data=form)

    def listen(self, client_id: str) -> AbstractAsyncContextManager[ClientWebSocketResponse]:
        return self.session.ws_connect(f"{self.url}/ws?clientId={client_id}", heartbeat=ANSWER_S, max_msg_size=0)

    async def table(self, path: str) -> Mapping[str, Any]:
        async with self.get(path) as answer:
            if answer.status != 200:
                raise WorkerLost(f"it answers {answer.status} to {path}")
            return await _json(answer)

    async def queue(self) -> tuple[set[str], set[str]]:
        """The prompts that run, and those that wait."""
        queue = await self.table("/queue")
        running, pending = ({entry[1] for entry in queue.get(f"queue_{kind}", ())} for kind in ("running", "pending"))
        return running, pending


@asynccontextmanager
async def _api(address: Address) -> AsyncIterator[_Api]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, connect=ANSWER_S, sock_read=ANSWER_S)
    async with aiohttp.ClientSession(headers=address.headers, timeout=timeout) as session:
        yield _Api(session, address.url)


async def _json(answer: ClientResponse) -> Mapping[str, Any]:
    try:
        said = await answer.json(content_type=None)
    except (UnicodeDecodeError, JSONDecodeError) as error:
        raise WorkerLost(f"it answers {answer.status} with something that is no JSON") from error
    return said if isinstance(said, Mapping) else {}


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


# --- its nodes --------------------------------------------------------------------------------------------------------

_DYNAMIC = re.compile(r"COMFY_\w+_V3")
"""kinds whose inputs depend on each other; the server checks them"""
_UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")


def stand_ins(declared: Mapping[str, Any]) -> dict[str, type]:
    """Classes that declare what a server's nodes take and give, so that a prompt can be checked before it is sent."""
    return {name: _stand_in(name, about) for name, about in declared.items()}


def _stand_in(name: str, about: Mapping[str, Any]) -> type:
    groups: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for group, fields in (about.get("input") or {}).items():
        for field_name, spec in fields.items() if group in groups else ():
            kind, options = spec[0], dict(spec[1]) if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
            if isinstance(kind, str) and _DYNAMIC.fullmatch(kind):
                groups["optional"][field_name] = ("*", options)
            elif any(options.get(upload) for upload in _UPLOADS):
                # The list has what lies at the top of a folder; names of other folders are good, too.
                groups[group][field_name] = (
                    "COMBO",
                    {key: value for key, value in options.items() if key != "options"},
                )
            else:
                groups[group][field_name] = (kind, options)
    returns = [
        "*" if isinstance(kind, str) and _DYNAMIC.fullmatch(kind) else kind for kind in about.get("output") or ()
    ]
    body = {
        "INPUT_TYPES": classmethod(lambda cls: groups),
        "RETURN_TYPES": tuple(returns),
        "RETURN_NAMES": tuple(about.get("output_name") or returns),
        "OUTPUT_NODE": bool(about.get("output_node")),
        "FUNCTION": "",
    }
    return type(name, (), body)


# --- the worker -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ServerWorker:
    """Renders on a server, one prompt at a time."""

    address: Address
    stop: Stop
    classes: Classes
    """of the server"""
    input_folder: Path | None = None
    """whose files are sent where a prompt names them"""
    is_closed: bool = False

    @property
    def name(self) -> str:
        return self.address.url

    def render(self, job: Job, folder: Path, tell: Tell) -> list[Path]:
        import aiohttp

        try:
            return asyncio.run(self._render(job, folder, tell))
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            raise WorkerLost(_reason(error)) from error

    def ready(self) -> bool:
        end = time.monotonic() + RETURN_S
        while not self.is_closed and time.monotonic() < end:
            if asyncio.run(self._answers()):
                return True
            if self.stop.event.wait(1.0):
                break
        return False

    async def _answers(self) -> bool:
        import aiohttp

        try:
            async with _api(self.address) as api, api.get("/prompt") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError):
            return False

    def close(self) -> None:
        """The server was running before, and runs on."""
        self.is_closed = True

    async def _render(self, job: Job, folder: Path, tell: Tell) -> list[Path]:
        client_id = uuid.uuid4().hex
        async with _api(self.address) as api:
            async with api.listen(client_id) as socket:
                prompt = await self._unless_stopped(self._with_files(api, job.prompt))
                prompt_id = await self._send(api, prompt, client_id)
                news: asyncio.Queue[str] = asyncio.Queue()
                reader = asyncio.create_task(_read(socket, news))
                try:
                    record = await self._finished(api, news, prompt_id, tell)
                except Cancelled:
                    await _take_back(api, prompt_id)
                    raise
                finally:
                    reader.cancel()
            _check_success(record)
            return await _fetch(api, record, folder)

    async def _unless_stopped(self, work: Coroutine[Any, Any, Prompt]) -> Prompt:
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
                if self.stop.event.is_set():
                    raise Cancelled("stopped by the user")
            return task.result()
        finally:
            task.cancel()

    async def _with_files(self, api: _Api, prompt: Prompt) -> Prompt:
        """The prompt with the server's names for the files of the input folder, which the server has then."""
        sent = copy.deepcopy({node_id: dict(node) for node_id, node in prompt.items()})
        for node_id, name, path in named_files(prompt, self.classes, self.input_folder):
            sent[node_id]["inputs"][name] = await _sent(api, path)
        return sent

    async def _send(self, api: _Api, prompt: Prompt, client_id: str) -> str:
        extra = {"extra_pnginfo": {"workflow": to_ui(prompt, self.classes)}}
        async with api.post("/prompt", {"prompt": prompt, "client_id": client_id, "extra_data": extra}) as answer:
            if answer.status == _FULL or answer.status >= 500:
                raise WorkerLost(f"it answers {answer.status} to a prompt")
            said = await _json(answer)
        if answer.status != 200 or said.get("node_errors"):
            raise JobFailed(_refusal(said, prompt) or f"the server answers {answer.status}")
        return str(said.get("prompt_id"))

    async def _finished(self, api: _Api, news: asyncio.Queue[str], prompt_id: str, tell: Tell) -> Mapping[str, Any]:
        """What the history says of a prompt, as soon as it says anything."""
        heard = time.monotonic()
        while True:
            if self.stop.event.is_set():
                raise Cancelled("stopped by the user")
            is_over = False
            try:
                is_over = _heard(await asyncio.wait_for(news.get(), _LOOK_S), prompt_id, tell)
                heard = time.monotonic()
            except asyncio.TimeoutError:
                pass
            if is_over or time.monotonic() - heard > QUIET_S:
                heard = time.monotonic()
                # The queue first: a prompt that moves on in between is then seen in the history.
                is_queued = prompt_id in set().union(*await api.queue())
                record = (await api.table(f"/history/{quote(prompt_id)}")).get(prompt_id)
                if record is not None:
                    return record
                if not is_queued:
                    raise WorkerLost("it has forgotten the prompt")


# --- files that a prompt reads ----------------------------------------------------------------------------------------

UPLOADED = "vidgen"
"""the folder for them in a server's input folder"""
_DIGITS = 32
"""of a digest in a name"""


def named_files(prompt: Prompt, classes: Classes, folder: Path | None) -> Iterator[tuple[str, str, Path]]:
    """(node id, input, file) of each input that is for an uploaded file and names one in ``folder``.

    A name is relative to the folder, or a whole path that lies in it: a workflow of strangers sends nothing else away.
    """
    from ..nodes.host import INPUT_MARK, file_below

    if folder is None:
        return
    for node_id, node in prompt.items():
        for name, _, options, _ in input_specs(classes[node["class_type"]]):
            value = node.get("inputs", {}).get(name)
            if isinstance(value, str) and any(options.get(upload) for upload in _UPLOADS):
                path = file_below(folder, value.removesuffix(INPUT_MARK))
                if path is not None:
                    yield node_id, name, path


async def _sent(api: _Api, path: Path) -> str:
    """The server's name of a file that it has now. It is a digest: what is there already is not sent again."""
    import aiohttp

    try:
        digest, size = _digest(path)
        file = path.open("rb")
    except OSError as error:
        raise JobFailed(f"{path} cannot be read ({error.strerror})") from error
    name = digest[:_DIGITS] + (path.suffix.lower() if _SUFFIX.fullmatch(path.suffix) else "")
    with file:
        if await _has(api, name, size):
            return f"{UPLOADED}/{name}"
        form = aiohttp.FormData({"type": "input", "subfolder": UPLOADED})
        form.add_field("image", file, filename=name, content_type="application/octet-stream")
        async with api.send("/upload/image", form) as answer:
            if answer.status == _FULL or answer.status >= 500:
                raise WorkerLost(f"it answers {answer.status} to a file")
            said = await _json(answer)
            if answer.status != 200:
                raise JobFailed(f"the server does not take {path.name}: {_refusal(said, {}) or answer.status}")
    return f"{said['subfolder']}/{said['name']}" if said.get("subfolder") else str(said.get("name", name))


def _digest(path: Path) -> tuple[str, int]:
    """(SHA-256, bytes) of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


async def _has(api: _Api, name: str, size: int) -> bool:
    query = {"filename": name, "subfolder": UPLOADED, "type": "input"}
    async with api.head("/view", query) as answer:
        return answer.status == 200 and answer.headers.get("Content-Length") == str(size)


# --- what it says -----------------------------------------------------------------------------------------------------


async def _read(socket: ClientWebSocketResponse, news: asyncio.Queue[str]) -> None:
    """Hand on what is text; the rest is previews. Ends when the socket is closed."""
    async for message in socket:
        if isinstance(message.data, str):
            news.put_nowait(message.data)


def _heard(text: str, prompt_id: str, tell: Tell) -> bool:
    """Hand a message on, if it is about this prompt; whether the prompt is over."""
    try:
        message = json.loads(text)
        kind, data = message["type"], message["data"]
        if data.get("prompt_id") != prompt_id:
            return False
    except (ValueError, KeyError, TypeError, AttributeError):  # nothing of ComfyUI's
        return False
    node = data.get("node")
    if kind == "executing" and node is not None:
        tell("node", {"node": node})
    elif kind == "progress":
        tell("progress", {"what": f"node {node}", "done": data.get("value"), "total": data.get("max")})
    return kind == "executing" and node is None


async def _take_back(api: _Api, prompt_id: str) -> None:
    """The server need not go on with what nobody waits for."""
    running, _ = await api.queue()
    async with api.post("/queue", {"delete": [prompt_id]}):
        pass
    if prompt_id in running:
        async with api.post("/interrupt", {"prompt_id": prompt_id}):
            pass


def _refusal(said: Mapping[str, Any], prompt: Prompt) -> str:
    """What ComfyUI's answer 400 says, as one sentence for each finding."""
    error = said.get("error")
    lines = [str(error.get("message") if isinstance(error, Mapping) else error or "")]
    for node_id, about in (said.get("node_errors") or {}).items():
        where = f"node {node_id} ({prompt.get(node_id, {}).get('class_type')})"
        lines += [f"{where}: {one.get('message')} ({one.get('details')})" for one in about.get("errors", ())]
    return "; ".join(filter(None, lines))


def _check_success(record: Mapping[str, Any]) -> None:
    status = record.get("status") or {}
    if status.get("completed", True) and status.get("status_str") != "error":
        return
    said = dict(status.get("messages", ()))
    if error := said.get("execution_error"):
        where = f"Node {error.get('node_id')} ({error.get('node_type')})"
        raise JobFailed(f"{where}: {error.get('exception_message')}")
    raise JobFailed(
        "it was stopped on the server" if "execution_interrupted" in said else "the server could not run it"
    )


def _outputs(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The files that a prompt saved, not what it only showed."""
    for shown in (record.get("outputs") or {}).values():
        for items in shown.values() if isinstance(shown, Mapping) else ():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, Mapping) and item.get("filename") and item.get("type") == "output":
                    yield item


async def _fetch(api: _Api, record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Bring the files here, whole or not at all."""
    files = []
    for number, item in enumerate(_outputs(record), start=1):
        # The name is the server's: of it, only a plain ending is taken.
        suffix = Path(str(item["filename"])).suffix
        path = folder / f"{number:05d}{suffix if _SUFFIX.fullmatch(suffix) else '.bin'}"
        query = {name: str(item.get(name) or "") for name in ("filename", "subfolder", "type")}
        async with api.get("/view", query) as answer:
            if answer.status != 200:
                raise JobFailed(f"the server answers {answer.status} for the file {item['filename']}")
            async for chunk in answer.content.iter_chunked(_CHUNK):
                _append(path, chunk)
        files.append(path)
    return files


def _append(path: Path, chunk: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(chunk)
    except OSError as error:
        raise FileError(f"The file cannot be written ({error.strerror})", given=path) from error
