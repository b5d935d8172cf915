"""Draw the picture of each shipped workflow for the templates browser: a frame of what it renders, or of the plain one
where it needs files that are not in the box or makes no video.

``python docs/images/make_thumbnails.py [NAME ...]``
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from PIL import Image

import vidgen
from vidgen.headless.executor import NodeError, PromptError
from vidgen.vidgen_core.media import read_video

WORKFLOWS = Path(vidgen.__file__).resolve().parent / "workflows"
PLAIN = "hunyuan_t2v"
SIDE_PX = 320


def main(names: list[str]) -> None:
    for name in names or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")):
        with tempfile.TemporaryDirectory() as folder:
            saved: list[Path] = []
            with contextlib.suppress(NodeError, PromptError):
                saved = vidgen.render(name, output=folder)
            frames, _ = read_video((saved or vidgen.render(PLAIN, output=folder))[-1])
        frame = Image.fromarray(frames[len(frames) // 2])
        frame.thumbnail((SIDE_PX, SIDE_PX))
        scale = SIDE_PX / max(frame.size)
        size = (round(frame.width * scale), round(frame.height * scale))
        frame.resize(size, Image.Resampling.BICUBIC).save(WORKFLOWS / f"{name}.jpg", quality=88)
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
