"""Studies: questions of the kind "what does this part do?", each answered by a measurement on the shipped model.

A study is a module with

    Settings                its options, of studies/settings.py; Settings.QUICK is what --quick sets
    measure(settings)       the measurement: plain data, which results.json keeps
    show(results, page)     the table, the pictures and what was measured in words, from nothing but those data

so whatever is printed or committed can be made again from results.json, and no sentence can claim what no number says.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

STUDIES = {
    "depth": "What do initialisation, normalisation and residual connections each do to a deep network?",
    "normalisation": "Layer norm or batch norm: what differs between training and inference?",
    "parallelism": "How do transformers and recurrent networks compare when it comes to training?",
    "attention": "What does each attention head look at?",
    "embeddings": "Which tokens does a model hold to be alike?",
    "learning-rate": "What does the learning rate do, and where does training diverge?",
}


def load(name: str) -> ModuleType:
    """The module of the study called `name`, imported when it is wanted."""
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)


def run(name: str, settings: Any) -> Path:
    """Measure; write results.json, report.html and the pictures; print what was found. Returns the report's path."""
    from ..report import pyplot
    from .experiment import recorded, study_facts
    from .page import Page

    pyplot()  # what is missing is said now, not after minutes of measuring
    out = Path(settings.out or f"runs/study-{name}")
    _check_folder(out)
    results = {"study": name, **study_facts(settings.device), "settings": recorded(settings)}
    began = time.perf_counter()
    results |= load(name).measure(settings)
    results["seconds"] = round(time.perf_counter() - began, 1)
    page = Page(write_results(out, results))
    print(page.text(), end="\n\n")
    report = page.write(out)
    print(f"{report}, {results['seconds']:.0f} s")
    return report


def write_results(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write out/results.json, a list of numbers on one line; returns the results as a reader of the file gets them."""
    from ..files import atomic_path

    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    # A line break is never inside a JSON string.
    text = re.sub(r"\[\n([-+.,\deE\s]+)\n\s*\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to before anything is measured."""
    from .experiment import StudyError

    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StudyError(f"--out {out}: cannot be written: {error.strerror or error}") from None
