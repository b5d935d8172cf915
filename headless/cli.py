"""The ``vidgen`` command. torch is imported by the sub-commands that need it, so help and version come at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import Cancelled, FileError, MissingLibraryError, SettingsError, UserError
from . import FILES
from .stop import Stop
from .team import Member, check_team, run_team

if TYPE_CHECKING:
    from ..vidgen_core.types import VideoShape
    from .events import Tell

EXIT_ERROR = 1
CACHE_QUALITY = "careful"
"""of --cache METHOD without one"""
DENOISE = 0.6
"""how far --video is changed where --denoise does not say"""
EXIT_STOPPED = 130  # as the shell says of a command that ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for bad input, 2 for a bad command line, 130 when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    stop = Stop()
    # Before anything else is imported: an interrupt in the middle of an import may be lost.
    listening = stop.listening() if argv[:1] in (["generate"], ["render"]) else contextlib.nullcontext()

    def command() -> int:
        with listening:
            return _command(argv, stop)

    return _in_words(command)


def run_member(argv: Sequence[str], member: Member, stop: Stop) -> int:
    """:func:`main` in one of several processes that render together."""
    return _in_words(lambda: _command(argv, stop, member))


def _command(argv: Sequence[str], stop: Stop, member: Member | None = None) -> int:
    if argv[:1] == ["train"]:  # it has a command line of its own
        from ..training.cli import main as train

        return train(argv[1:])
    arguments = _parser().parse_args(argv, argparse.Namespace(stop=stop, argv=argv, member=member))
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments)


def _in_words(command: Callable[[], int]) -> int:
    """The exit status of a command, which says what a user can do something about."""
    try:
        return command()
    except UserError as error:
        sys.stderr.write(f"vidgen: {error}\n")
        return EXIT_ERROR
    except (Cancelled, KeyboardInterrupt):
        sys.stderr.write("vidgen: stopped\n")
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the interpreter flushes it when it ends
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="vidgen", description="Make videos from text. Everything runs on this machine."
    )
    parser.add_argument("--version", action="version", version=f"vidgen {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_render(commands)
    _add_serve(commands)
    _add_plan(commands)
    inspect = commands.add_parser("inspect", help="say what a checkpoint, a LoRA or a video is")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    inspect.set_defaults(command=_inspect)
    doctor = commands.add_parser("doctor", help="say what this machine can do")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(command=_doctor)
    commands.add_parser("train", help="train a model by a recipe; see vidgen train --help", add_help=False)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video from a prompt",
        description="Make a video from a prompt. What is not given is what the checkpoint recommends. Ctrl-C keeps "
        "the unfinished run: the same command goes on from there.",
    )
    parser.add_argument("prompt", help="what the video shows, in quotes")
    parser.add_argument("-o", "--output", type=Path, default=Path("vidgen.mp4"), help="an .mp4, .webm, .gif or .webp")
    parser.add_argument("--negative", metavar="TEXT", help="what the video should not show")
    parser.add_argument("--image", metavar="FILE", help="the first frame; it is cut to the size of the video")
    parser.add_argument(
        "--method",
        default="auto",
        help="how the network is given the image, where its file is silent: token_replace for HunyuanVideo-I2V v2, "
        "raw_latents for CogVideoX1.5-I2V as in its official code, noisy for CogVideoX-Fun 1.1 of 5B",
    )
    parser.add_argument("--video", metavar="FILE", help="a video to change; it is cut to the size of the result")
    parser.add_argument("--denoise", type=float, help="how far to change it: 0.1 hardly, 1 completely (default 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="another number, another video (default 0)")
    parser.add_argument("--frames", type=int, help="length in frames: 1, 5, 9, 13, 17, ...")
    parser.add_argument("--size", metavar="WxH", help="width and height in px, multiples of 16")
    parser.add_argument("--fps", type=float, help="frames per second")
    parser.add_argument("--steps", type=int, help="steps from noise to video")
    parser.add_argument("--cfg", type=float, help="how strongly to follow the prompt; 1 is off")
    parser.add_argument("--guidance", type=float, help="the scale that guidance-distilled networks are told")
    parser.add_argument("--shift", type=float, help="above 1: more of the steps at high noise")
    parser.add_argument("--sampler", help="euler, heun, dpmpp_2m, unipc, ...")
    parser.add_argument("--schedule", help="simple, karras, linear_quadratic, ...")
    parser.add_argument("--model", help="a bundled model, or a folder with network, VAE and text encoders")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA and how strongly it acts (default 1); may be given several times",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the network's blocks, for GPUs: a slower first step, faster others",
    )
    parser.add_argument(
        "--storage", help="how the network's weights lie in memory: auto, float8, float8 per row, int8, nf4, ..."
    )
    _add_budget(parser)
    parser.add_argument(
        "--attention", metavar="NAME", help="kernel of attention: sdpa, flash_attn_3, sageattn, ... (default auto)"
    )
    parser.add_argument(
        "--cache",
        metavar="METHOD[:QUALITY]",
        help="skip steps that would hardly change the video: first_block, teacache or magcache, careful (default) or "
        "fast",
    )
    parser.add_argument("--curve", type=Path, metavar="FILE", help="what --cache magcache has measured of the model")
    parser.add_argument("--crf", type=int, help="quality of the file: 0 is lossless, 17 (default) looks it")
    parser.add_argument(
        "--decode",
        choices=("tiles", "exact", "exact_disk"),
        default="tiles",
        help="tiles fade into each other (default); exact gives what one piece gives within --decode-memory; "
        "exact_disk puts what does not fit into a temporary file",
    )
    parser.add_argument("--decode-memory", type=float, metavar="GB", help="for exact; half of what is free by default")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for the temporary file; beside the output by default"
    )
    _add_common(parser)
    parser.set_defaults(command=_generate)


def _add_render(commands: Any) -> None:
    parser = commands.add_parser(
        "render",
        help="run a workflow",
        description="Run a workflow: a .json as ComfyUI's editor saves or exports it, or a video that carries one.",
    )
    parser.add_argument("file", type=Path)
    _add_set(parser)
    _add_batch(parser)
    _add_custom_nodes(parser)
    _add_budget(parser)
    parser.add_argument(
        "--input",
        type=Path,
        default=FILES / "input",
        metavar="DIR",
        help="where Load Image and the like find their files; with --server they are sent (default: ~/VidGen/input)",
    )
    parser.add_argument("-o", "--output", type=Path, help="the video, or a folder for several (default: output/)")
    _add_common(parser)
    parser.set_defaults(command=_render)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="say what a workflow will take, before anything is loaded",
        description="Say which way each stage of a workflow will go, what memory it takes and about how long, and "
        "which sizes fit where this one does not. Nothing is loaded.",
    )
    parser.add_argument("file", type=Path, nargs="?", help="a workflow in either format, or a video that carries one")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first, for the estimate of time")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_set(parser)
    _add_budget(parser)
    _add_common(parser)
    parser.set_defaults(command=_plan)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change a value; NODE is an id, a title or a class, such as 5.seed=7 or VidGenSampler.seed=7",
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", metavar="SIZE", help="memory to stay under, such as 8GB; each stage goes the fastest way that fits"
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='render once for each line, such as {"name": "star", "set": {"Prompt.prompt": "a red star"}}: models are '
        "loaded once, and the same command goes on where it was stopped",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="URL[,URL...]", help="render on running servers: ComfyUI, or vidgen serve")
    where.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="render --prompts on a Ray cluster; without an address on this machine's (extra: ray)",
    )
    parser.add_argument(
        "--ray-cpus", type=int, default=4, metavar="N", help="CPUs of each actor where there are no GPUs (default 4)"
    )
    parser.add_argument("--json", action="store_true", help="events as JSON on standard output; see docs/BATCH.md")


def _add_custom_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--custom-nodes",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a node pack of others, or a folder with packs, that needs nothing of ComfyUI; its code runs here",
    )


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="open ComfyUI's editor with these nodes in a browser, and answer its API",
        description="ComfyUI's frontend and API on this machine, without ComfyUI: http://127.0.0.1:8188",
    )
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one (default: 8188)")
    parser.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS", help="also for other machines; needs --token"
    )
    parser.add_argument("--token", help="a secret that every request must bring")
    parser.add_argument("--folder", type=Path, default=FILES, help="with input, output and user (default: ~/VidGen)")
    parser.add_argument("--open", action="store_true", help="open the browser")
    parser.add_argument("--api-only", action="store_true", help="without the page")
    _add_custom_nodes(parser)
    _add_device_and_models(parser)
    parser.set_defaults(command=_serve)


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_device_and_models(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="make one video on N GPUs (or N processes on the CPU); the result is the same",
    )
    parser.add_argument(
        "--parallel-method",
        default="auto",
        choices=("auto", "ulysses", "ring"),
        help="how the processes share attention: ulysses is faster, ring takes any number of heads (default auto)",
    )


def _add_device_and_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where to look for models, laid out as ComfyUI's models folder; also VIDGEN_MODELS",
    )


# --- render and generate --------------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> int:
    from .. import NODE_CLASS_MAPPINGS

    return _rendering(arguments, generate_prompt, NODE_CLASS_MAPPINGS)


def _render(arguments: argparse.Namespace) -> int:
    from .custom_nodes import load_packs, own_packs
    from .events import JsonEvents
    from .render import load_prompt, override

    def prompt_of(arguments: argparse.Namespace, classes: Mapping[str, type]) -> dict[str, Any]:
        return override(load_prompt(arguments.file, classes), classes, arguments.set)

    tell = JsonEvents(sys.stdout) if arguments.json else None
    try:
        if any(value is not None for value in (arguments.prompts, arguments.server, arguments.ray)):
            from .cli_batch import render_batch

            try:
                return render_batch(arguments, model_folders(arguments.models), tell)
            except Cancelled:
                sys.stderr.write("vidgen: stopped; the same command goes on with the prompts that are left\n")
                if tell is not None:
                    tell("stopped", {})
                return EXIT_STOPPED
        packs = load_packs(arguments.custom_nodes, own_packs())
        if arguments.member is None:  # and not once more by each process of a team
            packs.tell_problems()
        return _rendering(arguments, prompt_of, packs.classes, tell)
    except UserError as error:
        if tell is not None:
            tell("failed", {"error": str(error)})
        raise


def _rendering(
    arguments: argparse.Namespace,
    prompt_of: Callable[..., dict[str, Any]],
    classes: Mapping[str, type],
    tell: Tell | None = None,
) -> int:
    """Make the prompt, run it, and say where the videos are (standard output) or why there are none."""
    from .executor import NodeError
    from .render import Stopped, render

    prompt = prompt_of(arguments, classes)
    size = arguments.context_parallel
    if size != 1 and arguments.member is None:
        check_team(size, arguments.device)
        return run_team(partial(run_member, arguments.argv), size, arguments.parallel_method, arguments.stop)
    plan = _plan_within_budget(prompt, arguments)
    try:
        saved = render(
            prompt,
            classes,
            output=arguments.output,
            stop=arguments.stop,
            device=arguments.device,
            folders=model_folders(arguments.models),
            input_folder=getattr(arguments, "input", None),
            quiet=arguments.quiet,
            plan=plan,
            scratch=getattr(arguments, "scratch", None),
            member=arguments.member,
            tell=tell,
        )
    except Stopped as stopped:
        advice = _going_on(stopped.kept) or "nothing was begun that could be kept"
        sys.stderr.write(f"vidgen: stopped; {advice}\n")
        if tell is not None:
            tell("stopped", {"kept": stopped.kept})
        return EXIT_STOPPED
    except NodeError as error:
        if not isinstance(error.__cause__, UserError):
            raise
        sys.stderr.write(f"vidgen: {error}\n" + (f"Then {_going_on(error.kept)}.\n" if error.kept else ""))
        if tell is not None:
            tell("failed", {"error": str(error), "node": error.node_id})
        return EXIT_ERROR
    if tell is not None:
        tell("finished", {"files": saved})
        return 0
    for path in saved:
        sys.stdout.write(f"{path}\n")
    return 0


def _plan_within_budget(prompt: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """The plan of a render that has a budget, told to the user; SettingsError where nothing fits. None without one."""
    if arguments.budget is None:
        return None
    from ..vidgen_core.memory.place import parse_bytes
    from .plan import plan_that_fits
    from .render import check_device

    planned = plan_that_fits(
        prompt,
        budget_bytes=parse_bytes(arguments.budget),
        device=check_device(arguments.device),
        folders=model_folders(arguments.models),
    )
    if not arguments.quiet:
        sys.stderr.write("".join(f"{line}\n" for line in planned.lines()))
    return planned


def _plan(arguments: argparse.Namespace) -> int:
    """``vidgen plan``: 1 where the video does not fit."""
    import torch

    from ..vidgen_core.memory.host import default_device
    from ..vidgen_core.memory.place import parse_bytes
    from ..vidgen_core.memory.plan import calibrate, known_rates
    from .custom_nodes import own_packs
    from .plan import plan_dict, plan_prompt
    from .render import check_device, load_prompt, override

    device = torch.device(check_device(arguments.device) or default_device())
    if arguments.calibrate:
        calibrate(device)
    if arguments.file is None:
        if not arguments.calibrate:
            raise SettingsError("There is nothing to plan", expected="a workflow, or --calibrate")
        rates = {name: getattr(known_rates(device), name) for name in known_rates(device).__dataclass_fields__}
        sys.stdout.write(json.dumps(rates, indent=2) + "\n")
        return 0
    classes = own_packs().classes
    prompt = override(load_prompt(arguments.file, classes), classes, arguments.set)
    budget = None if arguments.budget is None else parse_bytes(arguments.budget)
    options = {"budget_bytes": budget, "device": str(device), "folders": model_folders(arguments.models)}
    if arguments.json:
        said = plan_dict(prompt, **options)
        sys.stdout.write(json.dumps(said, indent=2) + "\n")
        return 0 if said["fits"] else EXIT_ERROR
    planned, planner, wish = plan_prompt(prompt, **options)
    sys.stdout.write("".join(f"{line}\n" for line in planned.lines()))
    if not planned.fits:
        planner.check(wish, planned.budget_bytes)
    return 0


def _going_on(kept: Sequence[Path]) -> str:
    return f"the same command goes on from {', '.join(map(str, kept))}" if kept else ""


def generate_prompt(arguments: argparse.Namespace, classes: Mapping[str, type]) -> dict[str, Any]:
    """The shipped workflow from text, from an image or from a video, with the settings of the command line.

    Raises:
        UserError: before any weights are read.
    """
    from .render import node_of, shipped

    workflow = _workflow(arguments)
    prompt = shipped(workflow)
    loader = prompt[node_of(prompt, "VidGenLoadAll")]["inputs"]
    if arguments.model is not None:
        loader["model_folder"] = arguments.model
    if arguments.image is not None:
        loader["model_folder"] = _for_picture(loader["model_folder"], arguments.models)
    loader |= _memory(arguments)
    plan = _preflight(arguments, loader["model_folder"])
    shape = plan.shape
    size = {"width": shape.width_px, "height": shape.height_px}
    length = {"num_frames": shape.num_frames}
    changes = {
        ("VidGenEncodePrompt", "Prompt"): {"prompt": arguments.prompt},
        ("VidGenEncodePrompt", "Negative Prompt"): {"prompt": plan.negative},
        **{
            "hunyuan_t2v": {("VidGenEmptyLatent", None): size | length},
            "hunyuan_i2v": {
                ("VidGenLoadImage", None): {"image": arguments.image},
                ("VidGenImageToVideo", None): size | length | {"method": arguments.method},
            },
            "hunyuan_v2v": {
                ("VidGenLoadVideo", None): {"video": arguments.video, "max_frames": shape.num_frames},
                ("VidGenFitImages", None): size,
            },
        }[workflow],
        ("VidGenSampler", None): {
            **{
                name: getattr(arguments, name)
                for name in ("seed", "steps", "cfg", "guidance", "shift", "sampler", "schedule")
            },
            "denoise": _denoise(arguments),
        },
        ("VidGenSaveVideo", None): {
            "fps": plan.fps,
            "format": _format(arguments.output),
            "crf": arguments.crf,
        },
    }
    for (class_type, title), inputs in changes.items():
        node = prompt[node_of(prompt, class_type, title)]
        node["inputs"] |= {name: value for name, value in inputs.items() if value is not None}
        if class_type == "VidGenEncodePrompt" and shape.num_frames == 1:
            node["inputs"]["template"] = "image"
    if plan.interleave is not None:
        _show_image(prompt, plan)
    _add_loras(prompt, node_of(prompt, "VidGenSampler"), arguments.lora)
    if arguments.compile:
        _put_before(prompt, node_of(prompt, "VidGenSampler"), "VidGenCompile", "Compile", {"mode": "default"})
    if arguments.decode != "tiles":
        _decode_into_file(prompt, arguments.decode, arguments.decode_memory or 0.0)
    if arguments.attention is not None:
        _add_attention(prompt, node_of(prompt, "VidGenSampler"), classes["VidGenAttention"], arguments.attention)
    _add_cache(prompt, node_of(prompt, "VidGenSampler"), arguments)
    return prompt


BLACK = "vidgen-black.png"
"""an example; its size does not matter"""


def _show_image(prompt: dict[str, Any], plan: Plan) -> None:
    """The prompt is encoded with the image; the negative one, where it counts, with a black one as published."""
    from .render import node_of

    links = {"Prompt": [node_of(prompt, "VidGenLoadImage"), 0]}
    if plan.cfg != 1.0:
        node_id = _new_id(prompt)
        title = {"title": "Black Image"}
        prompt[node_id] = {"class_type": "VidGenLoadImage", "inputs": {"image": BLACK}, "_meta": title}
        links["Negative Prompt"] = [node_id, 0]
    for title, link in links.items():
        inputs = prompt[node_of(prompt, "VidGenEncodePrompt", title)]["inputs"]
        inputs |= {"image": link, "image_interleave": plan.interleave}


def _new_id(prompt: Mapping[str, Any]) -> str:
    return str(max(int(key) for key in prompt) + 1)


def _decode_into_file(prompt: dict[str, Any], method: str, memory_gb: float) -> None:
    """One node in the place of Decode and Save Video: frames go to the file as they are finished."""
    from .render import node_of

    decode = prompt.pop(node_of(prompt, "VidGenDecode"))
    save = prompt[node_of(prompt, "VidGenSaveVideo")]
    save["class_type"] = "VidGenDecodeSave"
    save["_meta"] = {"title": "Decode and Save Video"}
    del save["inputs"]["images"]
    save["inputs"] |= {"vae": decode["inputs"]["vae"], "latent": decode["inputs"]["latent"]}
    save["inputs"] |= {"method": method, "memory_gb": memory_gb}


def _add_attention(prompt: dict[str, Any], sampler: str, node: Any, backend: str) -> None:
    """A node before the sampler, with its own defaults besides the backend."""
    from .executor import input_specs

    defaults = {name: options["default"] for name, _, options, _ in input_specs(node) if "default" in options}
    _put_before(prompt, sampler, "VidGenAttention", "Attention", {**defaults, "backend": backend})


def _add_loras(prompt: dict[str, Any], sampler: str, loras: Sequence[str]) -> None:
    """A node for each LoRA between the loader and the sampler."""
    for text in loras:
        name, strength = parse_lora(text)
        widgets = {"lora_name": name, "strength": strength, "mode": "auto", "blocks": ""}
        _put_before(prompt, sampler, "VidGenApplyLora", "Apply LoRA", widgets)


def _add_cache(prompt: dict[str, Any], sampler: str, arguments: argparse.Namespace) -> None:
    """A step cache before the sampler, if one is wanted."""
    if arguments.cache is None:
        return
    cache = parse_cache(arguments.cache, arguments.curve)
    widgets = {
        "method": cache.method,
        "quality": arguments.cache.partition(":")[2] or CACHE_QUALITY,
        "threshold": cache.threshold,
        "max_skips": cache.max_skips,
        "start": cache.start,
        "end": cache.end,
        "curve": "" if cache.curve is None else cache.curve.to_json(),
    }
    _put_before(prompt, sampler, "VidGenStepCache", "Step Cache", widgets)


def _put_before(
    prompt: dict[str, Any], sampler: str, class_type: str, title: str, widgets: Mapping[str, object]
) -> None:
    """A node that changes the model, between the sampler and what its model came from."""
    inputs = prompt[sampler]["inputs"]
    node_id = _new_id(prompt)
    prompt[node_id] = {
        "class_type": class_type,
        "inputs": {"model": inputs["model"], **widgets},
        "_meta": {"title": title},
    }
    inputs["model"] = [node_id, 0]


def parse_cache(text: str, curve_file: Path | None) -> Any:
    """``"first_block:fast"`` -> the step cache; without a quality it is careful.

    Raises:
        UserError: an unknown method or quality, "off", or a curve that is missing or cannot be read.
    """
    from ..vidgen_core.caching import QUALITIES, MagnitudeCurve, StepCache

    method, _, quality = text.partition(":")
    curve = None
    if curve_file is not None:
        try:
            curve = MagnitudeCurve.from_json(curve_file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FileError("The curve cannot be read", given=curve_file, do=f"check the file ({error})") from error
    cache = StepCache.preset(method, quality or CACHE_QUALITY, curve=curve if method == "magcache" else None)
    if cache is None:
        raise SettingsError(
            "A step cache that is off is none",
            given=f"--cache {text}",
            expected=f"{method}:" + " or ".join(QUALITIES[1:]),
            do="leave --cache out",
        )
    return cache


def parse_lora(text: str) -> tuple[str, float]:
    """``"style.safetensors:0.8"`` -> (file, strength); without a number the strength is 1."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon and name else (text, 1.0)
    except ValueError:  # a colon of the path itself, such as that of a drive
        return text, 1.0


