// The table of the row kernels of one instruction set. Each kernels_*.cpp includes this file once, for its own set.
//
// The table must be a constant. Code that fills it at run time would be compiled for that instruction set, and
// would run on processors that do not have it.
#pragma once

#include "activation_rows.h"
#include "adamw_rows.h"
#include "attention_rows.h"
#include "cross_entropy_rows.h"
#include "decode_rows.h"
#include "embedding_rows.h"
#include "indices.h"
#include "layer_norm_rows.h"
#include "linear_rows.h"
#include "matmul_tiles.h"

namespace fastgpt {
namespace {

constexpr Kernels table(const char* name) {
  return {
      name,
      count_indices,
      cross_entropy_scratch,
      {cross_entropy_rows<float>, cross_entropy_rows<BFloat16>, cross_entropy_rows<Float16>},
      {gather_rows<float>, gather_rows<BFloat16>, gather_rows<Float16>},
      {sum_rows<float>, sum_rows<BFloat16>, sum_rows<Float16>},
      {accumulate_rows<float>, accumulate_rows<BFloat16>, accumulate_rows<Float16>},
      layer_norm_rows,
      layer_norm_gradients,
      {activation_rows<float>, activation_rows<BFloat16>, activation_rows<Float16>},
      {linear_rows<float, float>, linear_rows<BFloat16, BFloat16>, linear_rows<Float16, Float16>},
      {linear_rows<float, float>, linear_rows<BFloat16, float>, linear_rows<Float16, float>},
      {norm_floats<float>, norm_floats<BFloat16>, norm_floats<Float16>},
      {attend_newest<float>, attend_newest<BFloat16>, attend_newest<Float16>},
      {widen<float>, widen<BFloat16>, widen<Float16>},
      {narrow<float>, narrow<BFloat16>, narrow<Float16>},
      column_sums,
      adamw,
      sum_of_squares,
      matmul_workspace,
      matmul,
      attention_tasks,
      attention_workspace,
      {attention<float>, attention<BFloat16>, attention<Float16>},
      attention_backward_workspace,
      {attention_backward<float>, attention_backward<BFloat16>, attention_backward<Float16>},
  };
}

}  // namespace
}  // namespace fastgpt
