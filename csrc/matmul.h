// out (+)= a b on the CPU in float32, for linear_cross_entropy.
//
// PyTorch's wheels call Intel's MKL, which is hard to beat on Intel's processors; on AMD's it leaves a tenth to a fifth of
// the peak, most at the shape of the head: few rows, a long vocabulary. There this product takes its place, see fastgpt/ops/native.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// a (M, K), b (K, N), any strides; out (M, N) with contiguous rows, which is added to where `accumulate`. The same bits
// for any number of threads: each has rows or columns of its own, and the depth is never shared out.
void matmul(const Tensor& a, const Tensor& b, Tensor out, bool accumulate);

}  // namespace fastgpt
