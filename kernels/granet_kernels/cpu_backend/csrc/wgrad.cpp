// Weight gradient at kept positions: a dot product of two tiles for each kept weight.
//
// The images are cut into chunks whose number depends on the shapes alone, each chunk sums in a buffer of its own, and the
// buffers are added in order: the same bits whatever the number of threads.
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
                p_.kernels.dots[th - 1][tw - 1](args);
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

// Fewer chunks where the weight is less sparse: the sums of all stay below half the dense gradient, if they are several.
int64_t chunk_count(int64_t parts, int64_t numel, int64_t nnz) {
    const int64_t room = std::max<int64_t>(1, numel / (2 * nnz));
    return std::min(std::min(parts, MAX_CHUNKS), room);
}

// Adds the chunks' sums, and writes them where the weight has them.
void scatter(const Sums& sums, float* weight_gradient, int threads) {
    constexpr int64_t piece = 1 << 15;
    const int64_t nnz = sums.table.nnz();
    parallel_for(threads, (nnz + piece - 1) / piece, [&](int64_t i) {
        for (int64_t j = i * piece; j < std::min(nnz, (i + 1) * piece); ++j) {
            float sum = sums.data[j];
            for (int64_t chunk = 1; chunk < sums.chunks; ++chunk) sum += sums.of(chunk)[j];
            weight_gradient[sums.table.position[j]] = sum;
        }
    });
}

void clear(float* data, int64_t count, int threads) {
    constexpr int64_t piece = 1 << 17;
    parallel_for(threads, (count + piece - 1) / piece, [&](int64_t i) {
        std::memset(data + i * piece, 0, std::min(piece, count - i * piece) * sizeof(float));
    });
}

// Cuts `parts` into chunks, and the rows into as many ranges as the threads ask for, and calls
// work(item, row_begin, row_end, begin, end, sums) for each.
template <typename Work>
void sum_chunks(const granet_conv& c, const Table& table, int64_t parts, float* dw, int threads, const Work& work) {
    const int64_t chunks = chunk_count(parts, c.out * c.in * c.kh * c.kw, table.nnz());
    const int64_t splits = std::min<int64_t>((threads + chunks - 1) / chunks, c.out);
    const Scratch memory(chunks * table.nnz() * sizeof(float));
    const Sums sums{table, chunks, memory.as<float>()};
    parallel_for(threads, chunks * splits, [&](int64_t item) {
        const int64_t chunk = item / splits, split = item % splits;
        const int64_t row_begin = c.out * split / splits, row_end = c.out * (split + 1) / splits;
        sums.clear(chunk, row_begin, row_end);
        work(row_begin, row_end, parts * chunk / chunks, parts * (chunk + 1) / chunks, sums.of(chunk));
    });
    scatter(sums, dw, threads);
}

void wgrad_panels(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Geometry& g, const Images& gradient,
                  const Images& source, float* dw, int threads) {
    const double density = double(layout->nnz()) / double(c.out * c.in);
    const auto table = layout->table(access_of(g, true, block_of(footprint_of(g), c.in, density, g.whole)));
    const Pass pass{g, k, *table, gradient, source};
    const ThreadScratch scratch(threads, threads, g.panel_bytes(), g.rows * g.th * g.row_vectors() * g.vector);
    sum_chunks(c, *table, g.panels() * g.bands(), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   Item(pass, row_begin, row_end, sums, lease.first(), lease.second()).run(begin, end);
               });
}

int wgrad(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient, const Images& source, float* dw,
          int threads) {
    const int64_t nnz = layout->nnz();
    const bool direct = direct_applies(k, c, source.strides, gradient.strides);
    const Geometry g =
        make_geometry(forward_axis(c.h, c.out_h, c.kh, c.stride_h, c.pad_h, c.dil_h),
                      forward_axis(c.w, c.out_w, c.kw, c.stride_w, c.pad_w, c.dil_w), c.n, c.in, c.out, k, Use::dots);
    if (!direct && !g.is_supported(c.out * g.th * g.row_vectors() * g.vector)) return GRANET_UNSUPPORTED;
    clear(dw, c.out * c.in * c.kh * c.kw, threads);
    if (nnz == 0 || c.n == 0) return GRANET_OK;
    if (!direct) {
        wgrad_panels(k, layout, c, g, gradient, source, dw, threads);
        return GRANET_OK;
    }
    const auto table = layout->table(wgrad_direct_access(k, c, source.strides[1], nnz));
    sum_chunks(c, *table, c.n, dw, threads,
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
        return wgrad(kernels(), layout, *conv, Images{g, g_strides, conv->n}, Images{x, x_strides, conv->n}, dw, threads);
    });
}
