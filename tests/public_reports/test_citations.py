"""What the files of this folder are, and a check that each test cites the report it comes from.

Users of neighbouring projects reported these errors in issues and pull requests on GitHub. A test's docstring cites
them as owner/repository#number and says in one line what went wrong; the inputs are our own. The test asserts the
right value: numbers are compared with the formulas of `fastgpt.ops.reference` in float64. There is a file for each
kind of report.
"""

import ast
import re
from pathlib import Path

CITATION = r"[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*: "
FILES = sorted(file for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__))


def test_every_test_names_its_report():
    """A test without a report, or a report without a number, is a slip."""
    for file in FILES:
        module = ast.parse(file.read_text(encoding="utf-8"))
        tests = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert tests, f"{file.name} has no tests"
        for test in tests:
            assert re.match(CITATION, ast.get_docstring(test) or ""), f"{file.name}: {test.name}"
