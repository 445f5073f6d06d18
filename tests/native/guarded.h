// Memory that ends, or begins, at a page which may not be touched: a read or write one byte outside it ends the program,
// also in instructions that a sanitizer does not watch (masked vector loads and stores).
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (inner && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE))) std::abort();
    data_ = base_ + page + (at_end ? inner - bytes : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* base_;
  char* data_;
  size_t size_;
};
