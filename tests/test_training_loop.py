"""The loop of all stages: recipes, optimizers, moving average, exact resume, several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.training import checkpoint, cli
from vidgen.training.discriminator import adversarial_losses
from vidgen.training.loop import MAX_BAD_STEPS, Draw, Loop, Objective, mix
from vidgen.training.optim import NEWTON_SCHULZ, Average, Muon, build_optimizers, learning_rate_factor, orthogonalise
from vidgen.training.recipe import OptimizerSettings, RunSettings, ScheduleSettings, model_config, read_recipe
from vidgen.training.team import ALONE, Team, spread
from vidgen.training.vae import VaeRecipe
from vidgen.vidgen_core.errors import CheckpointError, FileError, MissingLibraryError, NumericsError, RecipeError

RECIPES = Path(cli.__file__).parent / "recipes"


class Toy(Objective):
    """Regression of a fixed random map with a small MLP; dropout makes it depend on the global generator.

    Args:
        poisoned: steps whose batch is not finite.
        stop_at: the step at which the process is told to end.
    """

    metrics = ("half",)

    def __init__(self, *, poisoned: range = range(0), stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))
        self.truth = torch.randn(6, 4)
        self.poisoned, self.stop_at = poisoned, stop_at
        self.summary: dict[str, Any] = {}

    def batch(self, draw: Draw) -> tuple[Tensor, Tensor]:
        if draw.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.stack([torch.randn(6, generator=g) for g in draw.samples()])
        y = x @ self.truth
        return (x * float("nan") if draw.step in self.poisoned else x), y

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        return {"loss": loss, "half": loss.detach() / 2}

    def evaluate(self, folder: Path, step: int, team: Team = ALONE) -> dict[str, float]:
        x = torch.randn(65, 6, generator=torch.Generator().manual_seed(1))
        errors = [(self.net(row) - row @ self.truth).square().mean() for row in team.share(x)]
        return {"error": float(torch.stack(team.gather(errors)).mean().detach())}

    def finish(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)


class WithoutDropout(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Identity()


class WithCritic(WithoutDropout):
    """A critic joins in after a quarter of the run; until then it gets no gradient."""

    metrics = ("generator", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.on = False

    def helpers(self) -> dict[str, OptimizerSettings]:
        return {"critic": OptimizerSettings(lr=5e-3, clip_norm=0.1)}

    def batch(self, draw: Draw) -> tuple[Tensor, Tensor]:
        self.on = draw.position >= 0.25
        return super().batch(draw)

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        out = self.net(x)
        loss = (out - y).square().mean()
        if not self.on:
            return {"loss": loss}
        parts = adversarial_losses(self.critic, out, y)
        return {"loss": loss + 0.1 * parts["generator"] + parts["discriminator"], **parts}


KINDS = {"adamw": ("adamw", Toy), "muon": ("muon", Toy), "critic": ("muon", WithCritic)}


def make_loop(
    folder: Path, name: str = "toy", *, kind: str = "adamw", objective: Objective | None = None, steps: int = 12
) -> Loop:
    return Loop(
        objective or Toy(),
        run=RunSettings(name=name, folder=str(folder), log_steps=2, evaluate_steps=6),
        optimizer=OptimizerSettings(name=kind, batch_size=8, lr=1e-2, muon_lr=1e-2, ema_decay=0.9),  # type: ignore[arg-type]
        schedule=ScheduleSettings(steps=steps, warmup_steps=3),
    )


def weights(loop: Loop) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loop.parameters.items()}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_resumed_run_equals_uninterrupted_run_to_the_bit(tmp_path, kind):
    """The second part of the run with a critic begins before the critic does."""
    optimizer, objective = KINDS[kind]
    whole = make_loop(tmp_path, "whole", kind=optimizer, objective=objective())
    whole.train()
    for num_steps in (2, 3, 4, None):
        parts = make_loop(tmp_path, "parts", kind=optimizer, objective=objective())
        parts.train(stop_after=num_steps)
    assert parts.progress.step == 12
    assert_same(weights(whole), weights(parts))
    assert_same(whole.average.values, parts.average.values)
    rows = [list(csv.DictReader((tmp_path / name / "loss.csv").open())) for name in ("whole", "parts")]
    losses = [[(row["step"], row["loss"]) for row in run if int(row["step"]) % 2 == 0] for run in rows]
    assert losses[0][-1] == losses[1][-1]


def test_loss_goes_down_and_the_result_is_the_average(tmp_path):
    objective = WithoutDropout()
    loop = make_loop(tmp_path, objective=objective, steps=150)
    before = objective.evaluate(tmp_path, 0)["error"]
    loop.train()
    assert objective.summary["figures"]["error"] < 0.2 * before
    assert objective.summary["steps"] == 150
    assert (tmp_path / "toy" / "loss.png").is_file()
    rows = list(csv.DictReader((tmp_path / "toy" / "loss.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    # The schedule has come down to zero.
    assert float(rows[-1]["lr"]) < 1e-4


def test_a_signal_ends_in_a_checkpoint_that_can_be_resumed(tmp_path):
    whole = make_loop(tmp_path, "whole")
    whole.train()
    stopped = make_loop(tmp_path, "stopped", objective=Toy(stop_at=4))
    handler = signal.getsignal(signal.SIGTERM)
    assert stopped.train().step == 5
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in checkpoint.complete(tmp_path / "stopped" / "checkpoints")] == ["step-00000005"]
    resumed = make_loop(tmp_path, "stopped")
    resumed.train()
    assert_same(weights(whole), weights(resumed))


def test_a_run_by_the_clock_ends_annealed_and_keeps_its_clock(tmp_path):
    def loop() -> Loop:
        return Loop(
            Toy(),
            run=RunSettings(name="clock", folder=str(tmp_path), log_steps=1),
            optimizer=OptimizerSettings(batch_size=2),
            schedule=ScheduleSettings(budget_minutes=0.01, warmup_steps=1),
        )

    first = loop().train(stop_after=3)
    assert 0 < first.elapsed_s < 0.6
    second = loop()
    assert second.train().elapsed_s >= 0.6
    assert second.position() == 1.0
    rows = list(csv.DictReader((tmp_path / "clock" / "loss.csv").open()))
    minutes = [float(row["minutes"]) for row in rows]
    assert minutes == sorted(minutes)
    rates = [float(row["lr"]) for row in rows]
    assert rates == sorted(rates, reverse=True)


def test_steps_that_are_not_finite_are_left_out(tmp_path):
    loop = make_loop(tmp_path, objective=Toy(poisoned=range(3, 6)))
    loop.train()
    assert all(bool(torch.isfinite(p).all()) for p in loop.parameters.values())
    assert loop.average.num_updates == 9
    diverged = make_loop(tmp_path, "bad", objective=Toy(poisoned=range(MAX_BAD_STEPS)), steps=99)
    with pytest.raises(NumericsError, match="lower the learning rate"):
        diverged.train()


def test_a_helper_learns_on_its_own_and_leaves_no_trace_in_the_average(tmp_path):
    alone, joined = (make_loop(tmp_path, kind.__name__, objective=kind()) for kind in (WithoutDropout, WithCritic))
    before = weights(joined)
    for loop in (alone, joined):
        loop.train(stop_after=3)
    # Until it begins, after 3 of 12 steps, the model does not notice it and it does not move.
    for name, value in weights(joined).items():
        assert torch.equal(value, before[name] if name.startswith("critic") else weights(alone)[name]), name
    joined.train(stop_after=3)
    # The bias of the critic's score has no gradient while no score is beyond the hinge.
    assert all(not torch.equal(value, before[name]) for name, value in weights(joined).items() if value.ndim > 1)
    assert not any(name.startswith("critic") for name in joined.average.values)
    rows = list(csv.DictReader((tmp_path / "WithCritic" / "loss.csv").open()))
    assert [bool(row["discriminator"]) for row in rows] == [False, True, True]


def test_a_new_start_forgets_the_old_run(tmp_path):
    make_loop(tmp_path).train()
    again = make_loop(tmp_path)
    again.train(resume=False, stop_after=4)
    assert [path.name for path in checkpoint.complete(tmp_path / "toy" / "checkpoints")] == ["step-00000004"]
    rows = list(csv.DictReader((tmp_path / "toy" / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4"]


def test_a_resumed_run_may_log_more_than_before(tmp_path):
    make_loop(tmp_path).train(stop_after=4)
    more = Toy()
    more.metrics = ("extra", "half")
    make_loop(tmp_path, objective=more).train(stop_after=2)
    rows = list(csv.DictReader((tmp_path / "toy" / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(float(row["half"]) == pytest.approx(float(row["loss"]) / 2, rel=1e-4) for row in rows)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make_loop(tmp_path).train(stop_after=1)
    with pytest.raises(CheckpointError, match="another name"):
        make_loop(tmp_path, objective=WithCritic()).train()


def test_tensorboard_gets_what_the_tables_get(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunSettings(name="board", folder=str(tmp_path), log_steps=2, evaluate_steps=6, tensorboard=True)
    Loop(Toy(), run=run, optimizer=OptimizerSettings(batch_size=8), schedule=ScheduleSettings(steps=6)).train()
    events = EventAccumulator(str(tmp_path / "board" / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "board" / "loss.csv").open()))
    for name in ("loss", "half", "lr", "grad_norm"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-5)) for row in rows]
    assert [event.step for event in events.Scalars("evaluation/error")] == [6, 6]


def test_tensorboard_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = RunSettings(name="board", folder=str(tmp_path), tensorboard=True)
    with pytest.raises(MissingLibraryError, match="tensorboard"):
        Loop(Toy(), run=run, optimizer=OptimizerSettings(batch_size=8), schedule=ScheduleSettings(steps=1))


# ---- processes -----------------------------------------------------------------------------------------------

DETERMINISTIC = {name: (kind, o if o is WithCritic else WithoutDropout) for name, (kind, o) in KINDS.items()}
"""without dropout, which draws other numbers in each process"""

_OTHER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from {module} import share_of_two

share_of_two(1, {port}, Path({folder!r}))
# At once: a thread of gloo that still runs would end the interpreter with an abort on its way out.
import os; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)
"""


