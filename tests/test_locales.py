"""The texts for ComfyUI's translations: English is what the classes say, and every other language says all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import vidgen
from vidgen.headless import locales
from vidgen.headless.locales import FOLDER, differences, english, flat, read

CHINESE = re.compile(r"[\u4e00-\u9fff]")
COMPILED = re.compile(r"[@{}|%]")
"""what vue-i18n reads as syntax in names and descriptions"""


def from_the_classes() -> locales.Texts:
    return english(vidgen.NODE_CLASS_MAPPINGS, vidgen.NODE_DISPLAY_NAME_MAPPINGS)


def test_english_is_what_the_classes_say() -> None:
    advice = "run `python -m vidgen.headless.locales`, which writes the English file anew"
    assert read("en") == from_the_classes(), advice


@pytest.mark.parametrize("language", sorted(path.name for path in FOLDER.iterdir() if path.name != "en"))
def test_a_translation_has_every_text_and_no_other(language: str) -> None:
    found = differences(from_the_classes(), read(language))
    assert not found, f"locales/{language}/nodeDefs.json:\n" + "\n".join(found)


def test_nothing_is_left_in_english() -> None:
    """Names of files, nodes and settings may stand in a Chinese sentence, but not without one."""
    own = dict(flat(from_the_classes()))
    left = [key for key, text in flat(read("zh")) if not CHINESE.search(text) or text == own.get(key)]
    assert not left


@pytest.mark.parametrize("language", sorted(path.name for path in FOLDER.iterdir()))
def test_compiled_texts_have_no_syntax_in_them(language: str) -> None:
    texts = dict(flat(read(language)))
    assert not [key for key, text in texts.items() if not key.endswith(".tooltip") and COMPILED.search(text)]
    assert not [key for key, text in texts.items() if text != text.strip() or not text]


def test_what_is_missing_is_named() -> None:
    wanted = {"A": {"display_name": "a", "inputs": {"x": {"name": "x", "tooltip": "t"}}}}
    given = {"A": {"display_name": "b", "inputs": {"y": {"name": "y"}}}}
    lines = ['missing: A.inputs.x.name = "x"', 'missing: A.inputs.x.tooltip = "t"', "of no use: A.inputs.y.name"]
    assert differences(wanted, given) == lines
    assert differences(wanted, wanted) == []


def test_the_command_writes_english_and_lists_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for language in ("en", "zh"):
        (tmp_path / language).mkdir()
    zh = read("zh")
    del zh["VidGenDecode"]["inputs"]["vae"]
    (tmp_path / "zh" / "nodeDefs.json").write_text(json.dumps(zh), encoding="utf-8")
    monkeypatch.setattr(locales, "FOLDER", tmp_path)
    assert locales.main() == 1
    assert (tmp_path / "en" / "nodeDefs.json").read_bytes() == (FOLDER / "en" / "nodeDefs.json").read_bytes()
    assert "zh missing: VidGenDecode.inputs.vae.tooltip" in capsys.readouterr().out
