// Scratch space of a call.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

namespace {

// Aligned to a cache line, freed at the end of its scope; null when there is none left. Much of it
// comes from the system and goes back there: glibc would keep it for calls of other sizes.
struct Memory {
    static constexpr int64_t MUCH = 4 << 20;
    const int64_t bytes;
    void *const whole;
    char *const at;

    explicit Memory(int64_t wanted) : bytes(wanted + 64), whole(take()), at(line()) {}
    ~Memory() {
        if (bytes < MUCH) free(whole);
        else if (whole) munmap(whole, bytes);
    }
    Memory(const Memory &) = delete;

  private:
    void *take() const {
        if (bytes < MUCH) return malloc(bytes);
        void *const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return pages == MAP_FAILED ? nullptr : pages;
    }
    char *line() const {
        return whole ? (char *)((uintptr_t(whole) + 63) & ~uintptr_t(63)) : nullptr;
    }
};

}  // namespace
