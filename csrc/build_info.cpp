// fastgpt._build_info: how the extension was built, and which vector instructions this processor has. It does not need
// libtorch, so that Python can ask how the extension was built where the extension itself cannot be loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

namespace {

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) found.emplace_back("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) found.emplace_back("avx512vl");
#elif defined(__aarch64__)
  found.emplace_back("neon");
#endif
  return found;
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", FASTGPT_COMPILER},
      {"flags", FASTGPT_FLAGS},
      {"torch", FASTGPT_TORCH},
      {"cuda", FASTGPT_CUDA_VERSION},
      {"cuda_architectures", FASTGPT_CUDA_ARCHITECTURES},
      {"source_hash", FASTGPT_SOURCE_HASH},
  };
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How fastgpt's compiled extension was built.";
  m.def("build_info", &build_info, "Compiler, flags, torch and CUDA it was built with; a hash of its sources.");
  m.def("cpu_features", &cpu_features, "The vector instructions found on this processor.");
}
