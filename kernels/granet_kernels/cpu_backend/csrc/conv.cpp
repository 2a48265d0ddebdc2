// Forward pass and input gradient: both gather, each destination pixel from the sources that its row's weights name.
#include "direct.h"
#include "linear.h"
#include "near.h"
#include "parallel.h"
#include "pixels.h"
#include "tiles.h"

namespace granet {

int gather(const KernelSet& k, granet_layout* layout, bool by_output, const Axis& y, const Axis& x, int64_t rows,
           int64_t channels, const Images& source, const float* weight, const float* bias, float* out,
           const int64_t out_strides[4], int threads) {
    const bool shares = layout->shares_rows(by_output, k.shared_rows);
    const Geometry g = make_geometry(y, x, source.n, channels, rows, k, Use::tiles, shares, layout->density());
    if (!g.is_supported(rows * g.region_bytes())) return GRANET_UNSUPPORTED;
    const auto table = table_of(layout, g, by_output);
    const Scratch values(table->nnz() * sizeof(float));
    gather_values(*table, weight, values.as<float>(), threads);
    const int64_t splits = row_splits(g.panels() * g.bands(), g.channels, g.rows, table->nnz(), threads);
    const bool stream = goes_past_cache(source.n * rows * y.target * x.target);
    const TilePass pass{g, k, table, values.as<float>(), bias, source, out, out_strides, splits, stream};
    const ThreadScratch scratch(threads, pass.items(), g.panel_bytes(), pass.vectors_bytes());
    parallel_for(threads, pass.items(), [&](int64_t i) {
        const ThreadScratch::Lease lease(scratch);
        run_tiles(pass, i, lease.first(), lease.second());
    });
    return GRANET_OK;
}

}  // namespace granet

int granet_conv2d_forward(granet_layout* layout, const granet_conv* conv, const float* x, const int64_t x_strides[4],
                          const float* weight, const float* bias, float* y, const int64_t y_strides[4], int threads) {
    using namespace granet;
    return guarded([&] {
        const KernelSet& k = kernels();
        granet_conv c = *conv;
        Strides from = strides_of(x_strides), to = strides_of(y_strides);
        take_pixels(c, from, to);
        if (direct_applies(k, c, from.data(), to.data()))
            return gather_direct(k, layout, true, c, Images{x, from.data(), c.n}, weight, bias, y, to.data(), threads);
        if (near_applies(k, *layout, c, from.data(), to.data()))
            return gather_near(k, layout, true, c, Images{x, from.data(), c.n}, weight, bias, y, to.data(), threads);
        return gather(k, layout, true, forward_axis(c.h, c.out_h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                      forward_axis(c.w, c.out_w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.out, c.in,
                      Images{x, from.data(), c.n}, weight, bias, y, to.data(), threads);
    });
}

int granet_conv2d_dgrad(granet_layout* layout, const granet_conv* conv, const float* g, const int64_t g_strides[4],
                        const float* weight, float* dx, const int64_t dx_strides[4], int threads) {
    using namespace granet;
    return guarded([&] {
        const KernelSet& k = kernels();
        granet_conv c = *conv;
        Strides from = strides_of(g_strides), to = strides_of(dx_strides);
        take_pixels(c, from, to);
        if (direct_applies(k, c, to.data(), from.data()))
            return gather_direct(k, layout, false, c, Images{g, from.data(), c.n}, weight, nullptr, dx, to.data(),
                                 threads);
        if (linear_applies(k, layout, c))
            return run_linear(k, layout, c, {{g, from.data(), c.n}, {}, weight, dx, to.data(), nullptr}, threads);
        if (c.stride_h == 1 && near_applies(k, *layout, c, to.data(), from.data()))
            return gather_near(k, layout, false, c, Images{g, from.data(), c.n}, weight, nullptr, dx, to.data(),
                               threads);
        return gather(k, layout, false, dgrad_axis(c.out_h, c.h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                      dgrad_axis(c.out_w, c.w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.in, c.out,
                      Images{g, from.data(), c.n}, weight, nullptr, dx, to.data(), threads);
    });
}
