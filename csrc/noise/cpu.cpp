// Threads and the choice of instruction set; the loops themselves are in cpu_kernel.cpp.
#include "noise/cpu.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace mmebm {
namespace {

// Starting a thread costs some 20 us, about the time of this many blocks on one AVX2 core.
constexpr int64_t MIN_BLOCKS_PER_THREAD = 1 << 13;

// Calls work(begin, end) for consecutive parts of [0, total). The noise does not depend on the cut.
template <class Work>
void split(int64_t total, int threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total / MIN_BLOCKS_PER_THREAD));
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) {
    others.emplace_back(work, total * part / parts, total * (part + 1) / parts);
  }
  work(int64_t{0}, total / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace

void philox_words_cpu(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at, int threads, Isa isa) {
  if (chains == 0 || blocks == 0) return;
  const NoiseLoops& with = noise_loops(isa);
  split(chains * blocks, threads, [&](int64_t begin, int64_t end) { with.words(out, blocks, begin, end, at); });
}

void normal_cpu(float* out, int64_t chains, int64_t numel, NoiseAt at, int threads, Isa isa) {
  if (chains == 0 || numel == 0) return;
  const NoiseLoops& with = noise_loops(isa);
  const int64_t total = chains * ((numel + 3) / 4);
  split(total, threads, [&](int64_t begin, int64_t end) { with.normals(out, numel, begin, end, at); });
}

void box_muller_cpu(const uint32_t* words, float* out, int64_t blocks, Isa isa) {
  noise_loops(isa).box_muller(words, out, blocks);
}

}  // namespace mmebm
