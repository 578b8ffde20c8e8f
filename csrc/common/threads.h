// Threads for the CPU ops. No Python here.
#pragma once

#include <atomic>
#include <cstdint>

namespace mmebm {

// Runs work(data) on up to `threads` threads at once, the caller's among them, and returns when all are done. It may be
// fewer threads, down to one: `work` has to take its share from a common counter until nothing is left.
void run_on_threads(int threads, void (*work)(void*), void* data);

template <class Body>
void on_threads(int threads, const Body& body) {
  run_on_threads(threads, [](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body));
}

// Calls body(i) for every i in [0, total), in parallel; the order is open.
template <class Body>
void for_each_tile(int64_t total, int threads, const Body& body) {
  if (threads <= 1 || total < 2) {
    for (int64_t i = 0; i < total; ++i) body(i);
    return;
  }
  // Several chunks a thread, so that a thread the machine keeps waiting does not keep the others waiting.
  const int64_t several = 8 * static_cast<int64_t>(threads), chunk = total < several ? 1 : total / several;
  std::atomic<int64_t> next{0};
  on_threads(threads < total ? threads : static_cast<int>(total), [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= total) return;
      const int64_t end = begin + chunk < total ? begin + chunk : total;
      for (int64_t i = begin; i < end; ++i) body(i);
    }
  });
}

// One piece of work after the other, each cut into pieces that whoever has time takes: one thread leads, and any number
// help, come and go, or never come. The leader takes pieces from the front and the others from the back, so that pieces
// of the same place tend to stay on one core. Nobody waits for a thread that has not taken a piece.
class Team {
 public:
  using Piece = void (*)(const void* body, int64_t piece, float* scratch);

  // Of the leader: body(piece, scratch) for every piece in [0, pieces); it returns when all are done. `scratch` is that
  // of the thread which runs the piece.
  template <class Body>
  void share(int64_t pieces, float* scratch, const Body& body) {
    run(pieces, scratch, [](const void* b, int64_t piece, float* s) { (*static_cast<const Body*>(b))(piece, s); }, &body);
  }
  int helpers() const;
  // Of a helper: takes pieces until the leader says that there will be no more, or until there was none for so long (a
  // millisecond or so) that it is of no use: then false.
  bool help(float* scratch);
  void close();
  bool closed() const;

 private:
  void run(int64_t pieces, float* scratch, Piece piece, const void* body);

  // The pieces that nobody has taken, first to end, and which work they are of, so that a late thread takes none of
  // another: work 32 bits, first and end 16 each.
  std::atomic<uint64_t> open_{0};
  std::atomic<int64_t> done_{0};  // by helpers
  std::atomic<int> helpers_{0};
  std::atomic<bool> closed_{false};
  Piece piece_ = nullptr;
  const void* body_ = nullptr;
};

}  // namespace mmebm