def _memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """The loader's widgets for --storage and --budget; SettingsError for what cannot be used."""
    from ..vidgen_core.memory.place import check_choice, parse_bytes

    chosen: dict[str, Any] = {}
    if arguments.storage is not None:
        check_choice(arguments.storage)
        chosen["storage"] = arguments.storage
    if arguments.budget is not None:
        chosen["budget_gb"] = parse_bytes(arguments.budget) / 1e9
    return chosen


def _workflow(arguments: argparse.Namespace) -> str:
    """Which shipped workflow does what is asked for."""
    if arguments.image is not None and arguments.video is not None:
        raise SettingsError(
            "A video is made from an image or from a video",
            given=f"--image {arguments.image} --video {arguments.video}",
            expected="one of the two",
        )
    if arguments.denoise is not None and arguments.video is None:
        raise SettingsError(
            "There is nothing to change", given=f"--denoise {arguments.denoise}", expected="--video FILE with it"
        )
    if arguments.image is not None:
        return "hunyuan_i2v"
    return "hunyuan_t2v" if arguments.video is None else "hunyuan_v2v"


def _for_picture(model: str, folders: Sequence[Path]) -> str:
    """The model, or of two networks in its folder the one that goes on from a picture."""
    from ..nodes.host import LocalNodeHost
    from ..vidgen_core.bundle import network_for_picture

    host = LocalNodeHost(folders=model_folders(folders))
    folder = host.find_model_folder(model)
    file = network_for_picture(folder) if folder.is_dir() else None
    if file is None:
        return model
    is_known = model in host.model_folders() and file.parent == folder
    return f"{model}/{file.name}" if is_known else str(file)


