#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace octavo {
namespace {

struct Job {
  Body body;
  void* context;
  int ranges;
  std::atomic<int> workers{0};
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
  }
};

// The entry points of libgomp, which LLVM's and Intel's runtimes provide as well.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  std::string description = "own threads";
};

OpenMp& openmp() {
  static OpenMp found;
  return found;
}

// Our own pool: workers sleep until a job comes. One job at a time; a second caller works alone.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || !usable()) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int id = static_cast<int>(workers_.size());
        workers_.emplace_back([this, id] { serve(id); });
      }
      job_ = &job;
      wanted_ = threads - 1;
      running_ = wanted_;
      generation_++;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& w : workers_)
      if (usable()) w.join();
      else w.detach();
  }

 private:
  void serve(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && job_); });
      if (stop_) return;
      seen = generation_;
      if (id >= wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  // The threads do not survive a fork.
  bool usable() const {
#if defined(_WIN32)
    return true;
#else
    return getpid() == owner_;
#endif
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
#if !defined(_WIN32)
  const pid_t owner_ = getpid();
#endif
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
  OpenMp found;
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
  openmp() = found;
  return true;
#endif
}

const char* pool() { return openmp().description.c_str(); }

void run_tasks(int64_t tasks, int threads, Body body, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job(body, context, tasks, threads);
  const OpenMp& omp = openmp();
  if (threads <= 1 || inside || (omp.parallel && omp.in_parallel())) return job.work();
  if (omp.parallel) {
    omp.parallel([](void* j) { static_cast<Job*>(j)->work(); }, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  static Pool own;
  inside = true;
  own.run(job, threads);
  inside = false;
}

}  // namespace octavo
