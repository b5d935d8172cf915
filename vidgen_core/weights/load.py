"""Weights into modules: build without memory, map the file, translate names, assign. Nothing is copied twice."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .header import Header

Translate = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def load_module(
    header: Header,
    build: Callable[[], nn.Module],
    *,
    translate: Translate | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build a module and give it the file's weights; ready for inference (``eval``, no gradients).

    On the CPU without a cast the weights stay mapped to the file: loading costs no memory until they are read.

    Args:
        build: makes the module; runs under the meta device, so its size does not matter.
        translate: foreign names -> native names (a ``KeyMap``'s ``to_native``).
        dtype: floating weights are cast to it on the way in; None keeps what the file has.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape. The message names it.
    """
    with torch.device("meta"):
        module = build()
    tensors = read_tensors(header, device=device)
    if translate is not None:
        tensors = dict(translate(tensors))
    check_names(module, tensors, where=str(header.path))
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"{type(module).__name__} keeps {left} out of its state dict: compute them in forward"
    return module.eval().requires_grad_(False)


def read_tensors(header: Header, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor of the file; on the CPU they are views of the mapped file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(header.path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The checkpoint cannot be read ({error})", given=header.path, do="download or export it again"
        ) from error


def check_names(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Every weight of the module is there with its shape, and nothing else is.

    Raises:
        CheckpointError: naming the first few that are not, and the nearest name for an unknown one.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - wanted.keys())
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
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"The weight {name!r} has another shape than the configuration says",
                given=f"{tuple(tensors[name].shape)} in {where}",
                expected=str(tuple(tensor.shape)),
            )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
