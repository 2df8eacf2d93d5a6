"""Triton source of FastGPT's kernels, installed as fastgpt.triton_kernels."""
