// Weight gradient at kept positions.
#include "direct.h"
#include "dots.h"
#include "linear.h"
#include "near.h"
#include "pixels.h"
#include "sums.h"

namespace granet {
namespace {

int wgrad_panels(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                 const Images& source, float* dw, int threads) {
    const Geometry g =
        make_geometry(forward_axis(c.h, c.out_h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                      forward_axis(c.w, c.out_w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.n, c.in, c.out, k, Use::dots,
                      layout->shares_rows(true, k.shared_rows), layout->density());
    if (!g.is_supported(g.gradient_bytes())) return GRANET_UNSUPPORTED;
    const auto table = table_of(layout, g, true);
    const DotPass pass{g, k, *table, gradient, source};
    const ThreadScratch scratch(threads, threads, g.panel_bytes(), g.gradient_bytes());
    sum_chunks(k, *layout, *table, cut_of(*layout, g.panels() * g.bands(), threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   DotItem item(pass, row_begin, row_end, sums);
                   for (int64_t i = begin; i < end; ++i)
                       item.add(i / g.bands(), i % g.bands(), lease.first(), lease.second());
               });
    return GRANET_OK;
}

int wgrad(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient, const Images& source,
          float* dw, int threads) {
    if (layout->nnz() == 0 || c.n == 0) {
        clear(dw, c.out * c.in * c.kh * c.kw, threads);
        return GRANET_OK;
    }
    if (linear_applies(k, layout, c))
        return run_linear(k, layout, c, {gradient, source, nullptr, nullptr, nullptr, dw}, threads);
    if (near_applies(k, *layout, c, source.strides, gradient.strides))
        return wgrad_near(k, layout, c, gradient, source, dw, threads);
    if (direct_applies(k, c, source.strides, gradient.strides))
        return wgrad_direct(k, layout, c, gradient, source, dw, threads);
    return wgrad_panels(k, layout, c, gradient, source, dw, threads);
}

}  // namespace
}  // namespace granet

int granet_conv2d_wgrad(granet_layout* layout, const granet_conv* conv, const float* g, const int64_t g_strides[4],
                        const float* x, const int64_t x_strides[4], float* dw, int threads) {
    using namespace granet;
    return guarded([&] {
        granet_conv c = *conv;
        Strides of_g = strides_of(g_strides), of_x = strides_of(x_strides);
        take_pixels(c, of_g, of_x);
        const Images gradient{g, of_g.data(), c.n}, source{x, of_x.data(), c.n};
        return wgrad(kernels(), layout, c, gradient, source, dw, threads);
    });
}
