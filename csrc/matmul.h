// The matrix product on the CPU in float32, for linear and linear_cross_entropy.
//
// PyTorch's wheels call Intel's MKL, which is hard to beat on Intel's processors. On AMD's it was
// measured to be slower than this product, on a newer one half as fast, so fastgpt/ops/native.py takes this one there.
#pragma once

#include "tensor.h"

namespace fastgpt {

// c = a b + bias or c += a b, divided among threads. The same bits for any number of them, because each sum over the
// depth is made by one thread.
void multiply(const Matmul& whole);

// a (M, K), b (K, N), any strides; out (M, N) with contiguous rows, which is added to where `accumulate`.
void matmul(const Tensor& a, const Tensor& b, Tensor out, bool accumulate);

}  // namespace fastgpt