def _denoise(arguments: argparse.Namespace) -> float:
    if arguments.video is None:
        return 1.0
    return DENOISE if arguments.denoise is None else arguments.denoise


def _format(output: Path) -> str:
    """The choice of Save Video; .m4v and .mov are mp4 under another name."""
    ending = output.suffix.lower().removeprefix(".")
    return ending if ending in ("webm", "gif", "webp") else "mp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a command line comes to with a model's defaults."""

    shape: VideoShape
    fps: float | None
    negative: str
    cfg: float
    interleave: int | None
    """every how many-th token of the image stands in the prompt; None: the prompt is encoded without it"""


def _preflight(arguments: argparse.Namespace, model: str) -> Plan:
    """The plan, after checking every setting against the headers of the model's files."""
    from ..nodes.host import LocalNodeHost
    from ..vidgen_core.bundle import find_parts, sees_images
    from ..vidgen_core.generate import Sampling, check_prompts
    from ..vidgen_core.lora import check_strength
    from ..vidgen_core.media import check_writable
    from ..vidgen_core.model import check_lora, defaults_of
    from ..vidgen_core.nn.backends import AttentionChoice
    from ..vidgen_core.types import VideoShape

    check_prompts(arguments.prompt)
    check_writable(arguments.output)
    host = LocalNodeHost(folders=model_folders(arguments.models))
    headers, found = find_parts(host.find_model_folder(model))
    network, family = found["network"], found["network"].family
    defaults = defaults_of(headers["network"], network)
    width, height = parse_size(arguments.size) if arguments.size else (defaults.width_px, defaults.height_px)
    num_frames = defaults.num_frames if arguments.frames is None else arguments.frames
    shape = VideoShape(num_frames=num_frames, height_px=height, width_px=width)
    shape.check(family.grid(found["codec"].config), patch=family.patch(network.config))
    settings = Sampling(
        num_steps=arguments.steps,
        sampler=arguments.sampler,
        schedule=arguments.schedule,
        shift=arguments.shift,
        guidance=arguments.guidance,
        cfg=arguments.cfg,
        seed=arguments.seed,
        negative_prompt=arguments.negative,
        denoise=_denoise(arguments),
    ).resolved(defaults)
    settings.check(family.diffusion(network.config))
    if arguments.attention is not None:
        AttentionChoice(backend=arguments.attention).check()
    if arguments.cache is not None:
        parse_cache(arguments.cache, arguments.curve)
    for text in arguments.lora:
        name, strength = parse_lora(text)
        check_strength(strength)
        check_lora(host.find("lora", name), network)
    assert settings.negative_prompt is not None
    assert settings.cfg is not None
    config = _told(arguments, family, network.config)
    _check_inputs(arguments, host, family, config, shape)
    shown = arguments.image is not None and sees_images(headers, found)
    _check_decoding(arguments, family, found["codec"].config, shape)
    # A video that is changed keeps its own frame rate: the workflow links it.
    own_fps = None if arguments.video is not None else float(defaults.fps)
    return Plan(
        shape=shape,
        fps=own_fps if arguments.fps is None else arguments.fps,
        negative=settings.negative_prompt,
        cfg=settings.cfg,
        interleave=family.keyframes.interleave(config) if shown else None,
    )


