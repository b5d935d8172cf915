"""The comparison with other programs at a tiny size: both sides compute the same, and the report says what it must."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.benchmarks import compare, compare_cogvideox, gpu
from vidgen.benchmarks.compare_hunyuan import CODEC_BARS, NETWORK_BARS, REDUCED, TINY
from vidgen.benchmarks.contest import PARTS, Contest, Setting, Side, touch
from vidgen.vidgen_core.errors import SettingsError

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    *(Setting(part=part, size="tiny", valid_text=text) for part in ("network", "text") for text in (64, 256)),
    Setting(part="codec", size="tiny"),
    Setting(part="loader", size="tiny"),
]
BF16_ROUNDING = 0.05
"""of 8 bits through a few layers of random weights; other weights or inputs give more than 1"""


def both(setting: Setting, folder: Path, family: str = "hunyuan") -> tuple[Contest, dict[str, Side]]:
    contest = compare.contest_of(family, setting)
    contest.prepare(folder)
    return contest, {"ours": contest.ours(folder), "peer": contest.peer(folder)}


def agreement_of(setting: Setting, folder: Path, family: str = "hunyuan") -> dict[str, Any]:
    contest, sides = both(setting, folder, family)
    answers = {name: side.answer(side.run()) for name, side in sides.items()}
    return compare.agreement(answers, None if contest.exact is None else contest.exact(folder))


# --- the same weights, the same answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", CASES, ids=lambda setting: f"{setting.part}-{setting.valid_text}")
def test_both_sides_give_the_same_answer(setting: Setting, tmp_path: Path) -> None:
    found = agreement_of(setting, tmp_path)
    assert found["relative"] <= 1e-5  # rounding of float32; VAEs of random weights amplify it
    assert "from_float32" not in found


@pytest.mark.parametrize("part", PARTS)
def test_cogvideox_gives_the_same_answer(part: str, tmp_path: Path) -> None:
    found = agreement_of(Setting(part=part, size="tiny"), tmp_path, "cogvideox")
    assert found["relative"] <= (1e-5 if part == "codec" else 2e-6)  # see above


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("part", ["network", "loader"])
def test_narrow_numbers_stay_near_float32_on_both_sides(part: str, dtype: str, family: str, tmp_path: Path) -> None:
    found = agreement_of(Setting(part=part, dtype=dtype, size="tiny"), tmp_path, family)
    assert 0 < found["from_float32"]["ours"] < BF16_ROUNDING
    assert 0 < found["from_float32"]["peer"] < BF16_ROUNDING


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
def test_float8_is_what_both_hold(family: str, tmp_path: Path) -> None:
    _, sides = both(Setting(part="network", dtype="fp8", size="tiny"), tmp_path, family)
    for side in sides.values():
        (module,) = side.modules
        held = {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}
        assert torch.float8_e4m3fn in held


@pytest.mark.parametrize("way", ["default", "tiled"])
def test_a_peer_that_cuts_the_video_is_another_answer(way: str, tmp_path: Path) -> None:
    """Else the sizes would be too small for it to cut, and the bar would be held against the wrong thing."""
    assert agreement_of(Setting(part="codec", size="tiny", peer=way), tmp_path)["relative"] > 1e-3


def test_cogvideox_is_cut_in_space_alone(tmp_path: Path) -> None:
    """Groups of frames are the VAE's own way, so the peer's default is ours to the last digit; its tiles are not."""
    assert agreement_of(Setting(part="codec", size="tiny", peer="tiled"), tmp_path, "cogvideox")["relative"] > 1e-3
    (rows, columns), sizes = compare_cogvideox.REDUCED.tile, compare_cogvideox.REDUCED.codec_latents
    assert rows < 8 * sizes[1]
    assert columns < 8 * sizes[2]


def test_reduced_sizes_are_those_that_the_peer_cuts() -> None:
    frames, rows, columns = REDUCED.codec_latents["tiled"]
    assert frames > 16 // 4
    assert min(rows, columns) > REDUCED.tile[0] // 8
    assert REDUCED.codec_latents["default"][0] > 16 // 4
    assert REDUCED.codec_latents["untiled"][0] <= 16 // 4


def test_bars_are_those_of_the_plan() -> None:
    assert NETWORK_BARS == {64: 0.82, 256: 1.00}
    assert CODEC_BARS == {"untiled": 0.80, "default": 0.60, "tiled": 0.42}
    assert compare_cogvideox.BAR == 1.00


# --- measuring --------------------------------------------------------------------------------------------------------


def counting(calls: list[str], name: str) -> Side:
    return Side(run=lambda: calls.append(name), answer=lambda _: torch.ones(1))


def test_turns_alternate_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    seconds, answers = compare.alternate(counting(calls, "a"), counting(calls, "b"), 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert {name: len(runs) for name, runs in seconds.items()} == {"ours": 3, "peer": 3}
    assert answers.keys() == {"ours", "peer"}


def test_a_busy_machine_is_measured_by_cpu_time() -> None:
    assert compare.clock_of("cpu", 0.1) == "wall"
    assert compare.clock_of("cpu", 3.0) == "cpu"
    assert compare.clock_of("cpu", None) == "wall"
    assert compare.clock_of("cuda", 3.0) == "wall"


def test_spread_of_one_and_of_many() -> None:
    assert compare.spread([2.0]) == {"min": 2.0, "q1": 2.0, "q3": 2.0, "max": 2.0}
    assert compare.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"min": 1.0, "q1": 2.0, "q3": 4.0, "max": 5.0}


def test_difference_is_of_the_second_norm() -> None:
    found = compare.difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert found == pytest.approx({"relative": 0.1, "max_abs": 0.5})


def test_memory_of_a_run_is_counted(tmp_path: Path) -> None:
    big = 64 * 2**20

    def pages() -> torch.Tensor:
        # New pages of the system: torch's own would come out of what other tests left behind.
        given = mmap.mmap(-1, big, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(given, dtype=torch.uint8).fill_(1)

    def side(folder: Path) -> Side:
        return Side(run=pages, answer=lambda x: x)

    contest = Contest(prepare=lambda folder: None, ours=side, peer=side, peer_name="itself")
    if sys.platform == "linux":
        found = compare.measure_memory(contest, "ours", tmp_path, "cpu")
        # The kernel counts pages in batches for each CPU, so a hundred of them may be missing.
        assert 0.98 * big <= found["above"] < 1.5 * big
        assert 0.98 * big <= found["anonymous_above"] < 1.5 * big


def test_touching_reads_every_weight() -> None:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.view(torch.uint8).fill_(7)
        layer.bias.view(torch.uint8).fill_(5)
    assert touch(layer) == 12  # a byte of each, as neither is larger than a page
    assert touch() == 0


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return compare.compare("hunyuan", Setting(part="network", size="tiny"), 3, with_memory=False)


def test_the_report_is_complete(report: dict[str, Any]) -> None:
    assert report["ratio_median"] > 0
    assert report["ratio_spread"]["min"] <= report["ratio_median"] <= report["ratio_spread"]["max"]
    assert report["bar"] == 0.82
    assert report["within_bar"] == (report["ratio_median"] <= 0.82)
    assert report["clock"] in ("wall", "cpu")
    assert set(report["versions"]) == {"torch", "diffusers", "transformers", "safetensors"}
    assert report["sizes"]["video_tokens"] == 8
    assert len(report["seconds"]["ours"]) == len(report["seconds"]["peer"]) == report["runs"] == 3
    assert json.loads(json.dumps(report)) == report


def test_the_table_names_both_and_the_bar(report: dict[str, Any]) -> None:
    text = compare.markdown({**report, "ratio_median": 0.9, "within_bar": False})
    assert "vidgen" in text
    assert "diffusers" in text
    assert "the bar is 0.82: **missed**" in text
    used = {"above": 3 * 2**20, "anonymous_above": 2**20}
    with_memory = compare.markdown({**report, "memory_bytes": {"ours": used, "peer": used}})
    assert "3 MiB (1 MiB anonymous)" in with_memory


def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--part", "codec", "--size", "tiny", "--runs", "1", "--no-memory"]
    compare.main([*told, "--json", str(tmp_path / "a.json")])
    assert capsys.readouterr().out.startswith("### hunyuan codec, fp32, cpu")
    assert "ratio_median" in json.loads((tmp_path / "a.json").read_text())
    compare.main([*told, "--json"])
    assert json.loads(capsys.readouterr().out)["peer"] == "untiled"


@pytest.mark.parametrize("part", ["codec", "text"])
def test_float8_where_there_is_none_is_explained(part: str) -> None:
    with pytest.raises(SettingsError, match="Neither side stores this part as float8"):
        compare.contest_of("hunyuan", Setting(part=part, dtype="fp8"))


def test_every_part_has_sides() -> None:
    assert {setting.part for setting in CASES} == set(PARTS)
    with pytest.raises(SystemExit):
        compare.parse(["--part", "network", "--family", "nobody"])


# --- the list for a GPU -----------------------------------------------------------------------------------------------


def test_the_gpu_list_runs_dry(tmp_path: Path) -> None:
    """Every item at a tiny size on the CPU, by the very script."""
    folder = tmp_path / "results"
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", str(folder)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "gpu.json").read_text())
    assert report["dry_run"] is True
    assert list(report["items"]) == list(gpu.ITEMS)
    statuses = {name: item["status"] for name, item in report["items"].items()}
    expected = {name: gpu.missing(item) or "done" for name, item in gpu.ITEMS.items()}
    assert statuses == expected
    assert {name for name, status in statuses.items() if status != "done"} == {"svd"}
    assert report["items"]["peer_540p"]["difference"] < BF16_ROUNDING
    assert report["items"]["stream_file"]["streamed"]["difference"] == 0
    assert max(report["items"]["cogvideox"][part]["difference"] for part in ("step", "decode")) < BF16_ROUNDING
    cached = report["items"]["step_cache"]["magcache fast"]
    assert cached["skipped"] > 0
    assert cached["difference"] > 0
    drawn = report["items"]["stream_profile"]
    assert (folder / drawn["picture"]).read_bytes()[:4] == b"\x89PNG"
    assert drawn["device"] == "cpu"
    assert drawn["bring_s"] > 0
    assert 0 <= drawn["hidden"] <= 1
    table = (folder / "gpu.md").read_text()
    assert all(item.title in table for item in gpu.ITEMS.values())


def test_flops_of_a_published_step() -> None:
    """720x1280x129 with 256 text tokens: 1.618 PFLOP of linear layers and 10.45 of attention."""
    scale = gpu.full_scale(Path())
    video = gpu.num_tokens(scale.network, scale.long)
    assert video == 118_800
    flops = gpu.step_flops(scale.network, video, 256)
    assert flops["linear"] / 1e15 == pytest.approx(1.618, abs=1e-3)
    assert flops["attention"] / 1e15 == pytest.approx(10.451, abs=1e-3)
    assert gpu.num_tokens(scale.network, scale.middle) == 67_320
    assert gpu.num_tokens(scale.network, scale.short) == 10_240


def test_what_is_not_built_is_said_by_name() -> None:
    there = gpu.Item("a", lambda scale: {}, needs=".vidgen_core.tiling")
    assert gpu.missing(there) is None
    assert gpu.missing(gpu.Item("b", None, needs=".vidgen_core.tiling")).startswith("not measured yet")
    assert gpu.missing(gpu.Item("c", None, needs=".vidgen_core.never.ever")) == "not built yet: vidgen_core.never.ever"
    assert gpu.missing(gpu.Item("d", lambda scale: {}, needs="no_such_library")) == "not installed: no_such_library"


def test_an_item_that_fails_or_hangs_costs_only_itself() -> None:
    python = [sys.executable, "-S", "-c"]
    assert gpu.run_apart([*python, "print('noise'); print('{\"status\": \"done\"}')"], 60) == {"status": "done"}
    failed = gpu.run_apart([*python, "import sys; sys.exit('out of memory')"], 60)
    assert failed == {"status": "failed with exit code 1", "log": ["out of memory"]}
    assert gpu.run_apart([*python, "import time; time.sleep(60)"], 0.3) == {"status": "stopped after 0 s"}


def test_no_time_left_is_said_and_results_are_kept(tmp_path: Path) -> None:
    report = gpu.run_all(tmp_path, ["step_720p", "svd"], dry=False, minutes=0)
    assert report["items"]["step_720p"]["status"].startswith("no time left: needs 75 s of")
    assert json.loads((tmp_path / "gpu.json").read_text())["items"].keys() == {"step_720p", "svd"}


def test_steps_are_held_against_the_rate_of_the_same_job() -> None:
    items = {"rate": {"bf16_tflops": 800.0}, "step_720p": {"tflops": 560.0}, "peer_540p": {"ratio": 0.5}}
    assert gpu.against_rate(items) == {"step_720p": 0.7}
    assert gpu.against_rate({"step_720p": {"tflops": 560.0}}) == {}


def test_the_tiny_sizes_have_parts_of_every_kind() -> None:
    assert TINY.network.num_double_blocks >= 1
    assert TINY.network.num_single_blocks >= 1
