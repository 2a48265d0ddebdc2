// Both gradients of a layer in one call, on one panel of the incoming gradient where both can read it, or image by
// image: where few weights are left, packing, unpacking and memory are most of a layer's time. (Not where the input
// gradient has narrower panels, as 1 x 1 convolutions of few weights have: they gain as much.) Linear layers: linear.h.
#include <optional>

#include "direct.h"
#include "dots.h"
#include "linear.h"
#include "near.h"
#include "pixels.h"
#include "sums.h"
#include "tiles.h"

namespace granet {
namespace {

// How both gradients are computed panel by panel, and whether they may be.
struct Shared {
    Geometry dgrad, wgrad;

    Shared(const KernelSet& k, granet_layout* layout, const granet_conv& c)
        : dgrad(make_geometry(dgrad_axis(c.out_h, c.h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                              dgrad_axis(c.out_w, c.w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.n, c.out, c.in, k,
                              Use::tiles, layout->shares_rows(false, k.shared_rows), layout->density())),
          wgrad(make_geometry(forward_axis(c.h, c.out_h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                              forward_axis(c.w, c.out_w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.n, c.in, c.out, k,
                              Use::dots, layout->shares_rows(true, k.shared_rows), layout->density())) {}

    // Whether one panel of the incoming gradient serves both.
    bool one_panel() const {
        return has_one_phase(dgrad) && has_one_phase(wgrad) && holds_all(dgrad.y) && holds_all(dgrad.x) &&
               dgrad.groups == wgrad.groups && dgrad.bands() == 1 && wgrad.bands() == 1 &&
               dgrad.is_supported(dgrad.rows * dgrad.region_bytes() + wgrad.panel_bytes()) && wgrad.is_supported(0);
    }
    static bool has_one_phase(const Geometry& g) {
        return g.y.source_phases * g.y.target_phases * g.x.source_phases * g.x.target_phases == 1;
    }
    // Whether all pixels of the gradient are in the panel: with much padding, some reach no pixel of the input.
    static bool holds_all(const Axis& axis) { return axis.low <= 0 && axis.source <= axis.grid() + axis.high; }
    // Where in the panel the gradient's first pixel lies: behind the border that the input gradient's taps read.
    ptrdiff_t corner() const { return -dgrad.y.low * dgrad.pitch() - dgrad.x.low * dgrad.groups * dgrad.vector; }
};

// What both gradients are computed of.
struct Problem {
    Problem(const granet_conv& conv, const int64_t* g_strides, const int64_t* x_strides, const int64_t* dx_strides)
        : c(conv), g(strides_of(g_strides)), x(strides_of(x_strides)), dx(strides_of(dx_strides)) {
        const bool dgrad = is_of_pixels(c, g, dx), wgrad = is_of_pixels(c, g, x);
        is_same = dgrad == wgrad;
        if (is_same) take_pixels(c, g, x, dx);
    }
    granet_conv c;
    Strides g, x, dx;
    bool is_same;  // for each of them alone
};

// Whether both are computed image by image, from one copy of the incoming gradient.
bool is_near(const KernelSet& k, granet_layout* layout, const Problem& p, int threads) {
    return layout->nnz() > 0 && p.c.n > 0 && p.c.stride_h == 1 &&
           near_applies(k, *layout, p.c, p.dx.data(), p.g.data()) &&
           near_applies(k, *layout, p.c, p.x.data(), p.g.data()) && near_reads_once(*layout, p.c, threads);
}
// The same for 1 x 1 convolutions, from the gradient as it lies in memory.
bool is_direct(const KernelSet& k, granet_layout* layout, const Problem& p, int threads) {
    return layout->nnz() > 0 && p.c.n > 0 && p.is_same && direct_applies(k, p.c, p.dx.data(), p.g.data()) &&
           direct_applies(k, p.c, p.x.data(), p.g.data()) && direct_reads_once(k, layout, p.c, threads);
}

// What both gradients share, or nothing where each is better off alone.
std::optional<Shared> find_shared(const KernelSet& k, granet_layout* layout, const Problem& p, int threads) {
    if (layout->nnz() == 0 || p.c.n == 0 || !p.is_same || direct_applies(k, p.c, p.dx.data(), p.g.data()) ||
        direct_applies(k, p.c, p.x.data(), p.g.data()) || near_applies(k, *layout, p.c, p.dx.data(), p.g.data()) ||
        near_applies(k, *layout, p.c, p.x.data(), p.g.data()))
        return std::nullopt;
    std::optional<Shared> shared(std::in_place, k, layout, p.c);
    if (!shared->one_panel() || !is_even(cut_of(*layout, shared->wgrad.panels(), threads), threads))
        shared.reset();
    return shared;
}

void run_shared(const KernelSet& k, granet_layout* layout, const Shared& shared, const Gradients& o, int threads) {
    const auto table = table_of(layout, shared.dgrad, false), dots = table_of(layout, shared.wgrad, true);
    const Scratch values(table->nnz() * sizeof(float));
    gather_values(*table, o.weight, values.as<float>(), threads);
    const bool stream = goes_past_cache(o.source.n * shared.dgrad.rows * shared.dgrad.y.target * shared.dgrad.x.target);
    const TilePass tiles{shared.dgrad, k,    table,        values.as<float>(), nullptr,
                         o.gradient,   o.dx, o.dx_strides, 1,                  stream};
    const DotPass pass{shared.wgrad, k, *dots, o.gradient, o.source};
    // The source's panel takes the place of the finished tiles.
    const ThreadScratch scratch(threads, threads, shared.dgrad.panel_bytes(),
                                std::max(tiles.vectors_bytes(), shared.wgrad.panel_bytes()));
    sum_chunks(k, *layout, *dots, cut_of(*layout, shared.wgrad.panels(), threads), o.dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   const GradientPanel packed{lease.first() + shared.corner(), shared.dgrad.channel_pitch(),
                                              shared.dgrad.pitch()};
                   DotItem item(pass, row_begin, row_end, sums);
                   for (int64_t i = begin; i < end; ++i) {
                       run_tiles(tiles, i, lease.first(), lease.second());
                       item.add(i, lease.second(), packed);
                   }
               });
}

}  // namespace
}  // namespace granet

int granet_conv2d_backward(granet_layout* layout, const granet_conv* conv, const float* g, const int64_t g_strides[4],
                           const float* x, const int64_t x_strides[4], const float* weight, float* dx,
                           const int64_t dx_strides[4], float* dw, int threads) {
    using namespace granet;
    return guarded([&]() -> int {
        const KernelSet& k = kernels();
        const Problem p(*conv, g_strides, x_strides, dx_strides);
        const Gradients both{{g, p.g.data(), p.c.n}, {x, p.x.data(), p.c.n}, weight, dx, p.dx.data(), dw};
        if (p.is_same && linear_applies(k, layout, p.c)) return run_linear(k, layout, p.c, both, threads);
        const bool near = is_near(k, layout, p, threads);
        if (near || is_direct(k, layout, p, threads)) {
            const auto run = near ? backward_near : backward_direct;
            return run(k, layout, p.c, both.gradient, both.source, weight, dx, p.dx.data(), dw, threads);
        }
        if (const auto shared = find_shared(k, layout, p, threads)) {
            run_shared(k, layout, *shared, both, threads);
            return GRANET_OK;
        }
        const int status = granet_conv2d_dgrad(layout, conv, g, g_strides, weight, dx, dx_strides, threads);
        return status ? status : granet_conv2d_wgrad(layout, conv, g, g_strides, x, x_strides, dw, threads);
    });
}

int granet_conv2d_reads_once(granet_layout* layout, const granet_conv* conv, const int64_t g_strides[4],
                             const int64_t x_strides[4], const int64_t dx_strides[4], int threads) {
    using namespace granet;
    try {
        const Problem p(*conv, g_strides, x_strides, dx_strides);
        const KernelSet& k = kernels();
        if (p.is_same && linear_applies(k, layout, p.c)) return 2;
        return is_near(k, layout, p, threads) || is_direct(k, layout, p, threads) ||
               find_shared(k, layout, p, threads).has_value();
    } catch (const std::exception&) {
        return 0;
    }
}
