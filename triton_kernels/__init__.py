"""FastGPT's Triton kernels, installed as fastgpt.triton_kernels. attention.py and layer_norm.py launch them."""
