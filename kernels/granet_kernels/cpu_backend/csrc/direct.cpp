// 1 x 1 convolutions of images whose pixels lie in a row: the images are panels as they are, a vector holds pixels of
// one channel, and nothing is packed. The tile's rows are images. Of x, where the convolution has a stride, the pixels
// that count are copied into a row first, a tile of images at a time, and those of its gradient are spread at the end.
#include "direct.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "gather.h"
#include "grid.h"
#include "parallel.h"
#include "sums.h"

namespace granet {
namespace {

// Of an image's channel; with fewer, a panel of images fills the registers better, if it packs no pixel for nothing.
constexpr int64_t MIN_VECTORS = 4;
constexpr int64_t MAX_COPY = int64_t(4) << 20;  // bytes of an image's pixels that count

bool rows_follow(const int64_t strides[4], int64_t h, int64_t w) {
    return (strides[3] == 1 || w == 1) && (strides[2] == w || h == 1);
}

struct Tiling {
    int64_t vectors, vector;  // of an image's channel, bytes of one
    int th, tw;
    int height;  // rows of the weight at a time, which share their entries
};

Tiling tiling_of(int64_t images, int64_t pixels, const KernelSet& k, bool shares_rows, int own) {
    Tiling t{pixels / k.lanes, k.lanes * int64_t(sizeof(float)), 1, 1, shares_rows ? k.shared_rows : 1};
    const int largest = shares_rows ? KernelSet::max_shared : own;
    t.tw = tile_width(t.vectors, largest);
    if (t.tw == t.vectors) t.th = int(std::min<int64_t>({KernelSet::max_th, largest / t.tw, images}));
    return t;
}

// Of the pixels `read` of images: in place, or copied into a row.
Access access_of(const granet_layout& layout, bool by_output, const Grid& read, const Images& images, const Tiling& t) {
    const int64_t stride = read.has_all() ? images.strides[1] : read.pixels();
    Access access;
    access.by_output = by_output;
    access.channel_pitch = stride * int64_t(sizeof(float));
    access.height = t.height;
    access.phase = {0};
    access.tap_offset = {0};
    const int64_t tile = t.th * t.tw * t.vector;
    access.block = block_of(tile, tile, layout.shape[by_output ? 1 : 0], layout.density(), Taps::one);
    return access;
}

// Where a tile of images is read from, and how far apart they are, in bytes.
struct Tile {
    const char* data;
    ptrdiff_t pitch;
};

// `count` images in place, or in `memory` [image][channel][pixel] the pixels that count.
Tile tile_of(const KernelSet& k, const Grid& grid, const Images& source, int64_t image, int count, int64_t channels,
             char* memory) {
    constexpr auto size = ptrdiff_t(sizeof(float));
    const int64_t* s = source.strides;
    if (grid.has_all()) return {at(source.data, image * s[0]), s[0] * size};
    auto* to = reinterpret_cast<float*>(memory);
    for (int64_t a = image; a < image + count; ++a)
        for (int64_t c = 0; c < channels; ++c, to += grid.pixels())
            grid.take(k, source.data + a * s[0] + c * s[1], 2 * s[1], to);
    return {memory, channels * grid.pixels() * size};
}

size_t tile_bytes(const Grid& grid, int64_t images, int64_t channels) {
    return grid.has_all() ? 0 : size_t(images * channels * grid.pixels()) * sizeof(float);
}

// Forward, or the input gradient.
struct DirectPass {
    DirectPass(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& c,
               const Images& images, const float* weight, const float* bias, float* out, const int64_t* out_strides,
               int threads)
        : k(kernels),
          grid(grid_of(c)),
          read(by_output ? grid : Grid{1, grid.pixels(), grid.pixels(), 1, grid.pixels(), 1}),
          spreads(!by_output && !grid.has_all()),
          channels(by_output ? c.in : c.out),
          tiling(tiling_of(images.n, grid.pixels(), k, layout->shares_rows(by_output, k.shared_rows), k.max_tile)),
          pass(layout->table(access_of(*layout, by_output, read, images, tiling)), weight, bias, out, out_strides,
               images.n * (by_output ? c.out * grid.pixels() : c.in * grid.image()), threads),
          source(images) {}
    size_t tile_bytes() const { return granet::tile_bytes(read, tiling.th, channels); }
    // Of finished tiles, and of a channel whose pixels are spread.
    size_t vectors_bytes() const { return pass.chunk * tiling.th * tiling.tw * tiling.vector + line_bytes(); }
    // Whether a channel is put together in memory of its own, and copied from there.
    bool has_line() const { return spreads && tiling.tw == tiling.vectors && grid.image() % k.lanes == 0; }
    size_t line_bytes() const { return has_line() ? size_t(grid.image()) * sizeof(float) : 0; }

