#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// FASTGPT_CHECK(condition, parts of a message...) throws std::runtime_error where the condition does not hold; Python
// shows it as a RuntimeError with the message.
//
// STD_TORCH_CHECK does the same, but writes the message by std::ostringstream. Where a compiler links its C++ library
// statically, there are two of them in a process beside PyTorch's, and a stream ended the process instead.
namespace fastgpt {

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text_of(parts)));
}

}  // namespace fastgpt

#define FASTGPT_CHECK(condition, ...)             \
  do {                                            \
    if (!(condition)) fastgpt::fail(__VA_ARGS__); \
  } while (false)