def _told(arguments: argparse.Namespace, family: Any, config: Any) -> Any:
    """The network's config with the user's word on how it takes the image."""
    from ..vidgen_core.errors import unknown_name

    methods = family.keyframes.methods
    if arguments.method not in methods:
        raise unknown_name("method", arguments.method, methods)
    if arguments.method != "auto" and arguments.image is None:
        raise SettingsError("There is no image", given=f"--method {arguments.method}", expected="--image FILE with it")
    return methods[arguments.method](config)


def _check_inputs(arguments: argparse.Namespace, host: Any, family: Any, config: Any, shape: Any) -> None:
    """Raise UserError for an image or a video that cannot be read, or that this network cannot take."""
    from ..vidgen_core.keyframes import Keyframe, picture
    from ..vidgen_core.media import read_image

    keyframes = []
    if arguments.image is not None:
        image, _ = read_image(host.find_input(arguments.image))
        keyframes = [Keyframe(image=picture(image))]
    family.keyframes.check(config, keyframes, shape.num_frames)
    if arguments.video is not None:
        host.find_input(arguments.video)


def _check_decoding(arguments: argparse.Namespace, family: Any, config: Any, shape: Any) -> None:
    """Raise UserError for a folder that is none, or for memory in which this size cannot be decoded in any dtype."""
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise FileError("The folder for temporary files does not exist", given=arguments.scratch, do="create it")
    if arguments.decode_memory is None:
        return
    if arguments.decode == "tiles":
        raise SettingsError(
            "Tiles have no bound of memory", given=f"--decode-memory {arguments.decode_memory}", do="add --decode exact"
        )
    import torch

    from ..vidgen_core.bounded import exact, plan

    with torch.device("meta"):
        codec = family.codec(family.parts["codec"].build(config, {}).to(torch.bfloat16), config)
    budget = int(arguments.decode_memory * 1e9)
    spills = arguments.decode == "exact_disk"
    plan(exact(codec, budget).codec, "decode", shape, budget, spills=spills, in_time_order=True)


