// The inner part of weight gradients: a dot product of two tiles for each kept weight.
#pragma once

#include <vector>

#include "gather.h"
#include "panel.h"

namespace granet {

struct DotPass {
    const Geometry& geometry;  // of the forward pass
    const KernelSet& kernels;
    const Table& table;
    Images gradient, source;
};

// The gradient's vectors in memory: at row * row_pitch + grid row * pitch, bytes.
struct GradientPanel {
    const char* data;
    ptrdiff_t row_pitch, pitch;
};

// Adds what images give to the sums of rows [row_begin, row_end).
class DotItem {
   public:
    DotItem(const DotPass& pass, int64_t row_begin, int64_t row_end, float* sums)
        : p_(pass), g_(pass.geometry), row_begin_(row_begin), row_end_(row_end), sums_(sums) {}

    // A band of a panel. `panel`: memory of geometry.panel_bytes(), `gradient`: of geometry.gradient_bytes().
    void add(int64_t panel_number, int64_t band, char* panel, char* gradient);
    // A panel of a single band, whose gradient is packed.
    void add(int64_t panel_number, char* panel, const GradientPanel& gradient);

   private:
    void pack_gradient(int64_t panel_number, int64_t y, int th, char* gradient);
    void multiply(const char* source, const GradientPanel& gradient, int th);

    const DotPass& p_;
    const Geometry& g_;
    int64_t row_begin_, row_end_;
    float* sums_;
    std::vector<int32_t> at_;
};

}  // namespace granet
