"""Two threads that load text encoders at once both get them."""

from __future__ import annotations

import subprocess
import sys

TWO_AT_ONCE = """
import threading
from vidgen.vidgen_core.text.library import importing
found, ready = [], threading.Barrier(2)

def load(name):
    ready.wait()
    with importing:
        import transformers
        found.append(getattr(transformers, name))

threads = [threading.Thread(target=load, args=(name,)) for name in ("LlamaConfig", "CLIPTextConfig")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found))
"""


def test_two_threads_find_whole_modules() -> None:
    said = subprocess.run([sys.executable, "-c", TWO_AT_ONCE], capture_output=True, text=True, check=False)
    assert said.stdout.strip() == "2", said.stderr


def test_every_import_of_transformers_goes_through_the_door() -> None:
    from pathlib import Path

    import vidgen

    root = Path(vidgen.__file__).resolve().parent
    for folder in ("vidgen_core", "nodes", "headless"):
        for path in (root / folder).rglob("*.py"):
            lines = path.read_text("utf-8").splitlines()
            for number, line in enumerate(lines):
                if line.strip().startswith(("from transformers", "import transformers")):
                    assert lines[number - 1].strip() == "with importing:", f"{path}:{number + 1}"
