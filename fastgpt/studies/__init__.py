"""Studies: questions such as "what does this part of the model do?", each answered by a measurement.

studies/settings.py lists the studies with their options. Each is a module of the same name with two functions:

    measure(settings)       measures, and returns plain data, which results.json keeps
    show(results, page)     writes the tables, pictures and sentences from these data alone

So everything that is printed or committed can be made again from results.json, and every sentence follows from numbers.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import atomic_path, make_output_folder


def load(name: str) -> ModuleType:
    """The module of the study called `name`. It needs PyTorch, so it is imported only when its study is used."""
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)


def run(name: str, settings: Any) -> Path:
    """Measure, write results.json, report.html and the pictures, and print the tables; returns the report's path."""
    from ..plots import need_matplotlib
    from .experiment import StudyError, recorded, study_facts
    from .page import Page, duration, terminal_width

    need_matplotlib()  # fails here if it is missing, and not after minutes of measuring
    out = Path(settings.out or f"runs/study-{name}")
    if (out / "results.json").exists():
        raise StudyError(f"{out}: already holds a report; give another --out, or remove it")
    make_output_folder(out)
    results = {"study": name, **study_facts(settings.device), "settings": recorded(settings)}
    began = time.perf_counter()
    results |= load(name).measure(settings)
    results["seconds"] = round(time.perf_counter() - began, 1)
    page = Page(write_results(out, results))
    print("\n" + page.text(terminal_width()), end="\n\n")
    report = page.write(out)
    print(f"{report}: {duration(results['seconds'])} of measuring")
    return report


def write_results(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write out/results.json, each list of numbers on one line; returns the results as they are read from the file."""
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    # A line break is never inside a JSON string.
    text = re.sub(r"\[\n([-+.,\deE\s]+)\n\s*\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)
