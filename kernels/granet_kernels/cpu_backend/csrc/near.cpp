// 3 x 3 convolutions with padding 1, to images whose rows fill vectors: image by image, each copied, not transposed. A
// tile is some rows of a channel, one behind the other.
#include "near.h"

#include <algorithm>

#include "gather.h"
#include "near_panel.h"
#include "parallel.h"
#include "sums.h"

namespace granet {
namespace {

constexpr int64_t SIZE = sizeof(float);
constexpr int64_t MAX_PANEL = int64_t(16) << 20;  // bytes of one image
// Measured on 16 to 128 channels of 16 x 16 and 32 x 32 pixels.
constexpr double FEW = 0.11, FEW_A_CHANNEL = 25;
constexpr int64_t MOST_TOGETHER = 8;  // images that a thread takes, each prefetched during the one before it

Access near_access(const KernelSet& k, const NearPanel& panel, const granet_conv& c, bool by_output,
                   const granet_layout& layout) {
    const NearKernel& kernel = *k.find_near(c.out_h, c.out_w);
    Access access;
    access.by_output = by_output;
    access.channel_pitch = panel.pitch();
    for (int tap = 0; tap < WHOLE_TAPS; ++tap) {
        access.phase.push_back(0);
        access.tap_offset.push_back(by_output ? tap : WHOLE_TAPS - 1 - tap);
    }
    const int64_t tile = kernel.height * panel.row(), footprint = panel.planes() * tile + 2 * panel.row();
    const double density = layout.density() * WHOLE_TAPS;  // of all taps of a channel
    access.block = block_of(footprint, tile, by_output ? c.in : c.out, density, Taps::together);
    return access;
}

// Memory that will be read next.
struct Ahead {
    const char* data;
    int64_t bytes;
};

// An image of so many channels, or nothing behind the last one, `end`.
Ahead image_ahead(const Images& images, int64_t image, int64_t end, int64_t channels) {
    if (image >= end) return {at(images.data, 0), 0};
    return {at(images.data, image * images.strides[0]), channels * images.strides[1] * SIZE};
}

// Forward, or the input gradient.
struct NearPass {
    NearPass(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& conv,
             const Images& images, const float* weight, const float* bias, float* out, const int64_t* out_strides,
             int threads)
        : k(kernels),
          kernel(*k.find_near(conv.out_h, conv.out_w)),
          c(conv),
          channels(by_output ? c.in : c.out),
          near(k, c.out_h, c.out_w, by_output ? c.stride_h : 1),
          pass(layout->table(near_access(k, near, c, by_output, *layout)), weight, bias, out, out_strides,
               images.n * (by_output ? c.out : c.in) * c.out_h * c.out_w, threads),
          source(images) {}
    size_t panel_bytes() const { return channels * near.pitch(); }
    size_t vectors_bytes() const { return pass.chunk * kernel.height * near.row(); }

    // One image. ahead: what is prefetched meanwhile.
    void run(int64_t image, Ahead ahead, char* panel, char* vectors) const {
        near.pack(source.data + image * source.strides[0], source.strides[1], channels, panel);
        const int64_t tile = kernel.height * c.out_w;
        TileArgs args{};
        args.taps = near.taps();
        args.out = vectors;
        args.out_row = tile * SIZE;
        args.ahead_step = ahead.bytes / (pass.table->rows * pass.table->blocks * (c.out_h / kernel.height));
        args.ahead = ahead.data;
        const auto multiply = [&](TileArgs& of_block) {
            kernel.tile(of_block);
            of_block.ahead += of_block.ahead_step * of_block.rows;
        };
        for (int64_t y = 0; y < c.out_h; y += kernel.height) {
            args.source = panel + y * near.row();
            pass.run(args, multiply, [&](int64_t row, const char* finished) {
                k.copy(finished, pass.channel(image, row) + y * c.out_w, tile / k.lanes, pass.stream);
            });
        }
        k.fence();
    }

    const KernelSet& k;
    const NearKernel& kernel;
    const granet_conv& c;
    int64_t channels;
    NearPanel near;
    RowsPass pass;
    const Images& source;
};

// The weight gradient that an image gives, of rows [begin, end).
struct NearDots {
    NearDots(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& images)
        : k(kernels),
          c(conv),
          near(k, c.out_h, c.out_w, c.stride_h),
          table(layout->table(near_access(k, near, c, true, *layout))),
          source(images) {}
    size_t panel_bytes() const { return c.in * near.pitch(); }