def share_of_two(rank: int, port: int, folder: Path) -> None:
    """What one of two processes does: a run of each kind, and work divided by hand."""
    cli._join_group(rank, 2, port)
    try:
        for name, (kind, objective) in DETERMINISTIC.items():
            loop = make_loop(folder, f"two-{name}", kind=kind, objective=objective())
            loop.train()
        team, calls = loop.team, []
        assert (team.rank, team.world) == (rank, 2)
        assert team.gather(team.share(range(7))) == list(range(7))

        def counted(x: Tensor) -> Tensor:
            calls.append(x)
            return orthogonalise(x)

        matrices = [torch.randn(3 + i, 9 - i, generator=torch.Generator().manual_seed(i)) for i in range(5)]
        together = team.map_tensors(counted, matrices, [1.0] * 5)
        assert all(torch.equal(x, orthogonalise(m)) for x, m in zip(together, matrices, strict=True))
        assert len(calls) == (3, 2)[rank]
    finally:
        cli._leave_group()


def test_two_processes_equal_one_with_the_same_batch(tmp_path):
    """With AdamW, with Muon's work divided, and with a critic that begins late; and evaluation is divided too."""
    port, here = cli._free_port(), Path(__file__)
    script = _OTHER.format(tests=str(here.parent), module=here.stem, port=port, folder=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        share_of_two(0, port, tmp_path)
        assert other.wait(timeout=600) == 0
    finally:
        other.kill()
        other.wait()
    for name, (kind, objective) in DETERMINISTIC.items():
        one = make_loop(tmp_path, f"one-{name}", kind=kind, objective=objective())
        one.train()
        tensors, _ = checkpoint.load(checkpoint.complete(tmp_path / f"two-{name}" / "checkpoints")[-1])
        for parameter, value in weights(one).items():
            # The halves of the batch are averaged in another order: a few float32 roundings, amplified by AdamW.
            torch.testing.assert_close(tensors[f"weights.{parameter}"], value, rtol=0, atol=2e-6)
        figures = [list(csv.DictReader((tmp_path / f"{n}-{name}" / "evaluation.csv").open())) for n in ("one", "two")]
        for a, b in zip(*figures, strict=True):
            assert float(a["error"]) == pytest.approx(float(b["error"]), rel=1e-4)


def test_work_is_spread_evenly():
    owners = spread([5, 1, 1, 1, 4, 1, 1], 2)
    assert sum(cost for cost, owner in zip([5, 1, 1, 1, 4, 1, 1], owners, strict=True) if owner == 0) == 7
    assert spread([2.0, 1.0], 3) == [0, 1]
    assert spread([], 2) == []


def test_batches_do_not_depend_on_the_number_of_processes():
    whole = [g.initial_seed() for g in Draw(seed=1, step=2, batch_size=8).samples()]
    halves = [Draw(seed=1, step=2, batch_size=8, rank=r, world=2) for r in (0, 1)]
    assert whole == [g.initial_seed() for half in halves for g in half.samples()]
    assert halves[0].shared().initial_seed() == halves[1].shared().initial_seed()
    seeds = {mix(a, b, c) for a in range(10) for b in range(10) for c in range(-2, 8)}
    assert len(seeds) == 1000


# ---- optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    # The quintic's coefficients are chosen for speed: values end in 0.7..1.2, not at 1.
    assert 0.65 < float(values.min()) <= float(values.max()) < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ result @ v.T
    torch.testing.assert_close(core, torch.diag(core.diagonal()), rtol=0, atol=1e-9)


def test_gram_rounds_equal_the_textbooks_rounds():
    """Rounds on the short side's Gram matrix give what rounds on the whole matrix give (Jordan et al. 2024)."""
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = NEWTON_SCHULZ
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(matrix), x, rtol=0, atol=1e-12)


