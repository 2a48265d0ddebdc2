// Forward pass and input gradient: both gather, each destination pixel from the sources that its row's weights name.
#include <algorithm>
#include <new>

#include "direct.h"
#include "gather.h"
#include "panel.h"
#include "parallel.h"

namespace granet {
namespace {

struct Pass {
    Geometry geometry;
    const KernelSet& kernels;
    std::shared_ptr<const Table> table;
    const float* values;
    const float* bias;
    Images source;
    float* out;
    const int64_t* out_strides;
    int64_t splits;  // of the rows: more items where there are few panels
    bool stream;     // the destination is larger than what a cache keeps until it is read
};

// One panel and band, for one range of rows.
class Item {
   public:
    Item(const Pass& pass, int64_t number, char* panel, char* vectors)
        : p_(pass),
          g_(pass.geometry),
          panel_number_(number / pass.splits / g_.bands()),
          band_(number / pass.splits % g_.bands()),
          row_begin_(g_.rows / g_.height * (number % pass.splits) / pass.splits * g_.height),
          row_end_(g_.rows / g_.height * (number % pass.splits + 1) / pass.splits * g_.height),
          panel_(panel),
          vectors_(vectors) {}

    void run() {
        Packer packer(g_, p_.kernels, p_.source, panel_number_, band_, panel_);
        const int64_t height = std::min(g_.band, g_.y.grid() - band_ * g_.band);
        for (int64_t i = 0; i < height; i += g_.th) {
            const int th = int(std::min<int64_t>(g_.th, height - i));
            packer.reach(i + th);
            for (int64_t j = 0; j < g_.row_vectors(); j += g_.tw)
                tile(i, j, th, int(std::min<int64_t>(g_.tw, g_.row_vectors() - j)));
        }
        p_.kernels.fence();
    }

   private:
    void tile(int64_t i, int64_t j, int th, int tw) {
        const Region region{panel_number_ * g_.panel_images(),
                            (band_ * g_.band + i) * g_.y.target_phases,
                            j / g_.groups * g_.x.target_phases,
                            th * g_.y.target_phases,
                            tw / g_.groups * g_.x.target_phases,
                            g_.groups,
                            g_.vector};
        const char* source = panel_ + i * g_.pitch() + j * g_.vector;
        const int64_t step = p_.table->blocks == 1 ? CHUNK : row_end_ - row_begin_;
        for (int64_t row = row_begin_; row < row_end_; row += step) {
            const int64_t end = std::min(row + step, row_end_);
            for (int64_t block = 0; block < p_.table->blocks; ++block)
                for (int64_t phase = 0; phase < p_.table->access.phases; ++phase)
                    multiply(source, region, th, tw, row, end, block, phase);
            for (int64_t begin = row; begin < end; begin += CHUNK)
                unpack(p_.kernels, vectors_ + (begin - row) * region.bytes(), region, begin,
                       std::min(begin + CHUNK, end), p_.out, p_.out_strides, p_.source.n, g_.y.target, g_.x.target,
                       p_.stream);
        }
    }

    void multiply(const char* source, const Region& region, int th, int tw, int64_t row, int64_t end, int64_t block,
                  int64_t phase) {
        const int64_t width = region.width * g_.groups;  // vectors of a row of the region
        const int64_t phase_y = phase / g_.x.target_phases, phase_x = phase % g_.x.target_phases;
        TileArgs args{};
        args.source = source;
        args.source_pitch = g_.pitch();
        args.offset = p_.table->offset.data();
        args.value = p_.values;
        args.ptr = p_.table->row_ptr(phase, block, row);
        args.rows = end - row;
        args.bias = p_.bias ? p_.bias + row : nullptr;
        args.accumulate = block > 0;
        args.out = vectors_ + (phase_y * width + phase_x) * g_.vector;
        args.out_row = region.bytes();
        args.out_pitch = g_.y.target_phases * width * g_.vector;
        args.out_step = g_.x.target_phases * g_.vector;
        if (g_.whole)
            g_.whole->tile(args);
        else
            p_.kernels.tile(th, tw, g_.height > 1)(args);
    }

