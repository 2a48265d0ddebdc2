// 1 x 1 convolutions of images whose pixels lie in a row: the images are panels as they are, a vector holds pixels of
// one channel, and nothing is packed. The tile's rows are images. Of x, where the convolution has a stride, the pixels
// that count are copied into a row first, a tile of images at a time, and those of its gradient are spread at the end.
#include "direct.h"

#include <algorithm>
#include <cstring>

#include "gather.h"
#include "parallel.h"

namespace granet {
namespace {

// Of an image's channel; with fewer, a panel of images fills the registers better, if it packs no pixel for nothing.
constexpr int64_t MIN_VECTORS = 4;
constexpr int64_t MAX_COPY = int64_t(4) << 20;  // bytes of an image's pixels that count

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

// How far apart the channels of what a tile reads are.
int64_t channel_stride_of(const Grid& grid, int64_t in_memory) { return grid.has_all() ? in_memory : grid.pixels; }

// Where a tile of images is read from, and how far apart they are, in bytes.
struct Tile {
    const char* data;
    ptrdiff_t pitch;
};

// `count` images in place, or in `memory` [image][channel][pixel] the pixels that count.
Tile tile_of(const Grid& grid, const Images& source, int64_t image, int count, int64_t channels, char* memory) {
    constexpr auto size = ptrdiff_t(sizeof(float));
    const int64_t* s = source.strides;
    if (grid.has_all()) return {at(source.data, image * s[0]), s[0] * size};
    auto* to = reinterpret_cast<float*>(memory);
    for (int64_t a = image; a < image + count; ++a)
        for (int64_t c = 0; c < channels; ++c) {
            const float* from = source.data + a * s[0] + c * s[1];
            for (const int32_t pixel : grid.at) *to++ = from[pixel];
        }
    return {memory, channels * grid.pixels * size};
}

size_t tile_bytes(const Grid& grid, int64_t images, int64_t channels) {
    return grid.has_all() ? 0 : size_t(images * channels * grid.pixels) * sizeof(float);
}

// Writes `count` pixels from `first` on to a channel of an image; the first of them clear those in between.
void spread(const Grid& grid, const char* vectors, int64_t first, int64_t count, float* channel) {
    const auto* from = reinterpret_cast<const float*>(vectors);
    if (first == 0) std::memset(channel, 0, size_t(grid.image) * sizeof(float));
    for (int64_t p = 0; p < count; ++p) channel[grid.at[first + p]] = from[p];
}

struct DirectPass {
    const KernelSet& kernels;
    Tiling tiling;
    const Grid& grid;
    bool by_output;
    const Table& table;
    const float* values;
    const float* bias;
    int64_t rows;
    float* out;
    const int64_t* out_strides;
    bool stream;
    int64_t chunk;  // rows that the scratch memory holds
};

// th images, tw vectors of pixels from vector j on, every row.
void run_tile(const DirectPass& p, const Tile& tile, int64_t image, int64_t j, int th, int tw, char* vectors) {
    const KernelSet& k = p.kernels;
    const bool spreads = !p.by_output && !p.grid.has_all();
    TileArgs args{};
    args.source = tile.data + j * p.tiling.vector;
    args.source_pitch = tile.pitch;
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
            for (int a = 0; a < th; ++a) {
                const char* from = vectors + (row - begin) * args.out_row + a * args.out_pitch;
                float* to = p.out + (image + a) * p.out_strides[0] + row * p.out_strides[1];
                if (spreads)
                    spread(p.grid, from, j * k.lanes, tw * k.lanes, to);
                else
                    k.copy(from, to + j * k.lanes, tw, p.stream);
            }
    }
}

}  // namespace

