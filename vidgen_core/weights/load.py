"""Weights into modules: build without memory, map the file, translate names, assign. Nothing is copied twice."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..memory.cancel import check_cancelled
from ..memory.oom import is_out_of_memory
from ..memory.place import Storage, prepare_storage, resident_blocks, too_small
from ..memory.stream import BlockStream, DeviceFeed, Feed, FileFeed, flat_bytes
from .empty import built_empty
from .files import MappedFile, PlainFile
from .layout import Layout
from .packing import PACKINGS, unpack
from .quantise import fit, module_of, quantise_linears
from .records import FLOAT8, Header, Place, packed_name, scale_name

log = logging.getLogger("vidgen")

_PROBE_BYTES = 4096
"""at the start, the middle and the end of a weight, which are looked at for NaN"""


def load_module(
    header: Header,
    build: Callable[[], nn.Module],
    *,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_quantised: bool = True,
    stream: Sequence[str] = (),
    storage: Storage | None = None,
    stored: Sequence[str] = (),
    room: int | None = None,
) -> nn.Module:
    """Build a module and give it the file's weights; ready for inference (``eval``, no gradients).

    On the CPU without a cast the weights stay mapped to the file: loading costs no memory until they are read.

    Args:
        build: makes the module; runs under the meta device, so its size does not matter.
        layout: the file's naming; None for native names.
        dtype: floating weights are cast to it on the way in; None keeps what the file has.
        keep_quantised: float8 and packed weights of linear layers stay as small as they are, in layers of
            ``weights.quantise`` that widen them on use; else they are widened to ``dtype`` now.
        stream: paths of module lists whose blocks are brought each time they run, in this order: from the file, or
            for a device with memory of its own from pinned main memory, if that has room.
        storage: how the linear weights below ``stored`` are held, whatever the file has; they are converted one by one
            on the way in, so the peak is little more than what is stored. None holds them as the file does.
        stored: paths of modules.
        room: bytes that the module may take on the device, streaming included. As many blocks of ``stream`` as fit
            stay there; None streams them all.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape or not finite. The message names it.
        SettingsError: ``room`` is too small even with every block streamed.
    """
    module = built_empty(build)
    check_scales(header)
    places = _stored_places(header)
    in_file = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in places.items()}
    native = in_file if layout is None else layout.to_native(in_file)
    if storage is not None:
        prepare_storage(module, storage, stored, dtype or _dense_dtype(native.values()))
    elif keep_quantised:
        quantise_linears(module, native, dtype=dtype or torch.bfloat16)
    wanted = module.state_dict()
    fitted = fit(native, wanted, dtype, storage)
    check_names(wanted, fitted, where=str(header.path))

    sources = _Sources(header, layout, wanted, dtype, torch.device(device), storage)
    blocks = [f"{path}.{name}" for path in stream for name, _ in module.get_submodule(path).named_children()]
    num_bytes = {name: tensor.nbytes for name, tensor in fitted.items()}
    if room is not None:
        blocks = sources.streamed(blocks, num_bytes, room)
    check_numbers(header)
    state = dict(wanted)
    for group in sources.resident(blocks):
        check_cancelled()
        state.update(sources.state(group, sources.read(group, cast=True)))
    module.load_state_dict(state, strict=True, assign=True)
    if blocks:
        sources.stream(module, blocks, num_bytes)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    left = [name for name in left if not name.startswith(tuple(f"{block}." for block in blocks))]
    assert not left, f"{type(module).__name__} keeps {left} out of its state dict: compute them in forward"
    return module.eval().requires_grad_(False)


class _Sources:
    """Which tensors of the file make up which modules, and how they get there."""

    def __init__(
        self,
        header: Header,
        layout: Layout | None,
        wanted: Collection[str],
        dtype: torch.dtype | None,
        device: torch.device,
        storage: Storage | None,
    ) -> None:
        self.header, self.layout, self.wanted, self.dtype, self.device = header, layout, wanted, dtype, device
        self.storage = storage
        self.places = _stored_places(header)
        self.mappings: dict[Path, MappedFile] = {}
        self.native = dict(zip(self.places, self.places, strict=True))
        if layout is not None:
            self.native = layout.native_names(self.places)

    def resident(self, streamed: Sequence[str]) -> list[list[str]]:
        """Stored names, grouped by the module they belong to: what is put together is in memory for that time only."""
        outside = tuple(f"{block}." for block in streamed)
        return self._by_module(name for name, native in self.native.items() if not native.startswith(outside))

    def _by_module(self, names: Iterable[str]) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(module_of(self.native[name]), []).append(name)
        return list(groups.values())

    def read(self, names: Collection[str], *, cast: bool = False) -> dict[str, Tensor]:
        """Mapped where the file's bytes become the weights as they are; else read, so that the copy is the only one.

        Args:
            cast: to the dtype already, where nothing else is made of them.
        """
        targets = [self.native[name] for name in names]
        as_they_are = self.device.type == "cpu" and len(set(targets)) == len(targets)
        mapped = as_they_are and not any(map(self._is_cast, names))
        dtype = self.dtype if cast and as_they_are and self.storage is None else None
        return read_tensors(self.header, names, mapped=mapped, mappings=self.mappings, dtype=dtype)

    def _is_cast(self, name: str) -> bool:
        dtype = self.places[name].dtype
        if self.storage is not None and f"{module_of(self.native[name])}.stored" in self.wanted:
            return True
        return _changes(dtype, self.dtype)

    def state(
        self, names: Collection[str], tensors: Mapping[str, Tensor], device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """What was read -> native names and the dtype, on the device or another one."""
        tensors = {name: tensor.to(device or self.device) for name, tensor in tensors.items()}
        native = tensors if self.layout is None else self.layout.to_native(tensors)
        return fit(native, self.wanted, self.dtype, self.storage)

    def streamed(self, paths: Sequence[str], num_bytes: Mapping[str, int], room: int) -> list[str]:
        """The blocks of ``paths`` that find no room beside the others; SettingsError if even that is not enough.

        Args:
            num_bytes: of each weight as it will be held.
        """
        blocks = _sizes(paths, num_bytes)
        sizes = [sum(own) for own in blocks]
        outside = sum(num_bytes.values()) - sum(sizes)
        if outside + sum(sizes) <= room:
            return []
        if not paths:
            raise too_small(outside, room)
        staging = [self._staging(size, names) for size, names in zip(sizes, self._names_of(paths), strict=True)]
        kept = resident_blocks(sizes, staging, room - outside)
        log.info("%d of %d blocks stay in memory, the others are brought as they run.", len(kept), len(paths))
        return [path for number, path in enumerate(paths) if number not in kept]

    def _staging(self, num_bytes: int, names: Sequence[str]) -> int:
        """Bytes on the device while one block of ``num_bytes``, which has these names in the file, runs and the next
        one comes."""
        if self.device.type != "cpu":
            return 2 * num_bytes
        modules = [sum(self.places[name].num_bytes for name in group) for group in self._by_module(names)]
        # What was read of a module, and the same with its parts joined, beside what is made of it.
        passing = (1 if self.layout is None else 2) * max(modules, default=0)
        if self.storage is not None:
            return 2 * num_bytes + sum(modules) + passing
        return num_bytes + sum(modules) + passing

    def _names_of(self, paths: Sequence[str]) -> list[list[str]]:
        """Stored names of each block."""
        names: list[list[str]] = [[] for _ in paths]
        for number, name in zip(_numbers(paths, self.native.values()), self.native, strict=True):
            if number is not None:
                names[number].append(name)
        return names

    def stream(self, module: nn.Module, paths: Sequence[str], num_bytes: Mapping[str, int]) -> None:
        """Hand the blocks at ``paths`` over to a :class:`BlockStream`."""
        names = self._names_of(paths)
        groups = [self._by_module(own) for own in names]
        main = torch.device("cpu")

        def read(number: int) -> dict[str, Tensor]:
            return read_tensors(self.header, names[number], mapped=False)

        def finish(number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            state: dict[str, Tensor] = {}
            for group in groups[number]:  # what was read goes as soon as something was made of it
                state |= self.state(group, {name: tensors.pop(name) for name in group}, main)
            start = len(paths[number]) + 1
            return {name[start:]: tensor for name, tensor in state.items()}

        def whole(number: int) -> dict[str, Tensor]:
            return finish(number, read(number))

        feed: Feed
        if self.device.type != "cpu":
            feed = DeviceFeed(whole, [flat_bytes(sizes) for sizes in _sizes(paths, num_bytes)], self.device)
        elif self.storage is not None:  # making it takes long: the thread does it while another block runs
            feed = FileFeed(whole)
        else:  # what was read is smaller than what it is widened to, which is done when it is needed
            feed = FileFeed(read, finish)
        blocks = BlockStream([module.get_submodule(path) for path in paths], feed)
        # "llama.layers.0" is run by "llama": the path without the list and the number.
        runners = dict.fromkeys(".".join(path.split(".")[:-2]) for path in paths)
        blocks.end_with(module.get_submodule(path) for path in runners)


def _numbers(paths: Sequence[str], names: Iterable[str]) -> Iterator[int | None]:
    """For each native name the number of the path that it lies below."""
    numbers = {path: number for number, path in enumerate(paths)}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        yield next((numbers[prefix] for prefix in prefixes if prefix in numbers), None)


def _sizes(paths: Sequence[str], num_bytes: Mapping[str, int]) -> list[list[int]]:
    """For each block the bytes of its weights."""
    sizes: list[list[int]] = [[] for _ in paths]
    for number, size in zip(_numbers(paths, num_bytes), num_bytes.values(), strict=True):
        if number is not None:
            sizes[number].append(size)
    return sizes


def _dense_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Of what is computed where nothing was said: the file's, where it has one."""
    found = {tensor.dtype for tensor in tensors if tensor.ndim > 1 and tensor.is_floating_point()} - FLOAT8
    return found.pop() if len(found) == 1 else torch.bfloat16