    const Pass& p_;
    const Geometry& g_;
    int64_t panel_number_, band_, row_begin_, row_end_;
    char* panel_;
    char* vectors_;  // of finished tiles
};

// In how many ranges to cut the rows, so that the threads end together: packing is repeated for each.
int64_t row_splits(const Geometry& g, int64_t nnz, int threads) {
    const int64_t panels = g.panels() * g.bands();
    const double pack = 8.0 * double(g.channels), work = 1.0 + double(nnz) * 1.6;
    int64_t best = 1;
    double least = 0;
    for (int64_t splits = 1; splits <= std::min<int64_t>(g.rows, 2 * threads); ++splits) {
        const auto rounds = double((panels * splits + threads - 1) / threads);
        const double time = rounds * (pack + work / double(splits));
        if (splits == 1 || time < 0.98 * least) {
            best = splits;
            least = time;
        }
    }
    return best;
}

}  // namespace

int gather(const KernelSet& k, granet_layout* layout, bool by_output, const Axis& y, const Axis& x, int64_t rows,
           int64_t channels, const Images& source, const float* weight, const float* bias, float* out,
           const int64_t out_strides[4], int threads) {
    const bool shares = layout->shares_rows(by_output, k.shared_rows);
    const Geometry g = make_geometry(y, x, source.n, channels, rows, k, Use::tiles, shares);
    const int64_t region = g.th * g.tw * g.y.target_phases * g.x.target_phases * g.vector;
    if (!g.is_supported(rows * region)) return GRANET_UNSUPPORTED;
    const double density = double(layout->nnz()) / double(rows * channels * g.y.target_phases * g.x.target_phases);
    const auto table = layout->table(access_of(g, by_output, block_of(footprint_of(g), channels, density, g.whole)));
    const Scratch values(table->nnz() * sizeof(float));
    gather_values(*table, weight, values.as<float>(), threads);
    const int64_t splits = row_splits(g, table->nnz(), threads);
    const bool stream = goes_past_cache(source.n * rows * y.target * x.target);
    const Pass pass{g, k, table, values.as<float>(), bias, source, out, out_strides, splits, stream};
    const int64_t items = g.panels() * g.bands() * splits;
    const int64_t kept_rows = table->blocks == 1 ? CHUNK : rows;
    const ThreadScratch scratch(threads, items, g.panel_bytes(), kept_rows * region);
    parallel_for(threads, items, [&](int64_t i) {
        const ThreadScratch::Lease lease(scratch);
        Item(pass, i, lease.first(), lease.second()).run();
    });
    return GRANET_OK;
}

}  // namespace granet

int granet_conv2d_forward(granet_layout* layout, const granet_conv* c, const float* x, const int64_t x_strides[4],
                          const float* weight, const float* bias, float* y, const int64_t y_strides[4], int threads) {
    using namespace granet;
    return guarded([&] {
        const KernelSet& k = kernels();
        if (direct_applies(k, *c, x_strides, y_strides))
            return gather_direct(k, layout, true, c->out, c->in, c->h * c->w, Images{x, x_strides, c->n}, weight, bias,
                                 y, y_strides, threads);
        return gather(k, layout, true, forward_axis(c->h, c->out_h, c->kh, c->stride_h, c->pad_h, c->dil_h),
                      forward_axis(c->w, c->out_w, c->kw, c->stride_w, c->pad_w, c->dil_w), c->out, c->in,
                      Images{x, x_strides, c->n}, weight, bias, y, y_strides, threads);
    });
}

int granet_conv2d_dgrad(granet_layout* layout, const granet_conv* c, const float* g, const int64_t g_strides[4],
                        const float* weight, float* dx, const int64_t dx_strides[4], int threads) {
    using namespace granet;
    return guarded([&] {
        const KernelSet& k = kernels();
        if (direct_applies(k, *c, g_strides, dx_strides))
            return gather_direct(k, layout, false, c->in, c->out, c->h * c->w, Images{g, g_strides, c->n}, weight,
                                 nullptr, dx, dx_strides, threads);
        return gather(k, layout, false, dgrad_axis(c->out_h, c->h, c->kh, c->stride_h, c->pad_h, c->dil_h),
                      dgrad_axis(c->out_w, c->w, c->kw, c->stride_w, c->pad_w, c->dil_w), c->in, c->out,
                      Images{g, g_strides, c->n}, weight, nullptr, dx, dx_strides, threads);
    });
}