def test_muon_step_is_its_definition():
    weight = nn.Parameter(torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)))
    expected, momentum = weight.detach().clone(), torch.zeros(6, 2, 5)
    optimizer = Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        grad = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(step + 1))
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = orthogonalise((0.1 * grad + 0.9 * momentum).flatten(1)).view(6, 2, 5)
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * 0.2 * 10**0.5 * update
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)


def test_muon_takes_hidden_matrices_only():
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "hidden": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    parameters = dict(net.named_parameters())
    settings = OptimizerSettings(name="muon", weight_decay=0.1)
    adamw, muon = build_optimizers(parameters, settings, is_hidden=lambda name: "hidden" in name)
    assert [p is net["hidden"].weight for group in muon.param_groups for p in group["params"]] == [True]
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decays[id(net["first"].weight)] == 0.1
    assert decays[id(net["norm"].weight)] == decays[id(net["first"].bias)] == 0.0


def test_muon_solves_a_badly_scaled_problem_faster_than_gradient_descent():
    scales = torch.logspace(0, -2, 8)
    truth = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def solve(build: Any) -> float:
        weight = nn.Parameter(torch.zeros(8, 8))
        optimizer = build([weight])
        for step in range(60):
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * (1 - step / 60)
            ((weight - truth) * scales).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float((weight.detach() - truth).square().mean())

    def with_initial(optimizer: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
        for group in optimizer.param_groups:
            group["initial"] = lr
        return optimizer

    sgd = solve(lambda params: with_initial(torch.optim.SGD(params, lr=0.4), 0.4))
    muon = solve(lambda params: with_initial(Muon(params, lr=0.2), 0.2))
    assert muon < 0.7 * sgd


def test_average_follows_its_definition():
    weight = nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, 0.5)
    expected = torch.zeros(3)
    for number in range(6):
        with torch.no_grad():
            weight.fill_(number + 1.0)
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * (number + 1)
    torch.testing.assert_close(average.values["w"], expected)
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), torch.full((3,), 6.0))


