// 1 x 1 convolutions of images whose pixels lie in a row: the images are panels as they are, a vector holds pixels of
// one channel, and nothing is packed. The tile's rows are images.
#include "direct.h"

#include <algorithm>

#include "gather.h"
#include "parallel.h"

namespace granet {
namespace {

// Of an image's channel; with fewer, a panel of images fills the registers better.
constexpr int64_t MIN_VECTORS = 4;

bool rows_follow(const int64_t strides[4], int64_t h, int64_t w) {
    return (strides[3] == 1 || w == 1) && (strides[2] == w || h == 1);
}

struct Tiling {
    int64_t images, vectors, vector;  // of the batch, of an image's channel, bytes of one
    int th, tw;
    int height;  // rows of the weight at a time, which share their entries
};

Tiling tiling(int64_t images, int64_t pixels, const KernelSet& k, bool shares_rows, int own) {
    Tiling t{images, pixels / k.lanes, k.lanes * int64_t(sizeof(float)), 1, 1, shares_rows ? k.shared_rows : 1};
    const int largest = shares_rows ? KernelSet::max_shared : own;
    t.tw = tile_width(t.vectors, largest);
    if (t.tw == t.vectors) t.th = int(std::min<int64_t>({KernelSet::max_th, largest / t.tw, images}));
    return t;
}

Access direct_access(bool by_output, int64_t channel_stride, const Tiling& t, int64_t rows, int64_t channels,
                     int64_t nnz) {
    Access access;
    access.by_output = by_output;
    access.channel_pitch = channel_stride * int64_t(sizeof(float));
    access.height = t.height;
    access.phase = {0};
    access.tap_offset = {0};
    const int64_t tile = t.th * t.tw * t.vector;
    access.block = block_of(tile, tile, channels, double(nnz) / double(rows * channels), false);
    return access;
}

const char* at(const float* data, int64_t floats) { return reinterpret_cast<const char*>(data + floats); }

struct DirectPass {
    const KernelSet& kernels;
    Tiling tiling;
    const Table& table;
    const float* values;
    const float* bias;
    Images source;
    int64_t rows;
    float* out;
    const int64_t* out_strides;
    bool stream;
    int64_t chunk;  // rows that the scratch memory holds
};

// th images, tw vectors of pixels from vector j on, every row.
void run_tile(const DirectPass& p, int64_t image, int64_t j, int th, int tw, char* vectors) {
    const KernelSet& k = p.kernels;
    TileArgs args{};
    args.source = at(p.source.data, image * p.source.strides[0] + j * k.lanes);
    args.source_pitch = p.source.strides[0] * ptrdiff_t(sizeof(float));
    args.offset = p.table.offset.data();
    args.value = p.values;
    args.out = vectors;
    args.out_step = p.tiling.vector;
    args.out_pitch = tw * args.out_step;
    args.out_row = th * args.out_pitch;
    for (int64_t begin = 0; begin < p.rows; begin += p.chunk) {
        const int64_t end = std::min(begin + p.chunk, p.rows);
        args.rows = end - begin;
        args.bias = p.bias ? p.bias + begin : nullptr;
        for (int64_t block = 0; block < p.table.blocks; ++block) {
            args.ptr = p.table.row_ptr(0, block, begin);
            args.order = p.table.order_of(0, block, begin, end);
            args.accumulate = block > 0;
            k.tile(th, tw, p.tiling.height > 1)(args);
        }
        for (int64_t row = begin; row < end; ++row)
            for (int a = 0; a < th; ++a)
                k.copy(vectors + (row - begin) * args.out_row + a * args.out_pitch,
                       p.out + (image + a) * p.out_strides[0] + row * p.out_strides[1] + j * k.lanes, tw, p.stream);
    }
}

}  // namespace

bool direct_applies(const KernelSet& k, const granet_conv& c, const int64_t source[4], const int64_t target[4]) {
    const int64_t pixels = c.h * c.w, lanes = k.lanes;
    return c.kh == 1 && c.kw == 1 && c.stride_h == 1 && c.stride_w == 1 && c.pad_h == 0 && c.pad_w == 0 &&
           pixels % lanes == 0 && pixels / lanes >= MIN_VECTORS && rows_follow(source, c.h, c.w) &&
           rows_follow(target, c.h, c.w) && source[1] >= 0 &&
           std::max(c.in, c.out) * source[1] * int64_t(sizeof(float)) <= INT32_MAX;
}

int gather_direct(const KernelSet& k, granet_layout* layout, bool by_output, int64_t rows, int64_t channels,
                  int64_t pixels, const Images& source, const float* weight, const float* bias, float* out,
                  const int64_t out_strides[4], int threads) {
    const Tiling t = tiling(source.n, pixels, k, layout->shares_rows(by_output, k.shared_rows), k.max_tile);
    const auto table = layout->table(direct_access(by_output, source.strides[1], t, rows, channels, layout->nnz()));
    const Scratch values(table->nnz() * sizeof(float));
    gather_values(*table, weight, values.as<float>(), threads);
    const int64_t chunk = table->blocks == 1 ? CHUNK : rows;
    const DirectPass pass{k,    t,   *table,      values.as<float>(),       bias, source,
                          rows, out, out_strides, goes_past_cache(source.n * rows * pixels), chunk};
    const int64_t items = (t.images + t.th - 1) / t.th;
    const ThreadScratch scratch(threads, items, 0, chunk * t.th * t.tw * t.vector);
    parallel_for(threads, items, [&](int64_t item) {
        const ThreadScratch::Lease lease(scratch);
        const int64_t image = item * t.th;
        const int th = int(std::min<int64_t>(t.th, t.images - image));
        for (int64_t j = 0; j < t.vectors; j += t.tw)
            run_tile(pass, image, j, th, int(std::min<int64_t>(t.tw, t.vectors - j)), lease.second());
        k.fence();
    });
    return GRANET_OK;
}

void wgrad_direct(const KernelSet& k, const Table& table, const Images& gradient, const Images& source, int64_t pixels,
                  const Part& part, float* sums) {
    const Tiling t = tiling(source.n, pixels, k, table.access.height > 1, k.max_dot);
    for (int64_t image = part.image_begin; image < part.image_end; image += t.th) {
        const int th = int(std::min<int64_t>(t.th, part.image_end - image));
        for (int64_t j = 0; j < t.vectors; j += t.tw) {
            const int tw = int(std::min<int64_t>(t.tw, t.vectors - j));
            DotArgs args{};
            args.source = at(source.data, image * source.strides[0] + j * k.lanes);
            args.source_pitch = source.strides[0] * ptrdiff_t(sizeof(float));
            args.gradient = at(gradient.data, image * gradient.strides[0] + part.row_begin * gradient.strides[1] +
                                                  j * k.lanes);
            args.gradient_pitch = gradient.strides[0] * ptrdiff_t(sizeof(float));
            args.gradient_row = gradient.strides[1] * ptrdiff_t(sizeof(float));
            args.offset = table.offset.data();
            args.rows = part.row_end - part.row_begin;
            args.sum = sums;
            for (int64_t block = 0; block < table.blocks; ++block) {
                args.ptr = table.row_ptr(0, block, part.row_begin);
                args.order = table.order_of(0, block, part.row_begin, part.row_end);
                k.dot(th, tw, t.height > 1)(args);
            }
        }
    }
}

Access wgrad_direct_access(const KernelSet& k, const granet_conv& c, int64_t channel_stride, granet_layout* layout) {
    const Tiling t = tiling(c.n, c.h * c.w, k, layout->shares_rows(true, k.shared_rows), k.max_dot);
    return direct_access(true, channel_stride, t, c.out, c.in, layout->nnz());
}

}  // namespace granet
