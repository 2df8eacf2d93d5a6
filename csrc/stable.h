// One name for the check of an error code in every torch from 2.11 on. The sources use STABLE_TORCH_ERROR_CODE_CHECK,
// whose message says more. torch 2.11 does not have it, and there TORCH_ERROR_CODE_CHECK takes its place.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
