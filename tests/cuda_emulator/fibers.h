// Fibers: functions with stacks of their own that take turns in one thread of the CPU. A fiber runs until it gives way.
//
// On x86-64 a switch saves the registers that a call preserves, and nothing else. ucontext, which other processors use,
// also asks the operating system for the signal mask at every switch, and takes about ten times as long.
//
// Both sanitizers must know of a switch. AddressSanitizer is told which stack is in use. ThreadSanitizer takes each
// fiber for a thread while it runs code of a kernel, and everything else, wherever it is called, for one more thread.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define IF_ASAN(...) __VA_ARGS__
#else
#define IF_ASAN(...)
#endif
#if defined(EMULATOR_TSAN)  // this file itself is compiled without -fsanitize=thread: it has no races to look for
#include <sanitizer/tsan_interface.h>
#define IF_TSAN(...) __VA_ARGS__
#else
#define IF_TSAN(...)
#endif

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stacks(void** from, void* to);
asm(R"(
.text
.type emulator_switch_stacks, @function
.hidden emulator_switch_stacks
.globl emulator_switch_stacks
emulator_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch_stacks, .-emulator_switch_stacks
)");

namespace emulator {

struct Context {
  void* stack_pointer;

  void begin(char* stack, size_t size, void (*entry)()) {
    // What the first switch finds: six registers, the address that it returns to, and a word that keeps the alignment.
    void** top = reinterpret_cast<void**>(stack + size) - 2;
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { emulator_switch_stacks(&stack_pointer, other.stack_pointer); }
};

}  // namespace emulator
#else
#include <ucontext.h>

namespace emulator {

struct Context {
  ucontext_t registers;

  void begin(char* stack, size_t size, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = size;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&registers, &other.registers); }
};

}  // namespace emulator
#endif

namespace emulator {

// The thread of the CPU that runs the fibers, while it runs none of them.
struct Scheduler {
  Context context;
  IF_ASAN(const void* stack; size_t stack_size; void* asan;)
  IF_TSAN(void* tsan;)
};
inline Scheduler scheduler;

class Fiber {
 public:
  explicit Fiber(void (*entry)()) : entry_(entry) {
    void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // a stack that is too short is noticed
    IF_TSAN(tsan_ = __tsan_create_fiber(0);)
    restart();
  }
  Fiber(const Fiber&) = delete;

  // Drops what the fiber was doing: its entry is called at the next turn.
  void restart() {
    IF_ASAN(__asan_unpoison_memory_region(stack_, STACK); asan_ = nullptr;)
    context_.begin(stack_, STACK, entry_);
  }

  // Called by the scheduler: returns when the fiber gives way.
  void take_turn() {
    IF_ASAN(__sanitizer_start_switch_fiber(&scheduler.asan, stack_, STACK);)
    scheduler.context.switch_to(context_);
    IF_ASAN(__sanitizer_finish_switch_fiber(scheduler.asan, nullptr, nullptr);)
  }

  // Called by the fiber: returns at its next turn.
  void give_way() {
    IF_ASAN(__sanitizer_start_switch_fiber(&asan_, scheduler.stack, scheduler.stack_size);)
    context_.switch_to(scheduler.context);
    entered();
  }

  // The entry calls it first.
  void entered() { IF_ASAN(__sanitizer_finish_switch_fiber(asan_, &scheduler.stack, &scheduler.stack_size);) }

  IF_TSAN(void* tsan() const { return tsan_; })

 private:
  static constexpr size_t STACK = 256 << 10;

  void (*entry_)();
  char* stack_;
  Context context_;
  IF_ASAN(void* asan_ = nullptr;)
  IF_TSAN(void* tsan_;)
};

}  // namespace emulator
