"""csrc/philox.h draws the masks of fastgpt/ops/dropout.py bit for bit, with every instruction set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt.ops.dropout import drop_threshold, philox_4x32
from fastgpt.ops.native import load

HERE = Path(__file__).parent
FLAGS = {
    "avx512": "-DFASTGPT_LANES=16 -DFASTGPT_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
    "avx2": "-DFASTGPT_LANES=8 -DFASTGPT_AVX2 -mavx2 -mfma -mf16c",
    "generic": "-DFASTGPT_LANES=4",
}
CALLS = [  # seed, row, column, probability
    (0, 0, 0, 0.0),
    (1234, 7, 32, 0.2),
    (2**64 - 3, 2**32 + 5, 64, 0.5),
    (2**40 + 17, 2**33 - 1, 2**33 + 4, 0.9),
    (5, 1, 4, 1.0 - 2.0**-40),
    (5, 1, 4, 2.0**-32),  # half a word: rounded to even
    (5, 1, 4, 3 * 2.0**-32),
]


@pytest.mark.parametrize("name", FLAGS)
def test_words_and_mask(name: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    widest = load("cpu").instruction_set()
    if list(FLAGS).index(name) < list(FLAGS).index(widest):
        pytest.skip(f"no {name} here")
    program = tmp_path / "philox"
    options = ["-std=c++17", "-O1", *FLAGS[name].split(), f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([compiler, *options, HERE / "philox.cpp", "-o", program], check=True)
    for seed, row, column, p in CALLS:
        printed = subprocess.run(
            [program, *map(str, (seed, row, column)), repr(p)], capture_output=True, text=True, check=True
        )
        lines = [line.split() for line in printed.stdout.splitlines()]
        expected = []
        for group in range(column // 4, column // 4 + len(lines) // 4):
            counter = (group, row & 0xFFFFFFFF, row >> 32, 0)
            expected += philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        assert len(lines) >= 8 and [int(word) for word, _ in lines] == expected
        assert [kept == "-1" for _, kept in lines] == [word >> 1 >= drop_threshold(p) for word in expected]
