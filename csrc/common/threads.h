// Threads for the CPU ops. No Python here.
#pragma once

#include <atomic>
#include <cstdint>

namespace mmebm {

// Runs work(data) on up to `threads` threads at once, the caller's among them, and returns when all are done. It may be
// fewer threads, down to one: `work` has to take its share from a common counter until nothing is left.
void run_on_threads(int threads, void (*work)(void*), void* data);

// Calls body(i) for every i in [0, total), in parallel; the order is open.
template <class Body>
void for_each_tile(int64_t total, int threads, const Body& body) {
  if (threads <= 1 || total < 2) {
    for (int64_t i = 0; i < total; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t total, chunk;
    const Body* body;
  };
  // Several chunks a thread, so that a thread the machine keeps waiting does not keep the others waiting.
  const int64_t chunk = total / (8 * static_cast<int64_t>(threads));
  Shared shared;
  shared.total = total;
  shared.chunk = chunk > 0 ? chunk : 1;
  shared.body = &body;
  run_on_threads(threads < total ? threads : static_cast<int>(total), [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    for (;;) {
      const int64_t begin = s.next.fetch_add(s.chunk, std::memory_order_relaxed);
      if (begin >= s.total) return;
      const int64_t end = begin + s.chunk < s.total ? begin + s.chunk : s.total;
      for (int64_t i = begin; i < end; ++i) (*s.body)(i);
    }
  }, &shared);
}

}  // namespace mmebm