def parse_size(text: str) -> tuple[int, int]:
    """``"64x48"`` -> (width, height) in px."""
    width, _, height = text.lower().replace("*", "x").partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise SettingsError("The size cannot be read", given=text, expected="WIDTHxHEIGHT, such as 64x64") from None


def model_folders(given: Sequence[Path]) -> list[Path]:
    """Folders to look for models in: those of the command line, then those in VIDGEN_MODELS."""
    listed = os.environ.get("VIDGEN_MODELS", "")
    return [*given, *(Path(item) for item in listed.split(os.pathsep) if item)]


# --- serve ------------------------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "The server is not installed", expected="the package aiohttp", do='pip install "comfyui-vidgen[serve]"'
        ) from error
    from .render import check_device
    from .server.app import ServerSettings
    from .server.start import serve

    settings = ServerSettings(
        folder=arguments.folder.expanduser().resolve(),
        listen=arguments.listen,
        port=arguments.port,
        token=arguments.token,
        device=check_device(arguments.device),
        models=model_folders(arguments.models),
        custom_nodes=arguments.custom_nodes,
        has_page=not arguments.api_only,
    )
    serve(settings, say=lambda text: print(text, flush=True), is_opening=arguments.open)
    return 0


# --- inspect and doctor ---------------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    from .report import inspect_lines, inspection

    info = inspection(arguments.file)
    sys.stdout.write(json.dumps(info, indent=2) + "\n" if arguments.json else "\n".join(inspect_lines(info)) + "\n")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .report import diagnosis, doctor_lines

    info = diagnosis()
    sys.stdout.write(json.dumps(info, indent=2) + "\n" if arguments.json else "\n".join(doctor_lines(info)) + "\n")
    return EXIT_ERROR if info["problems"] else 0
