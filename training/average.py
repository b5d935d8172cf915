"""The mean of several checkpoints of one network ("model soup", Wortsman et al. 2022): often better than each of them.

python -m vidgen.training.average before/network.safetensors after/network.safetensors -o network.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..vidgen_core.errors import CheckpointError, UserError
from ..vidgen_core.weights.header import Header, read_header
from ..vidgen_core.weights.load import read_tensors
from ..vidgen_core.weights.save import save_tensors


def average(paths: Sequence[str | Path], out: str | Path) -> None:
    """Write the mean of all tensors, computed in float64, in the dtypes and with the metadata of the last file.

    Raises:
        CheckpointError: fewer than two files, or they are not of one architecture.
        FileError: one cannot be read, or ``out`` cannot be written.
    """
    headers = [read_header(path) for path in paths]
    if len(headers) < 2:
        raise CheckpointError("There is nothing to average", given=f"{len(headers)} file", expected="two or more")
    last = headers[-1]
    for header in headers[:-1]:
        _check_alike(header, last)
    states = [read_tensors(header, list(header.tensors)) for header in headers]
    mean = {name: _mean([state[name] for state in states]) for name in last.tensors}
    save_tensors(out, mean, last.metadata)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    last = tensors[-1]
    if not last.is_floating_point():
        return last
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(last.dtype)


def _check_alike(header: Header, last: Header) -> None:
    """Same names and shapes, same config."""
    shapes = [{name: info.shape for name, info in one.tensors.items()} for one in (header, last)]
    configs = [
        {key: one.metadata.get(f"vidgen.{key}") for key in ("family", "part", "config")} for one in (header, last)
    ]
    if shapes[0] == shapes[1] and configs[0] == configs[1]:
        return
    different = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    raise CheckpointError(
        "The files are not of one architecture",
        given=f"{header.path} and {last.path}, which differ in {', '.join(different[:3]) or 'their config'}",
        do="average checkpoints of one training, or of runs that began with the same weights",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vidgen.training.average", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "files", nargs="+", type=Path, help="safetensors of one architecture; the last gives the metadata"
    )
    parser.add_argument("-o", "--out", required=True, type=Path)
    arguments = parser.parse_args(argv)
    try:
        average(arguments.files, arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
