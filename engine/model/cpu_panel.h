// Weights in the order in which products read them: panels of outputs, step after step.

#pragma once

#include "cpu_vector.h"

namespace {

constexpr int PANEL = 64;  // outputs whose weights stand together
constexpr int PANEL_VECTORS = PANEL / LANES;

// What a product asks of a reader of a panel, of VECTORS vectors of a step at a time: next_patch, the
// next step that has patches, or num_steps; read, a step without; read_patched, one with, in rising
// order; ask_for, to have a step brought nearer.

// Of words, from vector `first` on.
struct WordPanel {
    const uint32_t *const words;  // [steps, PANEL]
    const int first;

    int next_patch(int num_steps) const { return num_steps; }
    template <int VECTORS>
    void read(int step, BitVec *to) const {
        for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(to + v, at(step) + v * LANES, sizeof *to);
    }
    template <int VECTORS>
    void read_patched(int, BitVec *) {}  // never called
    template <int VECTORS>
    void ask_for(int step) const {
        for (int i = 0; i < VECTORS * LANES; i += 16) __builtin_prefetch(at(step) + i, 0, 3);
    }

  private:
    const uint32_t *at(int step) const { return words + int64_t(step) * PANEL + first * LANES; }
};

}  // namespace
