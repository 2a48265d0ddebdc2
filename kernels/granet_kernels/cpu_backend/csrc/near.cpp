// 3 x 3 convolutions with stride 1 and padding 1 of images whose rows fill vectors, as they lie in memory: nothing is
// packed. A tile is some rows of one image's channel, one behind the other. What a tap would read beyond the image is
// masked.
#include "near.h"

#include <algorithm>
#include <cstring>

#include "gather.h"
#include "parallel.h"
#include "sums.h"

namespace granet {
namespace {

constexpr int64_t SIZE = sizeof(float);
constexpr int64_t MOST_TOGETHER = 8;  // images that a thread takes, each prefetched during the one before it

const char* at(const float* data, int64_t floats) { return reinterpret_cast<const char*>(data + floats); }

// Each tap, by its number.
struct Taps {
    Tap of[WHOLE_TAPS];

    Taps(int64_t w, int lanes) {
        const auto all = LaneMask((1u << lanes) - 1);
        for (int number = 0; number < WHOLE_TAPS; ++number) {
            const int dx = number % 3 - 1;
            const auto left = LaneMask(dx < 0 ? all & ~1u : all), right = LaneMask(dx > 0 ? all >> 1 : all);
            of[number] = {(number / 3 * w + dx) * SIZE - number, {left, all, right, LaneMask(left & right)}};
        }
    }
};

// An image whose channels have a row of zeros above and below.
int64_t panel_pitch(const granet_conv& c) { return (c.h + 2) * c.w * SIZE; }

void pack_image(const KernelSet& k, const granet_conv& c, const float* image, int64_t channel_stride, int64_t channels,
                char* panel) {
    const int64_t row = c.w * SIZE;
    for (int64_t channel = 0; channel < channels; ++channel, panel += panel_pitch(c)) {
        std::memset(panel, 0, row);
        k.copy(at(image, channel * channel_stride), reinterpret_cast<float*>(panel + row), c.h * c.w / k.lanes, false);
        std::memset(panel + panel_pitch(c) - row, 0, row);
    }
}

Access near_access(const KernelSet& k, const granet_conv& c, bool by_output, int64_t nnz) {
    const NearKernel& kernel = *k.find_near(c.h, c.w);
    Access access;
    access.by_output = by_output;
    access.channel_pitch = panel_pitch(c);
    for (int tap = 0; tap < WHOLE_TAPS; ++tap) {
        access.phase.push_back(0);
        access.tap_offset.push_back(by_output ? tap : WHOLE_TAPS - 1 - tap);
    }
    const int64_t rows = by_output ? c.out : c.in, channels = by_output ? c.in : c.out;
    const int64_t tile = kernel.height * c.w * SIZE, footprint = tile + 2 * c.w * SIZE;
    access.block = block_of(footprint, tile, channels, double(nnz) / double(rows * channels), false);
    return access;
}

// Forward, or the input gradient.
struct NearPass {
    NearPass(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& conv,
             const Images& images, const float* weight, const float* bias_, float* out_, const int64_t* out_strides_,
             int threads)
        : k(kernels),
          kernel(*k.find_near(conv.h, conv.w)),
          c(conv),
          rows(by_output ? c.out : c.in),
          channels(by_output ? c.in : c.out),
          table(layout->table(near_access(k, c, by_output, layout->nnz()))),
          values(table->nnz() * SIZE),
          taps(c.w, k.lanes),
          source(images),
          bias(bias_),
          out(out_),
          out_strides(out_strides_),
          stream(goes_past_cache(source.n * rows * c.h * c.w)),
          chunk(table->blocks == 1 ? CHUNK : rows) {
        gather_values(*table, weight, values.as<float>(), threads);
    }
    size_t panel_bytes() const { return channels * panel_pitch(c); }
    size_t vectors_bytes() const { return chunk * kernel.height * c.w * SIZE; }

    // One image. ahead: of as many bytes as its own, to be prefetched; or NULL.
    void run(int64_t image, const char* ahead, char* panel, char* vectors) const {
        pack_image(k, c, source.data + image * source.strides[0], source.strides[1], channels, panel);
        const int64_t tiles = c.h / kernel.height, tile = kernel.height * c.w;
        TileArgs args{};
        args.taps = taps.of;
        args.offset = table->offset.data();
        args.value = values.as<float>();
        args.out = vectors;
        args.out_row = tile * SIZE;
        args.ahead_step = ahead ? channels * c.h * c.w * SIZE / (rows * tiles * table->blocks) : 0;
        for (int64_t y = 0; y < c.h; y += kernel.height) {
            args.source = panel + y * c.w * SIZE;
            for (int64_t begin = 0; begin < rows; begin += chunk) {
                const int64_t end = std::min(begin + chunk, rows);
                args.rows = end - begin;
                args.bias = bias ? bias + begin : nullptr;
                for (int64_t block = 0; block < table->blocks; ++block) {
                    args.ptr = table->row_ptr(0, block, begin);
                    args.order = table->order_of(0, block, begin, end);
                    args.accumulate = block > 0;
                    args.ahead = ahead;
                    if (ahead) ahead += args.ahead_step * args.rows;
                    kernel.tile(args);
                }
                for (int64_t row = begin; row < end; ++row)
                    k.copy(vectors + (row - begin) * args.out_row,
                           out + image * out_strides[0] + row * out_strides[1] + y * c.w, tile / k.lanes, stream);
            }
        }
        k.fence();
    }

