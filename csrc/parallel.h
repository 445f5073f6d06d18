// Threads. Work is shared out through the OpenMP runtime that PyTorch itself uses, found at run time: its workers are
// awake and spinning between two of PyTorch's own operations, and a second pool beside them would wait for a core until
// they give up. Without such a runtime a small pool of our own serves.
//
// Measured on a layer's worth of work, two threads of a Zen 5: layer norm, four products of 2048 x 2048, attention, a softmax
// large enough for PyTorch's own threads. Shared runtime: tenth percentile 0.75 ms, median 0.84 to 1.1; own pool (workers
// sleeping on a condition variable): 0.81 to 0.97 and 1.2 to 16 ms, on a machine that others were using too.
//
// On a busy machine a worker that has fallen asleep may wake on a core that is taken, and the end of an OpenMP region waits for it. After a
// wait that is long beside the work, products are done by the calling thread alone for 4 to 128 ms. Measured on two cores of a Zen 4
// beside two busy processes (and others), four layers of SmolLM2's shape, AVX2 kernels, ms a pass before / after / PyTorch on float32:
// 1 token 189 / 17 to 34 / 45, 96 tokens 90 / 90 to 123 / 132 to 204. A pool of our own, which waits for nobody who has not begun,
// was tried too: PyTorch's workers spin on the core that ours need (96 tokens, nothing else running: 1112 ms instead of 45).
#pragma once
#include <cstdint>

namespace octavo {

// Looks for an OpenMP runtime among a loaded library (libtorch_cpu.so) and what it depends on. False if there is none.
bool share_openmp_of(const char* library);

// "OpenMP shared with <library>" or "own threads".
const char* pool();

// Whether there was a job for several threads of the shared OpenMP runtime, in this process or in those that it was forked from.
bool asked_openmp();

using Body = void (*)(void* context, int64_t task, int worker);

// Calls body(context, task, worker) once for every task in [0, tasks), on at most `threads` threads, the calling one among
// them; `worker` in [0, threads) tells them apart. Each thread has tasks that follow each other, and then takes over those of a thread
// that is held up by another process, which so delays one task, not its share. Within another parallel region it runs on the
// calling thread alone.
void run_tasks(int64_t tasks, int threads, Body body, void* context);

template <class F>
void parallel(int64_t tasks, int threads, F&& f) {
  run_tasks(tasks, threads, [](void* c, int64_t task, int worker) { (*static_cast<F*>(c))(task, worker); }, &f);
}

}  // namespace octavo
