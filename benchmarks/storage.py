"""How far off are weights, and what a network answers, in each way of storing them?

The bundled network is asked once in float32 and once in every storage of ``memory.place``, with the same noise and
text; errors are relative, in L2 norm. Beside it stand normally distributed weights.

    python -m vidgen.benchmarks.storage --json benchmarks/results/storage.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .full_size import commit, tell

if TYPE_CHECKING:
    from torch import Tensor

RANDOM = (1024, 3072)
"""rows and columns of the normally distributed weights"""


def measure(source: str | None) -> dict[str, Any]:
    """storage -> bytes per weight and relative errors of weights and answers."""
    import torch

    from ..vidgen_core.generate import encode_prompts, load_bundle
    from ..vidgen_core.memory.place import STORAGES, linears_in, store_linears
    from ..vidgen_core.types import VideoShape

    bundle = load_bundle(source, dtype=torch.float32, device="cpu")
    model, defaults = bundle.model, bundle.model.defaults
    shape = VideoShape(num_frames=defaults.num_frames, height_px=defaults.height_px, width_px=defaults.width_px)
    cond = encode_prompts(bundle.text, model, ["a red star spins on a blue background"])
    noise = torch.randn(1, *shape.latent_shape(bundle.codec.grid), generator=torch.Generator().manual_seed(0))
    normal = torch.randn(RANDOM, generator=torch.Generator().manual_seed(1))

    def ask() -> list[Tensor]:
        with torch.inference_mode():
            return [model.predict(noise, torch.tensor(t), cond) for t in (0.9, 0.5, 0.1)]

    matrices = [linear.weight.detach() for linear in linears_in(model.network, model.family.blocks).values()]
    wanted, rows = ask(), {}
    for name, storage in STORAGES.items():
        stored = store_linears(model.network, storage, model.family.blocks, keep=True)
        answers = ask()
        stored.undo()
        rows[name] = {
            "bytes_per_weight": round(storage.num_bytes(*RANDOM) / normal.numel(), 4),
            "normal_weights": round(_error([_again(storage, normal)], [normal]), 6),
            "bundled_weights": round(_error([_again(storage, weight) for weight in matrices], matrices), 6),
            "bundled_answers": round(_error(answers, wanted), 6),
        }
    return {"commit": commit(), "torch": torch.__version__, "checkpoint": model.fingerprint, "storages": rows}


def _again(storage: Any, weight: Tensor) -> Tensor:
    made = storage.encode(weight)
    return storage.decode(made["stored"], made.get("scale"), weight.shape[1], weight.dtype)


def _error(given: list[Tensor], wanted: list[Tensor]) -> float:
    off = sum(float((a - b).double().square().sum()) for a, b in zip(given, wanted, strict=True))
    return (off / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.storage", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a bundled name or a folder; the first bundled model by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args(argv)
    tell(lambda: measure(arguments.model), arguments.json)


if __name__ == "__main__":
    main()
