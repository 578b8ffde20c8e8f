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

}  // namespace

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
