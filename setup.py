"""Packages and where they lie; the rest is in pyproject.toml."""

from setuptools import setup

# triton_kernels/ is installed inside fastgpt: a top-level package of that name belongs to the Triton project.
setup(
    packages=["fastgpt", "fastgpt.ops", "fastgpt.triton_kernels"],
    package_dir={"fastgpt": "fastgpt", "fastgpt.triton_kernels": "triton_kernels"},
)