    void run(int64_t image, int th, char* memory, char* vectors) const;
    void store(const char* from, int64_t j, int tw, float* channel, float* line) const;

    const KernelSet& k;
    Grid grid, read;
    bool spreads;
    int64_t channels;
    Tiling tiling;
    RowsPass pass;
    const Images& source;
};

// th images, every row.
void DirectPass::run(int64_t image, int th, char* memory, char* vectors) const {
    const Tile tile = tile_of(k, read, source, image, th, channels, memory);
    auto* line = reinterpret_cast<float*>(vectors);
    std::memset(line, 0, line_bytes());
    TileArgs args{};
    args.source_pitch = tile.pitch;
    args.out = vectors + line_bytes();
    args.out_step = tiling.vector;
    for (int64_t j = 0; j < tiling.vectors; j += tiling.tw) {
        const int tw = int(std::min<int64_t>(tiling.tw, tiling.vectors - j));
        args.source = tile.data + j * tiling.vector;
        args.out_pitch = tw * args.out_step;
        args.out_row = th * args.out_pitch;
        pass.run(args, k.tile(th, tw, tiling.height > 1), [&](int64_t row, const char* finished) {
            for (int a = 0; a < th; ++a)
                store(finished + a * args.out_pitch, j, tw, pass.channel(image + a, row), line);
        });
    }
    k.fence();
}

// tw vectors of pixels of a channel, from vector j on.
void DirectPass::store(const char* from, int64_t j, int tw, float* channel, float* line) const {
    if (!spreads) return k.copy(from, channel + j * k.lanes, tw, pass.stream);
    const auto* pixels = reinterpret_cast<const float*>(from);
    if (!has_line()) return grid.put_part(pixels, j * k.lanes, tw * k.lanes, channel);
    grid.put(k, pixels, line);
    k.copy(reinterpret_cast<const char*>(line), channel, grid.image() / k.lanes, pass.stream);
}

// The weight gradient that images give.
struct DirectDots {
    DirectDots(const KernelSet& kernels, granet_layout* layout, const granet_conv& c, const Images& gradient_,
               const Images& source_)
        : k(kernels),
          grid(grid_of(c)),
          channels(c.in),
          tiling(tiling_of(source_.n, grid.pixels(), k, layout->shares_rows(true, k.shared_rows), k.max_dot)),
          table(layout->table(access_of(*layout, true, grid, source_, tiling))),
          gradient(gradient_),
          source(source_) {}
    size_t tile_bytes() const { return granet::tile_bytes(grid, tiling.th, channels); }

    // th images, rows [row_begin, row_end).
    void add(int64_t image, int th, int64_t row_begin, int64_t row_end, char* memory, float* sums) const {
        const Tile tile = tile_of(k, grid, source, image, th, channels, memory);
        DotArgs args{};
        args.source_pitch = tile.pitch;
        args.gradient_pitch = gradient.strides[0] * ptrdiff_t(sizeof(float));
        args.gradient_row = gradient.strides[1] * ptrdiff_t(sizeof(float));
        args.sum = sums;
        for (int64_t j = 0; j < tiling.vectors; j += tiling.tw) {
            const int tw = int(std::min<int64_t>(tiling.tw, tiling.vectors - j));
            args.source = tile.data + j * tiling.vector;
            args.gradient =
                at(gradient.data, image * gradient.strides[0] + row_begin * gradient.strides[1] + j * k.lanes);
            for_blocks(*table, row_begin, row_end, args, k.dot(th, tw, tiling.height > 1));
        }
    }

