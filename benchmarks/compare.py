"""Our network, codec, text encoders and loader beside those that people use today: time, memory, and agreement.

    python -m vidgen.benchmarks.compare --family hunyuan --part network --dtype fp32 --runs 7

Both sides have the same weights and inputs and take turns in one process: A B A B. The ratio is that of each pair,
ours / theirs, and its median is what counts, because a machine that is slow for one of a pair is slow for both. Peaks
of memory are measured in a process for each side that never saw the other.

On a CPU that others use as well, the seconds are those of this process on the CPU, not those on the wall; the report
says which.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import SettingsError, UserError
from .contest import DTYPES, PARTS, PEERS, SIZES, Contest, Setting, Side, touch
from .full_size import commit, measure_fresh
from .render import MIB, forget_peak, machine, peak_bytes, status_bytes, watched

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {"hunyuan": "compare_hunyuan", "cogvideox": "compare_cogvideox"}
"""family -> the module beside this one whose ``contest(setting)`` builds both sides"""
PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
BUSY_LOAD = 0.5
"""a load average above this, before we begin, means that others use the machine"""
SIDES = ("ours", "peer")


def contest_of(family: str, setting: Setting) -> Contest:
    """Both sides of a part.

    Raises:
        SettingsError: the part cannot be had in this dtype, or the peer or the device is not there.
    """
    import torch

    if find_spec("diffusers") is None:
        raise SettingsError("There is nothing to compare with: diffusers is not installed", do='pip install ".[bench]"')
    if setting.dtype == "fp8" and setting.part in ("codec", "text"):
        raise SettingsError(
            "Neither side stores this part as float8",
            given=f"--part {setting.part} --dtype fp8",
            do="use fp32 or bf16, or the network or loader",
        )
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("There is no CUDA device here", given="--device cuda", do="use --device cpu")
    return import_module(f".{FAMILIES[family]}", __package__).contest(setting)


# ---------------------------------------------------------------------------------------------
# time


def clock_of(device: str, load: float | None) -> str:
    """Which seconds the ratio is made of: "cpu" (this process, all threads) where others use the CPU, else "wall"."""
    return "cpu" if device == "cpu" and load is not None and load > BUSY_LOAD else "wall"


def timed(side: Side, device: str) -> tuple[dict[str, float], Any]:
    """Seconds on both clocks, and what was computed."""
    _synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = side.run()
    _synchronise(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def _synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def alternate(
    ours: Side, peer: Side, runs: int, device: str
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Tensor]]:
    """``runs`` turns of each, one after the other, after a turn of each that does not count.

    Returns:
        by side, the seconds of its turns; and its answer, from the turn that does not count.
    """
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    answers = {}
    gc.collect()
    gc.freeze()  # what was imported and built stays, so that collecting after each turn costs little
    for turn in range(runs + 1):
        for name, side in zip(SIDES, (ours, peer), strict=True):
            spent, result = timed(side, device)
            if turn:
                seconds[name].append(spent)
            else:
                answers[name] = side.answer(result)
            del result
            gc.collect()
    gc.unfreeze()
    return seconds, answers


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, quartiles and largest."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "q1": low, "q3": high, "max": max(values)}


# ---------------------------------------------------------------------------------------------
# agreement


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """How far two answers are apart: of the norm of the second, and at the worst place."""
    a, b = a.double(), b.double()
    gap = a - b
    return {"relative": float(gap.norm() / b.norm()), "max_abs": float(gap.abs().max())}


def agreement(answers: Mapping[str, Tensor], exact: Side | None) -> dict[str, Any]:
    """The difference between both, and where both round, that of each from ours in float32."""
    found: dict[str, Any] = difference(answers["ours"], answers["peer"])
    if exact is not None:
        right = exact.answer(exact.run())
        found["from_float32"] = {name: difference(answer, right)["relative"] for name, answer in answers.items()}
    return found


# ---------------------------------------------------------------------------------------------
# memory


def measure_memory(contest: Contest, name: str, folder: Path, device: str) -> dict[str, int]:
    """Bytes of one side in this process: with its weights in memory, and how much more one run takes."""
    side = getattr(contest, name)(folder)
    touch(*side.modules)
    gc.collect()
    if device == "cuda":
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run()
        peak = torch.cuda.max_memory_allocated()
        return {"before": before, "peak": peak, "above": peak - before}
    before, anonymous_before = status_bytes("self", "VmRSS"), status_bytes("self", "RssAnon")
    forget_peak()
    with watched(lambda: status_bytes("self", "RssAnon")) as anonymous:
        result = side.run()
        anonymous_after = status_bytes("self", "RssAnon")
    del result
    return {
        "before": before,
        "peak": peak_bytes(),
        "above": max(0, peak_bytes() - before),
        "anonymous_above": max(0, max(anonymous[0], anonymous_after) - anonymous_before),
    }


def memory(family: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """:func:`measure_memory` of each side in a process of its own, and the ratio of what a run takes."""
    told = ["--family", family, *(f"--{key.replace('_', '-')}={value}" for key, value in asdict(setting).items())]
    sides: dict[str, Any] = {
        name: measure_fresh(f"{__package__}.compare", *told, f"--once={name}", f"--folder={folder}") for name in SIDES
    }
    keys = [key for key in ("above", "anonymous_above") if sides["peer"].get(key)]
    return {**sides, **{f"{key}_ratio": round(sides["ours"][key] / sides["peer"][key], 3) for key in keys}}


# ---------------------------------------------------------------------------------------------
# the report


def compare(family: str, setting: Setting, runs: int, *, with_memory: bool = True) -> dict[str, Any]:
    """The whole report.

    Raises:
        SettingsError: see :func:`contest_of`.
        FileError: the disk has no room for the weights.
    """
    import torch

    host = machine()
    contest = contest_of(family, setting)
    clock = clock_of(setting.device, host["load_average_before"])
    with tempfile.TemporaryDirectory(prefix="vidgen-compare-") as place:
        folder = Path(place)
        contest.prepare(folder)
        used = memory(family, setting, folder) if with_memory else None
        seconds, answers = alternate(contest.ours(folder), contest.peer(folder), runs, setting.device)
        apart = agreement(answers, None if contest.exact is None else contest.exact(folder))
    pairs = list(zip(seconds["ours"], seconds["peer"], strict=True))
    ratios = {name: [a[name] / b[name] for a, b in pairs] for name in ("wall", "cpu")}
    found = median(ratios[clock])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**host, "threads": torch.get_num_threads(), "gpu": _gpu(setting.device)},
        "versions": _versions(),
        "family": family,
        **asdict(setting),
        "ours": "vidgen",
        "theirs": contest.peer_name,
        "sizes": dict(contest.facts),
        "runs": runs,
        "clock": clock,
        "ratio_median": round(found, 4),
        "ratio_spread": _rounded(spread(ratios[clock])),
        "ratio_median_by_clock": _rounded({name: median(values) for name, values in ratios.items()}),
        "bar": contest.bar,
        "within_bar": None if contest.bar is None else found <= contest.bar,
        "seconds_median": {
            name: _rounded({kind: median(run[kind] for run in seconds[name]) for kind in ("wall", "cpu")})
            for name in SIDES
        },
        "seconds": {name: [_rounded(run) for run in seconds[name]] for name in SIDES},
        "difference": apart,
        "memory_bytes": used,
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _gpu(device: str) -> str | None:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    clock, between = report["clock"], report["ratio_spread"]
    host = report["machine"]
    kind = {"cpu": "CPU seconds of the process", "wall": "seconds"}[clock]
    lines = [
        "### {family} {part}, {dtype}, {device}: vidgen and {theirs}".format(**report),
        "",
        f"| | {kind}, median of {report['runs']} | a run needs above its weights |",
        "|---|---|---|",
        *(
            f"| {title} | {report['seconds_median'][name][clock]:.3f} | {_mib(report, name)} |"
            for title, name in (("vidgen", "ours"), (report["theirs"], "peer"))
        ),
        "",
        f"Ratio ours / theirs: **{report['ratio_median']:.3f}** (pairs from {between['min']:.3f} to "
        f"{between['max']:.3f}, half of them from {between['q1']:.3f} to {between['q3']:.3f})" + _bar(report) + ".",
        f"The answers differ by {report['difference']['relative']:.1e} of their norm" + _exact(report) + ".",
        "",
        f"Sizes: {json.dumps(report['sizes'])}. Commit {report['commit']}; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f"; {host['gpu'] or host['cpu']}, {host['threads']} threads, load {host['load_average_before']} before.",
    ]
    return "\n".join(lines)


def _mib(report: Mapping[str, Any], name: str) -> str:
    used = report["memory_bytes"]
    if used is None:
        return "not measured"
    anonymous = used[name].get("anonymous_above")
    extra = "" if anonymous is None else f" ({anonymous / MIB:.0f} MiB anonymous)"
    return f"{used[name]['above'] / MIB:.0f} MiB{extra}"


def _bar(report: Mapping[str, Any]) -> str:
    if report["bar"] is None:
        return ""
    return f"; the bar is {report['bar']:.2f}: " + ("held" if report["within_bar"] else "**missed**")


def _exact(report: Mapping[str, Any]) -> str:
    exact = report["difference"].get("from_float32")
    return "" if exact is None else f"; from float32 ours by {exact['ours']:.1e}, theirs by {exact['peer']:.1e}"


# ---------------------------------------------------------------------------------------------
# the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.compare",
        description=(__doc__ or "").split("\n")[0],
        epilog="ratio_median in the JSON is ours / theirs: below 1 we are faster",
    )
    parser.add_argument("--family", choices=FAMILIES, default="hunyuan")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--runs", type=_positive, default=7, help="turns of each side (default 7)")
    parser.add_argument(
        *("--valid-text",), type=_positive, default=64, help="of 256 text tokens, those that are no padding (64 or 256)"
    )
    parser.add_argument("--peer", choices=PEERS, default="untiled", help="how the peer's codec decodes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="reduced", help="tiny is for a trial")
    parser.add_argument("--no-memory", action="store_true", help="leave out the two processes that measure memory")
    parser.add_argument(
        *("--json",), nargs="?", const="-", metavar="FILE", help="JSON in place of the table, or the table and a FILE"
    )
    parser.add_argument("--once", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    setting = Setting(
        part=arguments.part,
        dtype=arguments.dtype,
        device=arguments.device,
        valid_text=arguments.valid_text,
        peer=arguments.peer,
        size=arguments.size,
    )
    if arguments.once is not None:
        contest = contest_of(arguments.family, setting)
        print(json.dumps(measure_memory(contest, arguments.once, arguments.folder, setting.device)))
        return
    try:
        report = compare(arguments.family, setting, arguments.runs, with_memory=not arguments.no_memory)
    except UserError as error:
        raise SystemExit(str(error)) from error
    text = json.dumps(report, indent=1)
    print(text if arguments.json == "-" else markdown(report))
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
