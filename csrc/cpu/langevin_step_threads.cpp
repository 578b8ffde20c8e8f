// The threads are those of the OpenMP runtime that torch has already loaded, found by name and not linked: a pool of our own,
// or a second OpenMP runtime, would compete for the cores with torch's threads, which go on spinning for a while
// after each of torch's own parallel loops. GOMP_parallel is the stable entry of libgomp, and LLVM's libomp has it too.
//
// Without it, threads are started for each call. In a child of fork() there is one thread: the runtime's threads did not
// come along, and waiting for them would hang.
#include "langevin_step_threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

namespace mmebm {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

bool forked = false;

const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel find_runtime() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

}  // namespace

void run_on_threads(int threads, void (*work)(void*), void* data) {
  (void)registered;
  if (threads <= 1 || forked) {
    work(data);
    return;
  }
  static const GompParallel parallel = find_runtime();
  if (parallel != nullptr) {
    parallel(work, data, static_cast<unsigned>(threads), 0);
    return;
  }
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

}  // namespace mmebm