# --- reading ----------------------------------------------------------------------------------------------------------


def _stored_places(header: Header) -> dict[str, Place]:
    """Stored name -> place; a scale counts as one number for each row of its weight."""
    places = {}
    for name, info in header.tensors.items():
        places[name if info.packing is None else packed_name(name, info.packing)] = header.places[name]
        if name in header.scales:
            places[scale_name(name)] = header.scales[name]._replace(shape=info.shape[:1])
    return places


def read_tensors(
    header: Header,
    names: Collection[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    mapped: bool = True,
    mappings: dict[Path, MappedFile] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Tensors of a checkpoint under their stored names, whatever kind of file it is.

    A weight that is packed in blocks comes as bytes (``a.packed.Q4_K``), a float8 one with its scale, if it has one,
    as one number for each row (``a.scale_weight``).

    Args:
        names: stored names; None reads all.
        mapped: views of the mapped files, read when they are used; else copies.
        mappings: of the files, to be shared by several calls; those that are missing are added.
        dtype: floating tensors that are read, not mapped, and neither float8 nor strided are cast to it on the way.

    Raises:
        CheckpointError: a file is gone or has changed since its header was read.
    """
    places = _stored_places(header)
    places = places if names is None else {name: places[name] for name in names}
    mappings = {} if mappings is None else mappings
    scales = {scale_name(weight): place for weight, place in header.scales.items()}
    files: dict[Path, MappedFile | PlainFile] = {}
    tensors = {}
    try:
        for path in dict.fromkeys(place.file for place in places.values()):
            if mapped and path not in mappings:
                mappings[path] = MappedFile(path)
            files[path] = mappings[path] if mapped else PlainFile(path)
        for name, place in places.items():
            stored, file = scales.get(name, place), files[place.file]
            is_plain = name not in scales and place.stride is None
            if isinstance(file, PlainFile) and dtype is not None and is_plain and _changes(place.dtype, dtype):
                flat = file.read_as(place.offset, place.num_bytes, place.dtype, dtype)
                tensors[name] = flat.view(place.shape).to(device)
                continue
            tensor = _shaped(file.read(stored.offset, stored.num_bytes), stored)
            if name in scales:
                tensor = tensor.float().flatten().expand(place.shape).clone()
            tensors[name] = tensor.to(device)
    except (OSError, RuntimeError, EOFError) as error:
        if is_out_of_memory(error):
            raise  # nothing is wrong with the file
        raise CheckpointError(
            f"The checkpoint cannot be read ({error})", given=header.path, do="download or export it again"
        ) from error
    finally:
        for file in files.values():
            file.close()
    return tensors


def _changes(stored: torch.dtype, dtype: torch.dtype | None) -> bool:
    """Whether a cast makes other numbers of these; float8 is widened elsewhere, with its scale."""
    return dtype is not None and stored.is_floating_point and stored not in (dtype, *FLOAT8)


def _shaped(data: Tensor, place: Place) -> Tensor:
    if data.data_ptr() % place.dtype.itemsize:
        data = data.clone()  # safetensors does not align numbers behind float8 weights of odd size
    if place.stride is None:
        return data.view(place.dtype).view(place.shape)
    return data.view(place.dtype).as_strided(place.shape, place.stride)


# --- checking ---------------------------------------------------------------------------------------------------------


def check_scales(header: Header) -> None:
    """Tencent's float8 files cannot be used without the file of their scales.

    Raises:
        CheckpointError: naming the file that is expected.
    """
    if header.scale_file is not None and not header.scales:
        raise CheckpointError(
            "The float8 weights of this checkpoint cannot be used without their scales",
            given=header.path,
            expected=f"the scales in {header.scale_file}",
            do="put the map file that was published with the checkpoint beside it",
        )


def check_numbers(header: Header) -> None:
    """Look at samples of every weight: all of a small one, three stretches of a large one.

    Raises:
        CheckpointError: a number is NaN or infinite.
    """
    # Read, not mapped: one look at a mapped file may bring megabytes around it into memory.
    with contextlib.ExitStack() as stack:
        files = {
            path: stack.enter_context(PlainFile(path)) for path in {place.file for place in header.places.values()}
        }
        for name, info in header.tensors.items():
            check_cancelled()
            if info.packing is None and not info.dtype.is_floating_point:
                continue
            place = header.places[name]
            unit = place.dtype.itemsize if info.packing is None else PACKINGS[info.packing].num_block_bytes
            stretches = [
                files[place.file].read(place.offset + start, length) for start, length in _probes(place.num_bytes, unit)
            ]
            if info.packing is None:
                samples = [stretch.view(place.dtype).float() for stretch in map(torch.clone, stretches)]
            else:
                samples = [unpack(stretch.view(1, -1), info.packing) for stretch in stretches]
            if not all(bool(sample.isfinite().all()) for sample in samples):
                raise _not_finite(header, name)
    scales = read_tensors(header, [scale_name(name) for name in header.scales])
    for name in header.scales:
        if not bool(scales[scale_name(name)].isfinite().all()):
            raise _not_finite(header, name)


def _probes(num_bytes: int, unit: int) -> list[tuple[int, int]]:
    """(start, length) in bytes of up to three stretches of whole units."""
    length = -(-_PROBE_BYTES // unit) * unit
    if num_bytes <= 16 * length:
        return [(0, num_bytes)]
    return [(0, length), (num_bytes // 2 // unit * unit, length), (num_bytes - length, length)]


def _not_finite(header: Header, name: str) -> CheckpointError:
    return CheckpointError(
        f"The weight {name!r} has numbers that are not finite",
        given=header.path,
        expected="finite numbers everywhere",
        do="the training or the conversion of this checkpoint failed, or the file is damaged: use another copy",
    )


def check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str) -> None:
    """Every weight of a module is there with its shape, and nothing else is.

    Raises:
        CheckpointError: naming the first few that are not, and the nearest name for an unknown one.
    """
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys())
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of {len(wanted)} weights",
            given=f"{where} without {_some(missing)}" + (f", but with the unknown {_some(unknown)}" if unknown else ""),
            do="use the complete file of this model",
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], wanted, n=1)
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} weights that this model does not know",
            given=f"{_some(unknown)} in {where}",
            expected=f"{near[0]} and its like" if near else None,
            do="use a file of this model only",
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise CheckpointError(
                f"The weight {name!r} has another shape than the configuration says",
                given=f"{tuple(given[name].shape)} in {where}",
                expected=str(tuple(tensor.shape)),
            )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