def test_learning_rate_warms_up_holds_and_comes_down():
    settings = ScheduleSettings(steps=100, warmup_steps=10, shape="linear", hold=0.5, final_ratio=0.1)
    factors = [learning_rate_factor(settings, step=step, position=step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    cosine = ScheduleSettings(steps=100, warmup_steps=0)
    assert learning_rate_factor(cosine, step=50, position=0.5) == pytest.approx(0.5)


# ---- recipes -------------------------------------------------------------------------------------------------


def test_bundled_recipes_are_valid():
    from vidgen.training.dit import DitRecipe
    from vidgen.training.text_recipe import read_text_recipe

    readers = {
        "text": read_text_recipe,
        "vae": partial(read_recipe, kind=VaeRecipe),
        "dit": partial(read_recipe, kind=DitRecipe),
    }
    assert set(readers) == set(cli.STAGES)
    for path in RECIPES.glob("*.toml"):
        stage = re.search('^stage = "([a-z]+)"', path.read_text("utf-8"), re.MULTILINE)[1]
        recipe = readers[stage](path)
        assert recipe.stage == stage
        if stage == "dit" and recipe.lora is None:
            assert model_config(recipe.family, "network", recipe.model).out_channels == 24


def test_the_page_on_training_explains_every_key_and_no_other():
    """But for the sizes of the models and the defaults of a checkpoint, which have a page of their own: their code."""
    from vidgen.training.dit import DitRecipe
    from vidgen.training.text_recipe import T5Recipe, TextRecipe

    page = (RECIPES.parents[1] / "docs" / "TRAINING.md").read_text("utf-8")
    table, explained = "", set()
    for line in page.splitlines():
        if line.count("|") == 5 and "`" in line:
            first, keys, stages, _ = (cell.strip() for cell in line.strip("|").split("|"))
            table = first.strip("`[]") or table
            explained |= {(stage, table, key) for stage in stages for key in re.findall("`([a-z_]+)`", keys)}
    known = set()
    for letter, kind in [("t", TextRecipe), ("t", T5Recipe), ("v", VaeRecipe), ("d", DitRecipe)]:
        for name, hint in typing.get_type_hints(kind).items():
            # A table that may be left out is one or None.
            hint = next((one for one in typing.get_args(hint) if is_dataclass(one)), hint)
            if not is_dataclass(hint):
                known.add((letter, "", name))
            elif not hint.__module__.startswith("vidgen.vidgen_core"):
                known |= {(letter, name, field.name) for field in fields(hint)}
    # AdamW's row tells of the text encoders' rate in its last column.
    assert explained == known - {("t", "optimizer", "lr")}


def test_overrides_and_their_types():
    path = RECIPES / "tiny_hunyuan_vae.toml"
    changed = read_recipe(path, VaeRecipe, ["run.name=other", "optimizer.lr=1", "model.block_channels=[8, 8]"])
    assert changed.run.name == "other"
    assert changed.optimizer.lr == 1.0
    assert model_config("hunyuan", "codec", changed.model).block_channels == (8, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.precison='fp32'", "precision"),
        ("optimiser.lr=1", "optimizer"),
        ("optimizer.lr='fast'", "float"),
        ("run.precision='fp8'", "fp32"),
        ("model=4", "Mapping"),
        ("lr", "table.key=value"),
        ("stage.name=1", "no table"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(override, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(RECIPES / "tiny_hunyuan_vae.toml", VaeRecipe, [override])


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
def test_the_bundled_codecs_have_the_same_latents(family):
    recipe = read_recipe(RECIPES / f"tiny_{family}_vae.toml", VaeRecipe)
    assert recipe.family == family
    assert model_config(recipe.family, "codec", recipe.model).latent_channels == 24


def test_a_wrong_model_says_what_is_wrong():
    with pytest.raises(RecipeError, match="tuple"):
        model_config("hunyuan", "codec", {"block_channels": 4})
    with pytest.raises(RecipeError, match="spatial_compression"):
        model_config("cogvideox", "codec", {"spatial_compression": 8})


def test_impossible_numbers_are_refused(tmp_path):
    run, optimizer = RunSettings(name="x", folder=str(tmp_path)), OptimizerSettings(batch_size=8)
    with pytest.raises(RecipeError, match="exactly one"):
        Loop(Toy(), run=run, optimizer=optimizer, schedule=ScheduleSettings(steps=1, budget_minutes=1.0))
    with pytest.raises(RecipeError, match="more than 0"):
        Loop(Toy(), run=run, optimizer=OptimizerSettings(batch_size=0), schedule=ScheduleSettings(steps=1))


def test_command_line_reports_errors_without_a_traceback(tmp_path, capsys):
    assert cli.main([str(tmp_path / "no.toml")]) == 1
    assert "recipe is not there" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("stage = ")
    assert cli.main([str(tmp_path / "bad.toml")]) == 1
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert cli.main([str(tmp_path / "binary.toml")]) == 1
    assert "not a text file" in capsys.readouterr().err
    for override in ("run.processes=0", "run.processes=two", "run=3"):
        assert cli.main([str(RECIPES / "tiny_hunyuan_vae.toml"), "--set", override]) == 1
    (tmp_path / "stage.toml").write_text("stage = 'cook'")
    assert cli.main([str(tmp_path / "stage.toml")]) == 1
    assert "vae" in capsys.readouterr().err


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_checkpoints_are_whole_or_not_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, {"step": 1})

    def full_disk(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(FileError, match="space"):
            checkpoint.save(tmp_path, 2, {"a": torch.ones(2)}, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.save(tmp_path, 3, {"a": torch.zeros(2)}, {"step": 3})
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000003"]
    tensors, rest = checkpoint.load(tmp_path / "step-00000003")
    assert torch.equal(tensors["a"], torch.zeros(2))
    assert rest == {"step": 3}
    (tmp_path / "step-00000003" / "state.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "step-00000003")


def test_a_checkpoint_holds_no_pickle(tmp_path):
    make_loop(tmp_path).train(stop_after=2)
    (folder,) = checkpoint.complete(tmp_path / "toy" / "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((folder / "state.json").read_text())["step"] == 2
