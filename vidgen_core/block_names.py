"""Names of blocks as a user writes them: paths with ``*`` and ranges, such as ``double_blocks.0-9``."""

from __future__ import annotations

import fnmatch
import re


def fits(pattern: str, module: str) -> bool:
    """Whether the pattern's path is the begin of the module's, component by component; ``double`` may stand for
    ``double_blocks``."""
    wanted, given = pattern.split("."), module.split(".")
    if len(wanted) > len(given):
        return False
    return all(
        _fits_component(want, have) or (index == 0 and have == f"{want}_blocks")
        for index, (want, have) in enumerate(zip(wanted, given, strict=False))
    )


def _fits_component(pattern: str, name: str) -> bool:
    if (span := re.fullmatch(r"(\d+)-(\d+)", pattern)) and name.isdigit():
        return int(span[1]) <= int(name) <= int(span[2])
    return fnmatch.fnmatchcase(name, pattern)