    const KernelSet& k;
    Grid grid;
    int64_t channels;
    Tiling tiling;
    std::shared_ptr<const Table> table;
    const Images &gradient, &source;
};

// Images that a chunk of a weight gradient holds whole groups of, so that both gradients have the same tiles whether
// they are computed together or not: a narrower tile adds in another order.
int64_t images_together(const KernelSet& k, granet_layout* layout, const granet_conv& c) {
    const auto th = [&](bool by_output, int own) -> int64_t {
        return tiling_of(c.n, c.out_h * c.out_w, k, layout->shares_rows(by_output, k.shared_rows), own).th;
    };
    return std::lcm(th(false, k.max_tile), th(true, k.max_dot));
}

Cut cut_of_images(const granet_layout& layout, const granet_conv& c, int64_t together, int threads) {
    return cut_of(layout, (c.n + together - 1) / together, threads);
}

// f(image, count) for images [begin, end), at most `most` at a time.
template <typename F>
void for_images(int64_t begin, int64_t end, int64_t most, const F& f) {
    for (int64_t image = begin; image < end; image += most) f(image, int(std::min(most, end - image)));
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

int gather_direct(const KernelSet& k, granet_layout* layout, bool by_output, const granet_conv& c, const Images& source,
                  const float* weight, const float* bias, float* out, const int64_t out_strides[4], int threads) {
    const DirectPass pass(k, layout, by_output, c, source, weight, bias, out, out_strides, threads);
    const int64_t together = pass.tiling.th, items = (source.n + together - 1) / together;
    const ThreadScratch scratch(threads, items, pass.tile_bytes(), pass.vectors_bytes());
    parallel_for(threads, items, [&](int64_t item) {
        const ThreadScratch::Lease lease(scratch);
        const int64_t image = item * together;
        pass.run(image, int(std::min(together, source.n - image)), lease.first(), lease.second());
    });
    return GRANET_OK;
}

int wgrad_direct(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                 const Images& source, float* dw, int threads) {
    const DirectDots dots(k, layout, c, gradient, source);
    const int64_t together = images_together(k, layout, c);
    const ThreadScratch scratch(threads, threads, dots.tile_bytes(), 0);
    sum_chunks(k, *layout, *dots.table, cut_of_images(*layout, c, together, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   const int64_t last = std::min(end * together, c.n);
                   for_images(begin * together, last, dots.tiling.th, [&](int64_t image, int count) {
                       dots.add(image, count, row_begin, row_end, lease.first(), sums);
                   });
               });
    return GRANET_OK;
}

bool direct_reads_once(const KernelSet& k, granet_layout* layout, const granet_conv& c, int threads) {
    return is_even(cut_of_images(*layout, c, images_together(k, layout, c), threads), threads);
}

// Few images at a time, whose gradient stays in the second-level cache between the two.
int backward_direct(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                    const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                    int threads) {
    const DirectPass dgrad(k, layout, false, c, gradient, weight, nullptr, dx, dx_strides, threads);
    const DirectDots dots(k, layout, c, gradient, source);
    const ThreadScratch scratch(threads, threads, std::max(dgrad.tile_bytes(), dots.tile_bytes()),
                                dgrad.vectors_bytes());
    const int64_t together = images_together(k, layout, c);
    sum_chunks(k, *layout, *dots.table, cut_of_images(*layout, c, together, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   for_images(begin * together, std::min(end * together, c.n), together, [&](int64_t first, int count) {
                       for_images(first, first + count, dgrad.tiling.th, [&](int64_t image, int th) {
                           dgrad.run(image, th, lease.first(), lease.second());
                       });
                       for_images(first, first + count, dots.tiling.th, [&](int64_t image, int th) {
                           dots.add(image, th, row_begin, row_end, lease.first(), sums);
                       });
                   });
               });
    return GRANET_OK;
}

}  // namespace granet
