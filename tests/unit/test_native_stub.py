"""The typed stub and the compiled module have the same names, so that mypy checks against what is there."""

from __future__ import annotations

import re
from pathlib import Path

from dmh.native import lib

STUB = Path(__file__).parents[2] / "dmh" / "native" / "_dmh.pyi"


def test_the_stub_names_what_the_module_has() -> None:
    text = STUB.read_text()
    named = set(re.findall(r"def (dmh_\w+)", text)) | set(re.findall(r"^    (DMH_\w+): int", text, re.M))
    assert named == {name for name in dir(lib) if name.lower().startswith("dmh_")}