    const KernelSet& k;
    const NearKernel& kernel;
    const granet_conv& c;
    int64_t rows, channels;
    std::shared_ptr<const Table> table;
    Scratch values;
    Taps taps;
    const Images& source;
    const float* bias;
    float* out;
    const int64_t* out_strides;
    bool stream;
    int64_t chunk;
};

// The weight gradient that an image gives, of rows [begin, end).
struct NearDots {
    const KernelSet& k;
    const granet_conv& c;
    const Table& table;
    const Images& source;

    // gradient: of the first row, whose rows are so many bytes apart.
    void add(int64_t image, const char* gradient, ptrdiff_t gradient_row, int64_t begin, int64_t end, const char* ahead,
             char* panel, float* sums) const {
        const NearKernel& kernel = *k.find_near(c.h, c.w);
        const Taps taps(c.w, k.lanes);
        pack_image(k, c, source.data + image * source.strides[0], source.strides[1], c.in, panel);
        DotArgs args{};
        args.taps = taps.of;
        args.gradient_row = gradient_row;
        args.offset = table.offset.data();
        args.rows = end - begin;
        args.sum = sums;
        args.ahead_step = ahead ? c.in * c.h * c.w * SIZE / (args.rows * c.h / kernel.height * table.blocks) : 0;
        for (int64_t y = 0; y < c.h; y += kernel.height) {
            args.source = panel + y * c.w * SIZE;
            args.gradient = gradient + y * c.w * SIZE;
            for (int64_t block = 0; block < table.blocks; ++block) {
                args.ptr = table.row_ptr(0, block, begin);
                args.order = table.order_of(0, block, begin, end);
                args.ahead = ahead;
                if (ahead) ahead += args.ahead_step * args.rows;
                kernel.dot(args);
            }
        }
    }
};

}  // namespace

bool near_applies(const KernelSet& k, const granet_conv& c, const int64_t x[4], const int64_t y[4]) {
    const auto fits = [&](const int64_t s[4]) {
        return s[3] == 1 && s[2] == c.w && s[1] >= c.h * c.w && s[1] * SIZE % TAP_UNIT == 0;
    };
    return c.kh == 3 && c.kw == 3 && c.stride_h == 1 && c.stride_w == 1 && c.pad_h == 1 && c.pad_w == 1 &&
           c.dil_h == 1 && c.dil_w == 1 && fits(x) && fits(y) && k.find_near(c.h, c.w) != nullptr &&
           std::max(c.in, c.out) * std::max(x[1], y[1]) * SIZE <= INT32_MAX;
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
            pass.run(image, image + 1 < end ? at(source.data, (image + 1) * source.strides[0]) : nullptr, lease.first(),
                     lease.second());
    });
    return GRANET_OK;
}

int wgrad_near(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
               const Images& source, float* dw, int threads) {
    const auto table = layout->table(near_access(k, c, true, layout->nnz()));
    const NearDots dots{k, c, *table, source};
    const ThreadScratch scratch(threads, threads, c.in * panel_pitch(c), 0);
    sum_chunks(k, *layout, *table, cut_of(*layout, c.n, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   for (int64_t image = begin; image < end; ++image)
                       dots.add(image,
                                at(gradient.data, image * gradient.strides[0] + row_begin * gradient.strides[1]),
                                gradient.strides[1] * SIZE, row_begin, row_end,
                                image + 1 < end ? at(source.data, (image + 1) * source.strides[0]) : nullptr,
                                lease.first(), sums);
               });
    return GRANET_OK;
}

bool near_reads_once(const granet_layout& layout, const granet_conv& c, int threads) {
    return is_even(cut_of(layout, c.n, threads), threads);
}

void backward_near(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Images& gradient,
                   const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                   int threads) {
    const NearPass dgrad(k, layout, false, c, gradient, weight, nullptr, dx, dx_strides, threads);
    const auto table = layout->table(near_access(k, c, true, layout->nnz()));
    const NearDots dots{k, c, *table, source};
    const ThreadScratch scratch(threads, threads, dgrad.panel_bytes(),
                                std::max<size_t>(dgrad.vectors_bytes(), c.in * panel_pitch(c)));
    sum_chunks(k, *layout, *table, cut_of(*layout, c.n, threads), dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   const char* packed = lease.first() + c.w * SIZE + row_begin * panel_pitch(c);
                   for (int64_t image = begin; image < end; ++image) {
                       dgrad.run(image, at(source.data, image * source.strides[0]), lease.first(), lease.second());
                       dots.add(image, packed, panel_pitch(c), row_begin, row_end,
                                image + 1 < end ? at(gradient.data, (image + 1) * gradient.strides[0]) : nullptr,
                                lease.second(), sums);
                   }
               });
}

}  // namespace granet
