// Weight gradient at kept positions: a dot product of two tiles for each kept weight.
//
// The images are cut into chunks whose number depends on the shapes alone, each chunk sums in a buffer of its own, and
// the buffers are added in order: the same bits whatever the number of threads.
#include <algorithm>
#include <cstring>
#include <new>

#include "direct.h"
#include "gather.h"
#include "panel.h"
#include "parallel.h"

namespace granet {
namespace {

constexpr int64_t MAX_CHUNKS = 16;

// The sums of all chunks, for a table: chunk by chunk, entry by entry.
struct Sums {
    const Table& table;
    int64_t chunks;
    float* data;

    float* of(int64_t chunk) const { return data + chunk * table.nnz(); }
    void clear(int64_t chunk, int64_t row_begin, int64_t row_end) const {
        for (int64_t block = 0; block < table.blocks; ++block) {
            const int32_t begin = *table.row_ptr(0, block, row_begin), end = *table.row_ptr(0, block, row_end);
            std::fill(of(chunk) + begin, of(chunk) + end, 0.0f);
        }
    }
};

struct Pass {
    const Geometry& geometry;  // of the forward pass
    const KernelSet& kernels;
    const Table& table;
    Images gradient, source;
};

// Adds what panels and bands [begin, end) give to the sums of rows [row_begin, row_end).
class Item {
   public:
    Item(const Pass& pass, int64_t row_begin, int64_t row_end, float* sums, char* panel, char* gradient)
        : p_(pass),
          g_(pass.geometry),
          row_begin_(row_begin),
          row_end_(row_end),
          sums_(sums),
          panel_(panel),
          gradient_(gradient) {}

    void run(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run_band(i / g_.bands(), i % g_.bands());
    }

   private:
    void run_band(int64_t panel, int64_t band) {
        Packer packer(g_, p_.kernels, p_.source, panel, band, panel_);
        const int64_t height = std::min(g_.band, g_.y.grid() - band * g_.band);
        for (int64_t i = 0; i < height; i += g_.th) {
            const int th = int(std::min<int64_t>(g_.th, height - i));
            packer.reach(i + th);
            pack_gradient(panel, band * g_.band + i, th);
            for (int64_t j = 0; j < g_.row_vectors(); j += g_.tw)
                multiply(i, j, th, int(std::min<int64_t>(g_.tw, g_.row_vectors() - j)));
        }
    }

    // Grid rows [y, y + th) of the gradient: [row][th][row_vectors].
    void pack_gradient(int64_t panel, int64_t y, int th) {
        const int64_t* s = p_.gradient.strides;
        const int64_t width = g_.x.target, step = g_.groups * g_.vector, rows = row_end_ - row_begin_;
        const int64_t pitch = th * g_.row_vectors() * g_.vector;
        at_.resize(th * width);
        for (int64_t p = 0; p < th * width; ++p) at_[p] = int32_t(p * step);
        for (int64_t group = 0; group < g_.groups; ++group) {
            const int64_t image = panel * g_.panel_images() + group * g_.lanes();
            const int valid = int(std::clamp<int64_t>(p_.gradient.n - image, 0, g_.lanes()));
            const float* data = p_.gradient.data + (valid ? image * s[0] : 0) + row_begin_ * s[1] + y * s[2];
            char* to = gradient_ + group * g_.vector;
            if (s[1] == 1) {
                for (int64_t p = 0; p < th * width; ++p)
                    p_.kernels.pack_channels(data + p / width * s[2] + p % width * s[3], s[0], valid, rows, s[3],
                                             to + p * step, pitch);
            } else if (s[3] == 1 && (s[2] == width || th == 1)) {
                for (int64_t row = 0; row < rows; ++row)
                    p_.kernels.pack_pixels(data + row * s[1], s[0], valid, th * width, s[1], to + row * pitch,
                                           at_.data());
            } else {
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t p = 0; p < th * width; ++p)
                        p_.kernels.pack_channels(data + row * s[1] + p / width * s[2] + p % width * s[3], s[0], valid,
                                                 1, 0, to + row * pitch + p * step, 0);
            }
        }
    }

    void multiply(int64_t i, int64_t j, int th, int tw) {
        DotArgs args{};
        args.source = panel_ + i * g_.pitch() + j * g_.vector;
        args.source_pitch = g_.pitch();
        args.gradient = gradient_ + j * g_.vector;
        args.gradient_pitch = g_.row_vectors() * g_.vector;
        args.gradient_row = th * args.gradient_pitch;
        args.offset = p_.table.offset.data();
        args.rows = row_end_ - row_begin_;
        args.sum = sums_;
        for (int64_t block = 0; block < p_.table.blocks; ++block) {
            args.ptr = p_.table.row_ptr(0, block, row_begin_);
            if (g_.whole)
                g_.whole->dot(args);
            else
                p_.kernels.dot(th, tw, g_.height > 1)(args);
        }
    }