bool direct_applies(const KernelSet& k, const granet_conv& c, const int64_t x[4], const int64_t y[4]) {
    const int64_t pixels = c.out_h * c.out_w, farthest = std::max({x[1], y[1], pixels});
    const bool reads_all = pixels == c.h * c.w;
    return c.kh == 1 && c.kw == 1 && c.pad_h == 0 && c.pad_w == 0 && pixels % k.lanes == 0 &&
           pixels / k.lanes >= (reads_all ? MIN_VECTORS : 1) && rows_follow(x, c.h, c.w) &&
           rows_follow(y, c.out_h, c.out_w) && std::min(x[1], y[1]) >= 0 && c.h * c.w <= INT32_MAX &&
           (reads_all || c.in * pixels * int64_t(sizeof(float)) <= MAX_COPY) &&
           std::max(c.in, c.out) * farthest * int64_t(sizeof(float)) <= INT32_MAX;
}

Grid grid_of(const granet_conv& c) {
    Grid grid{c.out_h * c.out_w, c.h * c.w, {}};
    if (grid.pixels == grid.image) return grid;
    for (int64_t i = 0; i < c.out_h; ++i)
        for (int64_t j = 0; j < c.out_w; ++j) grid.at.push_back(int32_t(i * c.stride_h * c.w + j * c.stride_w));
    return grid;
}

int gather_direct(const KernelSet& k, granet_layout* layout, bool by_output, const granet_conv& c, const Images& source,
                  const float* weight, const float* bias, float* out, const int64_t out_strides[4], int threads) {
    const Grid grid = grid_of(c), all{grid.pixels, grid.pixels, {}};
    const Grid& read = by_output ? grid : all;
    const int64_t rows = by_output ? c.out : c.in, channels = by_output ? c.in : c.out;
    const Tiling t = tiling(source.n, grid.pixels, k, layout->shares_rows(by_output, k.shared_rows), k.max_tile);
    const auto table = layout->table(direct_access(by_output, channel_stride_of(read, source.strides[1]), t, rows,
                                                   channels, layout->nnz()));
    const Scratch values(table->nnz() * sizeof(float));
    gather_values(*table, weight, values.as<float>(), threads);
    const int64_t chunk = table->blocks == 1 ? CHUNK : rows;
    const bool stream = goes_past_cache(source.n * rows * grid.pixels);
    const DirectPass pass{k,    t,    grid, by_output,   *table, values.as<float>(),
                          bias, rows, out,  out_strides, stream, chunk};
    const int64_t items = (t.images + t.th - 1) / t.th;
    const ThreadScratch scratch(threads, items, tile_bytes(read, t.th, channels), chunk * t.th * t.tw * t.vector);
    parallel_for(threads, items, [&](int64_t item) {
        const ThreadScratch::Lease lease(scratch);
        const int64_t image = item * t.th;
        const int th = int(std::min<int64_t>(t.th, t.images - image));
        const Tile tile = tile_of(read, source, image, th, channels, lease.first());
        for (int64_t j = 0; j < t.vectors; j += t.tw)
            run_tile(pass, tile, image, j, th, int(std::min<int64_t>(t.tw, t.vectors - j)), lease.second());
        k.fence();
    });
    return GRANET_OK;
}

void wgrad_direct(const KernelSet& k, const Table& table, const Grid& grid, const Images& gradient,
                  const Images& source, int64_t channels, const Part& part, float* sums) {
    const Tiling t = tiling(source.n, grid.pixels, k, table.access.height > 1, k.max_dot);
    const Scratch memory(tile_bytes(grid, t.th, channels));
    for (int64_t image = part.image_begin; image < part.image_end; image += t.th) {
        const int th = int(std::min<int64_t>(t.th, part.image_end - image));
        const Tile tile = tile_of(grid, source, image, th, channels, memory.bytes());
        for (int64_t j = 0; j < t.vectors; j += t.tw) {
            const int tw = int(std::min<int64_t>(t.tw, t.vectors - j));
            DotArgs args{};
            args.source = tile.data + j * t.vector;
            args.source_pitch = tile.pitch;
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

Access wgrad_direct_access(const KernelSet& k, const granet_conv& c, const Grid& grid, int64_t channel_stride,
                           granet_layout* layout) {
    const Tiling t = tiling(c.n, grid.pixels, k, layout->shares_rows(true, k.shared_rows), k.max_dot);
    return direct_access(true, channel_stride_of(grid, channel_stride), t, c.out, c.in, layout->nnz());
}

}  // namespace granet
