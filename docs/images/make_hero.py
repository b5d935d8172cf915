"""Draw the picture that opens the README: eight clips of the bundled model in a grid, each over its prompt.

``python docs/images/make_hero.py --seed 8``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vidgen.vidgen_core.generate import Sampling, generate, load_bundle
from vidgen.vidgen_core.media import images_to_frames, video_to_images

PROMPTS = (
    "a red star grows on a blue background",
    "a small pink heart bounces, the camera zooms in",
    "a large yellow circle moves to the right",
    "a green square shrinks, the camera pans left",
    "a purple cross drifts down on a dotted white background",
    "two orange triangles move up",
    "a cyan heart grows on a black background",
    "a blue star moves down and left, the camera zooms out",
)
COLUMNS = 4
TILE_PX = 192  # side of a clip in the picture
CAPTION_PX = 34  # height of the two lines under a clip
GAP_PX = 12
PAPER, INK = (24, 25, 28), (226, 226, 222)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text`` in as many lines as the width of a clip asks for."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= TILE_PX else [*lines, word]
    return "\n".join(lines)


def draw_frame(clips: list[Image.Image], prompts: tuple[str, ...]) -> Image.Image:
    """One frame of the grid from one frame of each clip."""
    rows = -(-len(clips) // COLUMNS)
    step = TILE_PX + GAP_PX, TILE_PX + CAPTION_PX + GAP_PX
    picture = Image.new("RGB", (COLUMNS * step[0] + GAP_PX, rows * step[1] + GAP_PX), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for index, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        left, top = GAP_PX + index % COLUMNS * step[0], GAP_PX + index // COLUMNS * step[1]
        picture.paste(clip.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC), (left, top))
        pen.multiline_text((left, top + TILE_PX + 4), wrapped(prompt, font), fill=INK, font=font, spacing=2)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a bundled name or a folder; the first bundled model by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hero.webp"))
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.model)
    videos = generate(bundle, PROMPTS, settings=Sampling(seed=arguments.seed))
    clips = [[Image.fromarray(frame) for frame in images_to_frames(video_to_images(one))] for one in videos.split(1)]
    frames = [draw_frame(list(moment), PROMPTS) for moment in zip(*clips, strict=True)]
    duration_ms = round(1000 / bundle.model.defaults.fps)
    frames[0].save(
        arguments.output, save_all=True, append_images=frames[1:], duration=duration_ms, loop=0, quality=85, method=6
    )


if __name__ == "__main__":
    main()
