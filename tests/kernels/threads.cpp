// decode.cu by threads of the CPU (threads.hpp): a block is K of them.
// SOURCE is the kernel's file with its shared memory declared as `raw = RAW`.
#include "threads.hpp"

#include SOURCE

extern "C" int arguments_bytes() { return sizeof(StepArguments); }
extern "C" void launch(const StepArguments* a, int blocks) {
  run_blocks([=] { gka_step(*a); }, blocks, 1, K, sizeof(Shared));
}
