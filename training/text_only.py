"""A CogVideoX network that was trained with and without pictures, as one for text alone.

Without a picture its channels are zeros, and what the network is told besides the time never changes. So the weights of
those channels can go and the constant can move into the time's bias: the result is the same network to the last
rounding, in the layout of a text-to-video checkpoint.

python -m vidgen.training.text_only i2v/network.safetensors -o network.safetensors
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vidgen_core.errors import CheckpointError, UserError
from ..vidgen_core.families.cogvideox import OFFSET
from ..vidgen_core.families.cogvideox.config import NetworkConfig
from ..vidgen_core.model import open_part
from ..vidgen_core.nn.embeddings import timestep_embedding
from ..vidgen_core.weights.load import read_tensors
from ..vidgen_core.weights.save import save_checkpoint


def text_only(state: Mapping[str, Tensor], config: NetworkConfig) -> tuple[dict[str, Tensor], NetworkConfig]:
    """The tensors and the config without pictures; computed in float32 and given back in the dtypes of ``state``.

    Raises:
        CheckpointError: the network takes no pictures, or has more of them than a text-to-video checkpoint can do
            without.
    """
    if not config.takes_image or config.positions == "learned":
        raise CheckpointError(
            "There is nothing to take away from this network",
            given=f"{config.in_channels} channels in, {config.out_channels} out, positions {config.positions!r}",
            expected="a network of CogVideoX 1.5's kind with channels for a picture",
        )
    state = dict(state)
    weight = state["patch_embed.proj.weight"]
    volume = math.prod(config.patch) if weight.ndim == 2 else 1
    state["patch_embed.proj.weight"] = weight[:, : config.out_channels * volume].contiguous()
    if config.offset_embed:
        offset = timestep_embedding(torch.tensor([OFFSET]), config.time_width)
        for number in (0, 2):
            given = {name: state.pop(f"ofs_embed.{number}.{name}") for name in ("weight", "bias")}
            offset = F.linear(offset, given["weight"].float(), given["bias"].float())
            offset = F.silu(offset) if number == 0 else offset
        bias = state["time_embed.2.bias"]
        state["time_embed.2.bias"] = (bias.float() + offset[0]).to(bias.dtype)
    return state, replace(config, in_channels=config.out_channels, offset_embed=False, image_scale=1.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vidgen.training.text_only", description=__doc__.split("\n\n")[0])
    parser.add_argument("network", type=Path, help="safetensors of our own, as training writes them")
    parser.add_argument("-o", "--out", required=True, type=Path)
    arguments = parser.parse_args(argv)
    try:
        header, found = open_part(arguments.network, "network")
        if not isinstance(found.config, NetworkConfig) or found.layout != "native":
            raise CheckpointError(
                "This is not a CogVideoX network of our own", given=f"{arguments.network}: {found.title}"
            )
        state, config = text_only(read_tensors(header, list(header.tensors)), found.config)
        kept = {key: text for key, text in header.metadata.items() if key not in ("vidgen.config", "format")}
        save_checkpoint(
            arguments.out, state, family="cogvideox", part="network", config=config, metadata=kept, dtype=None
        )
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
