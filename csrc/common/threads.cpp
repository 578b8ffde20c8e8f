// The threads are those of the OpenMP runtime that torch has already loaded, found by name and not linked: a pool of
// our own, or a second OpenMP runtime, would compete for the cores with torch's threads, which go on spinning for a
// while after each of torch's own parallel loops. GOMP_parallel is the stable entry of libgomp, and LLVM's libomp has
// it too.
//
// On a machine with more work than cores that runtime can wait a scheduler's time slice, ten milliseconds, for a thread
// that has a hundred microseconds of work. So parallel calls are timed: one that took twice as long as all its work
// took on one core makes the next ones run alone, for twenty times as long as it took itself, so that trying again
// costs a twentieth.
//
// Without that runtime, threads are started for each call. In a child of fork() there is one thread: the runtime's
// threads did not come along, and waiting for them would hang.
#include "common/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <sched.h>

#include <system_error>
#include <thread>
#include <vector>

namespace mmebm {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

bool forked = false;

const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel find_runtime() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

int64_t nanoseconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Until when calls run alone.
std::atomic<int64_t> alone_until{0};

struct Timed {
  void (*work)(void*);
  void* data;
  std::atomic<int64_t> spent{0};  // processor time of all threads
};

void run_timed(void* argument) {
  Timed& timed = *static_cast<Timed*>(argument);
  const int64_t begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  timed.work(timed.data);
  timed.spent.fetch_add(nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin, std::memory_order_relaxed);
}

void start_threads(int threads, void (*work)(void*), void* data) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, data);
  } catch (const std::system_error&) {
    // no more threads to be had: those that started and this one do it all
  }
  work(data);
  for (std::thread& other : others) other.join();
}

// While others finish: a short while of turns, and then the core goes to whoever needs it.
class Wait {
 public:
  bool long_enough() const { return turns_ > 32 * 1024; }
  void turn() {
    if (++turns_ % 1024 != 0) {
#if defined(__x86_64__) && defined(__GNUC__)
      __builtin_ia32_pause();
#endif
      return;
    }
    sched_yield();
  }

 private:
  int64_t turns_ = 0;
};

constexpr uint64_t END = 0xffff, FIRST = 16;  // bits of Team::open_

}  // namespace

int Team::helpers() const { return helpers_.load(std::memory_order_relaxed); }

bool Team::closed() const { return closed_.load(std::memory_order_acquire); }

void Team::close() { closed_.store(true, std::memory_order_release); }

void Team::run(int64_t pieces, float* scratch, Piece piece, const void* body) {
  if (pieces < 2 || pieces > static_cast<int64_t>(END)) {
    for (int64_t i = 0; i < pieces; ++i) piece(body, i, scratch);
    return;
  }
  piece_ = piece;
  body_ = body;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t work = (open_.load(std::memory_order_relaxed) >> 32) + 1;
  uint64_t open = work << 32 | static_cast<uint64_t>(pieces);
  open_.store(open, std::memory_order_release);
  int64_t own = 0;
  while ((open >> FIRST & END) < (open & END)) {
    const auto i = static_cast<int64_t>(open >> FIRST & END);
    if (!open_.compare_exchange_weak(open, open + (uint64_t{1} << FIRST), std::memory_order_relaxed)) continue;
    piece(body, i, scratch);
    ++own;
    open = open_.load(std::memory_order_relaxed);
  }
  for (Wait wait; done_.load(std::memory_order_acquire) < pieces - own;) wait.turn();
}

bool Team::help(float* scratch) {
  helpers_.fetch_add(1, std::memory_order_relaxed);
  for (Wait wait; !closed() && !wait.long_enough();) {
    uint64_t open = open_.load(std::memory_order_relaxed);
    if ((open >> FIRST & END) >= (open & END)) {
      wait.turn();
      continue;
    }
    // what the leader wrote before it opened the work is seen from here on, and stays until this piece is done
    if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
    piece_(body_, static_cast<int64_t>((open & END) - 1), scratch);
    done_.fetch_add(1, std::memory_order_release);
    wait = Wait();
  }
  helpers_.fetch_sub(1, std::memory_order_relaxed);
  return closed();
}

void run_on_threads(int threads, void (*work)(void*), void* data) {
  (void)registered;
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
  if (threads <= 1 || forked || begin < alone_until.load(std::memory_order_relaxed)) {
    work(data);
    return;
  }
  static const GompParallel parallel = find_runtime();
  Timed timed;
  timed.work = work;
  timed.data = data;
  if (parallel != nullptr) {
    parallel(run_timed, &timed, static_cast<unsigned>(threads), 0);
  } else {
    start_threads(threads, run_timed, &timed);
  }
  const int64_t end = nanoseconds(CLOCK_MONOTONIC), took = end - begin;
  if (took > 2 * timed.spent.load()) alone_until.store(end + 20 * took, std::memory_order_relaxed);
}

}  // namespace mmebm
