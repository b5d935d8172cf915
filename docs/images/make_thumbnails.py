"""Draw the picture of each shipped workflow for the templates browser: a frame of what it renders, or of a workflow
that does the like where it needs files that are not in the box or makes no video.

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
LIKE = {
    "_i2v": "hunyuan_i2v",
    "_v2v": "hunyuan_v2v",
    "_lora": "hunyuan_lora_stack",
    "_interpolation": "hunyuan_keyframes",
}
"""end of a name -> which workflow does the like"""
SIDE_PX = 320


def main(names: list[str]) -> None:
    for name in names or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")):
        with tempfile.TemporaryDirectory() as folder:
            saved: list[Path] = []
            with contextlib.suppress(NodeError, PromptError):
                saved = vidgen.render(name, output=folder)
            like = next((other for end, other in LIKE.items() if name.endswith(end)), PLAIN)
            frames, _ = read_video((saved or vidgen.render(like, output=folder))[-1])
        frame = Image.fromarray(frames[len(frames) // 2])
        frame.thumbnail((SIDE_PX, SIDE_PX))
        scale = SIDE_PX / max(frame.size)
        size = (round(frame.width * scale), round(frame.height * scale))
        frame.resize(size, Image.Resampling.BICUBIC).save(WORKFLOWS / f"{name}.jpg", quality=88)
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
