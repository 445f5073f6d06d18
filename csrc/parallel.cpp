#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace octavo {
namespace {

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Job {
  Body body;
  void* context;
  int ranges;
  std::atomic<int> workers{0};
  std::atomic<int64_t> first_done{0};  // when the first worker found no more tasks
  // Tasks follow each other in memory. Each worker takes those of a range of its own in order, so that what it reads ahead at
  // the end of one is the start of its next, and then helps with the ranges of others.
  static constexpr int kRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  } range[kRanges];

  Job(Body body, void* context, int64_t tasks, int threads)
      : body(body), context(context), ranges(threads < 1 ? 1 : threads < kRanges ? threads : kRanges) {
    for (int r = 0; r < ranges; r++) {
      range[r].next.store(tasks * r / ranges, std::memory_order_relaxed);
      range[r].end = tasks * (r + 1) / ranges;
    }
  }

  void work() {
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (int i = 0; i < ranges; i++) {
      Range& r = range[(worker + i) % ranges];
      for (int64_t t; (t = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) body(context, t, worker);
    }
    int64_t none = 0;
    first_done.compare_exchange_strong(none, nanoseconds(), std::memory_order_relaxed);
  }
};

// Whether other processes keep workers from their cores. The end of an OpenMP region waits for every worker, also for one that has
// not begun; so after a wait that is long beside the work, the caller works alone for a while, longer each time.
class Neighbours {
 public:
  bool busy() const { return alone_until_.load(std::memory_order_relaxed) > nanoseconds(); }

  void saw(int64_t start, int64_t first_done, int64_t end, int64_t tasks, int threads) {
    const int64_t waited = end - first_done, work = first_done - start;
    if (waited < kLeastWait + 2 * work * threads / tasks || waited < work / 2) {
      pause_.store(kLeastPause, std::memory_order_relaxed);
      return;
    }
    const int64_t pause = pause_.load(std::memory_order_relaxed);
    alone_until_.store(end + pause, std::memory_order_relaxed);
    pause_.store(pause * 2 < kMostPause ? pause * 2 : kMostPause, std::memory_order_relaxed);
  }

 private:
  // Nanoseconds. A worker that is awake joins within a few microseconds, one that sleeps within some fifty.
  static constexpr int64_t kLeastWait = 200000, kLeastPause = 4000000, kMostPause = 128000000;
  std::atomic<int64_t> alone_until_{0}, pause_{kLeastPause};
};

Neighbours& neighbours() {
  static Neighbours found;
  return found;
}

// Threads do not survive a fork: in a process that was forked from the one which loaded this library, a pool, OpenMP's as well,
// would wait for ever for threads that it believes to have.
bool forked() {
#if defined(_WIN32)
  return false;
#else
  static const pid_t owner = getpid();
  return getpid() != owner;
#endif
}
[[maybe_unused]] const bool loaded = forked();  // notes the owner

// The entry points of libgomp, which LLVM's and Intel's runtimes provide as well.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  std::string description = "own threads";
  std::atomic<bool> asked{false};  // there was a job for several of its threads
};

OpenMp& openmp() {
  static OpenMp found;
  return found;
}

// A processor's hint that a loop only waits.
inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ __volatile__("yield");
#endif
}

// Our own threads. A worker waits awake for a while, then asleep, until a job comes. The caller works too, and waits at the end only for
// workers that have begun: one that another process keeps from its core has claimed nothing. One job at a time; a second
// caller works alone.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    bool asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int id = static_cast<int>(workers_.size());
        workers_.emplace_back([this, id] { serve(id); });
      }
      job_ = &job;
      wanted_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
      asleep = asleep_ > 0;
    }
    if (asleep) wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // who comes now is too late
    }
    for (int i = 0; working_.load(std::memory_order_acquire); i++) {
      relax();
      // The worker may need this very core.
      if (i % 64 == 63) std::this_thread::yield();
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& w : workers_)
      if (forked()) w.detach();
      else w.join();
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(kAwake);
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 32; i++) relax();
      std::unique_lock<std::mutex> lock(mutex_);
      if (generation_.load(std::memory_order_relaxed) == seen) {
        asleep_++;
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        asleep_--;
      }
      if (stop_) return;
      seen = generation_.load(std::memory_order_relaxed);
      if (!job_ || id >= wanted_) continue;
      Job* job = job_;
      working_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work();
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Microseconds that a worker waits awake: longer than what lies between two products of a token.
  static constexpr int kAwake = 100;

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  std::atomic<int> working_{0};
  int wanted_ = 0, asleep_ = 0;
  std::atomic<uint64_t> generation_{0};
  bool stop_ = false;
};

thread_local bool inside = false;

}  // namespace

bool share_openmp_of(const char* library) {
#if defined(_WIN32)
  (void)library;
  return false;
#else
  // Looking a name up through a library's handle searches it and what it depends on: the very runtime it is bound to.
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  OpenMp& found = openmp();
  void* parallel = dlsym(handle, "GOMP_parallel");
  void* in_parallel = dlsym(handle, "omp_in_parallel");
  if (!parallel || !in_parallel) {
    dlclose(handle);
    return false;
  }
  found.parallel = reinterpret_cast<decltype(found.parallel)>(parallel);
  found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(in_parallel);
  Dl_info info;
  const char* path = dladdr(parallel, &info) && info.dli_fname ? info.dli_fname : library;
  const std::string file(path);
  found.description = "OpenMP shared with PyTorch (" + file.substr(file.rfind('/') + 1) + ")";
  return true;
#endif
}

const char* pool() { return openmp().description.c_str(); }

bool asked_openmp() { return openmp().asked.load(std::memory_order_relaxed); }

void run_tasks(int64_t tasks, int threads, Body body, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job(body, context, tasks, threads);
  OpenMp& omp = openmp();
  if (threads <= 1 || inside || (omp.parallel && omp.in_parallel())) return job.work();
  omp.asked.store(omp.parallel, std::memory_order_relaxed);
  if (forked()) return job.work();
  if (omp.parallel) {
    if (neighbours().busy()) return job.work();
    const int64_t start = nanoseconds();
    omp.parallel([](void* j) { static_cast<Job*>(j)->work(); }, &job, static_cast<unsigned>(threads), 0);
    neighbours().saw(start, job.first_done.load(std::memory_order_relaxed), nanoseconds(), tasks, threads);
    return;
  }
  static Pool own;
  inside = true;
  own.run(job, threads);
  inside = false;
}

}  // namespace octavo