    // gradient: of the first row, whose rows are so many bytes apart.
    void add(int64_t image, const char* gradient, ptrdiff_t gradient_row, int64_t begin, int64_t end, Ahead ahead,
             char* panel, float* sums) const {
        const NearKernel& kernel = *k.find_near(c.out_h, c.out_w);
        near.pack(source.data + image * source.strides[0], source.strides[1], c.in, panel);
        DotArgs args{};
        args.taps = near.taps();
        args.gradient_row = gradient_row;
        args.sum = sums;
        args.ahead_step = ahead.bytes / ((end - begin) * table->blocks * (c.out_h / kernel.height));
        args.ahead = ahead.data;
        const auto multiply = [&](DotArgs& of_block) {
            kernel.dot(of_block);
            of_block.ahead += of_block.ahead_step * of_block.rows;
        };
        for (int64_t y = 0; y < c.out_h; y += kernel.height) {
            args.source = panel + y * near.row();
            args.gradient = gradient + y * near.row();
            for_blocks(*table, begin, end, args, multiply);
        }
    }

    const KernelSet& k;
    const granet_conv& c;
    NearPanel near;
    std::shared_ptr<const Table> table;
    const Images& source;
};

// Whether images of these strides have rows one behind the other.
bool has_rows(const int64_t strides[4], int64_t h, int64_t w) {
    return strides[3] == 1 && strides[2] == w && strides[1] >= h * w;
}

// Vectors that begin anywhere are slower to multiply with, by a fifth, than those of panels, which take longer to pack.
bool pays(const granet_layout& layout, const granet_conv& c) {
    return layout.density() <= FEW || double(layout.nnz()) <= FEW_A_CHANNEL * double(c.in + c.out);
}

bool takes(const KernelSet& k, const granet_conv& c) {
    return c.kh == 3 && c.kw == 3 && c.stride_h == c.stride_w && c.stride_h <= 2 && c.pad_h == 1 && c.pad_w == 1 &&
           c.dil_h == 1 && c.dil_w == 1 && c.h == c.stride_h * c.out_h && c.w == c.stride_w * c.out_w &&
           k.find_near(c.out_h, c.out_w) != nullptr &&
           std::max(c.in, c.out) * NearPanel(k, c.out_h, c.out_w, c.stride_h).pitch() <= MAX_PANEL;
}

}  // namespace

bool near_applies(const KernelSet& k, const granet_layout& layout, const granet_conv& c, const int64_t x[4],
                  const int64_t y[4]) {
    return pays(layout, c) && takes(k, c) && has_rows(x, c.h, c.w) && has_rows(y, c.out_h, c.out_w);
}

int gather_near(const KernelSet& k, granet_layout* layout, bool by_output, const granet_conv& c, const Images& source,
                const float* weight, const float* bias, float* out, const int64_t out_strides[4], int threads) {
    const NearPass pass(k, layout, by_output, c, source, weight, bias, out, out_strides, threads);
    const int64_t together = std::clamp<int64_t>(source.n / (4 * threads), 1, MOST_TOGETHER);
    const int64_t items = (source.n + together - 1) / together;
    const ThreadScratch scratch(threads, items, pass.panel_bytes(), pass.vectors_bytes());
    parallel_for(threads, items, [&](int64_t item) {
        const ThreadScratch::Lease lease(scratch);
        const int64_t end = std::min(source.n, (item + 1) * together);
        for (int64_t image = item * together; image < end; ++image)
            pass.run(image, image_ahead(source, image + 1, end, pass.channels), lease.first(), lease.second());
    });
    return GRANET_OK;
}

int wgrad_near(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
               const Images& source, float* dw, int threads) {
    const NearDots dots(k, layout, c, source);
    const ThreadScratch scratch(threads, threads, dots.panel_bytes(), 0);
    sum_chunks(k, *layout, *dots.table, cut_of(*layout, c.n, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   for (int64_t image = begin; image < end; ++image)
                       dots.add(image,
                                at(gradient.data, image * gradient.strides[0] + row_begin * gradient.strides[1]),
                                gradient.strides[1] * SIZE, row_begin, row_end,
                                image_ahead(source, image + 1, end, c.in), lease.first(), sums);
               });
    return GRANET_OK;
}

bool near_reads_once(const granet_layout& layout, const granet_conv& c, int threads) {
    return is_even(cut_of(layout, c.n, threads), threads);
}

int backward_near(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                  const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                  int threads) {
    const NearPass dgrad(k, layout, false, c, gradient, weight, nullptr, dx, dx_strides, threads);
    const NearDots dots(k, layout, c, source);
    const ThreadScratch scratch(threads, threads, dgrad.panel_bytes(),
                                std::max(dgrad.vectors_bytes(), dots.panel_bytes()));
    sum_chunks(k, *layout, *dots.table, cut_of(*layout, c.n, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   const char* packed = lease.first() + dgrad.near.row() + row_begin * dgrad.near.pitch();
                   for (int64_t image = begin; image < end; ++image) {
                       dgrad.run(image, image_ahead(source, image, end, c.in), lease.first(), lease.second());
                       dots.add(image, packed, dgrad.near.pitch(), row_begin, row_end,
                                image_ahead(gradient, image + 1, end, c.out), lease.second(), sums);
                   }
               });
    return GRANET_OK;
}

}  // namespace granet