    const Pass& p_;
    const Geometry& g_;
    int64_t row_begin_, row_end_;
    float* sums_;
    char* panel_;
    char* gradient_;
    std::vector<int32_t> at_;
};

// Fewer chunks where the weight is less sparse: the sums of all stay below half the dense gradient, if they are
// several. Powers of two: whatever the number of threads, they end together.
int64_t chunk_count(int64_t parts, int64_t numel, int64_t nnz) {
    const int64_t most = std::min(parts, std::max<int64_t>(1, numel / (2 * nnz)));
    int64_t chunks = 1;
    while (2 * chunks <= std::min(most, MAX_CHUNKS)) chunks *= 2;
    return chunks;
}

// Adds the chunks' sums of entries [begin, end), and writes them where the weight has them.
void scatter(const Sums& sums, int32_t begin, int32_t end, float* dw) {
    for (int32_t j = begin; j < end; ++j) {
        float sum = sums.data[j];
        for (int64_t chunk = 1; chunk < sums.chunks; ++chunk) sum += sums.of(chunk)[j];
        dw[sums.table.position[j]] = sum;
    }
}

void clear(float* dw, int64_t count, int threads) {
    constexpr int64_t piece = 1 << 17;
    parallel_for(threads, (count + piece - 1) / piece, [&](int64_t i) {
        std::memset(dw + i * piece, 0, std::min(piece, count - i * piece) * sizeof(float));
    });
}

// The gradient of all positions. Where each output channel's lie together, its kept ones are written while the zeros
// around them are still in the cache.
void write_gradient(const Sums& sums, const granet_layout& layout, float* dw, int threads) {
    const int64_t outputs = layout.shape[0], row = layout.shape[1] * layout.taps();
    if (outputs > 1 && layout.strides[0] != row) {
        constexpr int64_t piece = 1 << 15;
        const int64_t nnz = sums.table.nnz();
        clear(dw, outputs * row, threads);
        parallel_for(threads, (nnz + piece - 1) / piece, [&](int64_t i) {
            scatter(sums, int32_t(i * piece), int32_t(std::min(nnz, (i + 1) * piece)), dw);
        });
        return;
    }
    const int64_t height = sums.table.access.height;
    const int64_t together = std::max<int64_t>(1, (1 << 13) / row / height) * height;  // output channels
    parallel_for(threads, (outputs + together - 1) / together, [&](int64_t i) {
        const int64_t begin = i * together, end = std::min(outputs, begin + together);
        std::memset(dw + begin * row, 0, (end - begin) * row * sizeof(float));
        for (int64_t block = 0; block < sums.table.blocks; ++block)
            scatter(sums, *sums.table.row_ptr(0, block, begin), *sums.table.row_ptr(0, block, end), dw);
    });
}

// Cuts `parts` into chunks, and the rows into as many ranges as the threads ask for, and calls
// work(row_begin, row_end, begin, end, sums) for each.
template <typename Work>
void sum_chunks(const granet_layout& layout, const Table& table, int64_t parts, float* dw, int threads,
                const Work& work) {
    const int64_t outputs = layout.shape[0];
    const int64_t chunks = chunk_count(parts, outputs * layout.shape[1] * layout.taps(), table.nnz());
    const int64_t splits = std::min<int64_t>((threads + chunks - 1) / chunks, outputs);
    const Scratch memory(chunks * table.nnz() * sizeof(float));
    const Sums sums{table, chunks, memory.as<float>()};
    parallel_for(threads, chunks * splits, [&](int64_t item) {
        const int64_t chunk = item / splits, split = item % splits;
        const int64_t height = table.access.height, groups = outputs / height;
        const int64_t row_begin = groups * split / splits * height, row_end = groups * (split + 1) / splits * height;
        sums.clear(chunk, row_begin, row_end);
        work(row_begin, row_end, parts * chunk / chunks, parts * (chunk + 1) / chunks, sums.of(chunk));
    });
    write_gradient(sums, layout, dw, threads);
}

int wgrad_panels(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                 const Images& source, float* dw, int threads) {
    const Geometry g =
        make_geometry(forward_axis(c.h, c.out_h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                      forward_axis(c.w, c.out_w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.n, c.in, c.out, k, Use::dots,
                      layout->shares_rows(true, k.shared_rows));
    const int64_t gradient_bytes = g.rows * g.th * g.row_vectors() * g.vector;
    if (!g.is_supported(gradient_bytes)) return GRANET_UNSUPPORTED;
    const double density = double(layout->nnz()) / double(c.out * c.in);
    const auto table = layout->table(access_of(g, true, block_of(footprint_of(g), c.in, density, g.whole)));
    const Pass pass{g, k, *table, gradient, source};
    const ThreadScratch scratch(threads, threads, g.panel_bytes(), gradient_bytes);
    sum_chunks(*layout, *table, g.panels() * g.bands(), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   Item(pass, row_begin, row_end, sums, lease.first(), lease.second()).run(begin, end);
               });
    return GRANET_OK;
}

int wgrad(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient, const Images& source,
          float* dw, int threads) {
    if (layout->nnz() == 0 || c.n == 0) {
        clear(dw, c.out * c.in * c.kh * c.kw, threads);
        return GRANET_OK;
    }
    if (!direct_applies(k, c, source.strides, gradient.strides))
        return wgrad_panels(k, layout, c, gradient, source, dw, threads);
    const auto table = layout->table(wgrad_direct_access(k, c, source.strides[1], layout));
    sum_chunks(*layout, *table, c.n, dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   wgrad_direct(k, *table, gradient, source, c.h * c.w, Part{row_begin, row_end, begin, end}, sums);
               });
    return GRANET_OK;
}

}  // namespace
}  // namespace granet

int granet_conv2d_wgrad(granet_layout* layout, const granet_conv* conv, const float* g, const int64_t g_strides[4],
                        const float* x, const int64_t x_strides[4], float* dw, int threads) {
    using namespace granet;
    return guarded([&] {
        const Images gradient{g, g_strides, conv->n}, source{x, x_strides, conv->n};
        return wgrad(kernels(), layout, *conv, gradient, source, dw, threads);
    });
}
