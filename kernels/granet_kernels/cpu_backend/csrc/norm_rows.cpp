// Batch norm of images in channels_last: rows of channels, one a pixel. A channel lies all over the memory, so that the
// images are read twice, once for the sums and once for the results.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "norm.h"
#include "parallel.h"

namespace granet {
namespace {

// Items are worth a thread, and many enough for all threads, but sums of them are to be small beside the images.
constexpr int64_t LEAST_FLOATS = 1 << 14, LEAST_ROWS = 64, MOST_ITEMS = 64;
constexpr int64_t CHANNELS = 256;  // of which one thread adds up the sums

// The rows in items. How they are cut depends on the shape alone, since sums are added up item by item: any number of
// threads gives the same bits.
class Items {
   public:
    explicit Items(const granet_norm& norm) : rows_(norm.n * norm.pixels), channels_(norm.c) {
        step_ = std::max({(rows_ + MOST_ITEMS - 1) / MOST_ITEMS, LEAST_FLOATS / channels_, LEAST_ROWS});
        step_ = (step_ + LEAST_ROWS - 1) / LEAST_ROWS * LEAST_ROWS;
    }

    int64_t count() const { return (rows_ + step_ - 1) / step_; }
    Rows rows(int64_t item) const { return {std::min(step_, rows_ - item * step_), channels_, channels_}; }
    int64_t offset(int64_t item) const { return item * step_ * channels_; }

   private:
    int64_t rows_, channels_, step_;
};

// Two sums of each item and channel.
struct Sums {
    explicit Sums(const Items& items, int64_t channels)
        : memory(2 * sizeof(double) * size_t(items.count() * channels)),
          first(memory.as<double>()),
          second(first + items.count() * channels) {}

    Scratch memory;
    double *first, *second;
};

// `count` arrays of a float a channel.
struct Arrays {
    Arrays(int count, int64_t channels) : memory(sizeof(float) * size_t(count * channels)), channels_(channels) {}
    float* operator[](int i) const { return memory.as<float>() + i * channels_; }

   private:
    Scratch memory;
    int64_t channels_;
};

// f(begin, end) for ranges of channels.
template <typename F>
void for_channels(int threads, int64_t channels, const F& f) {
    parallel_for(threads, (channels + CHANNELS - 1) / CHANNELS,
                 [&](int64_t i) { f(i * CHANNELS, std::min(channels, (i + 1) * CHANNELS)); });
}

// Puts the sum of all items in the place of the first one's, and the sum of squares about its mean (Chan et al.).
void add_moments(const Items& items, const Sums& sums, int64_t channels, int64_t begin, int64_t end) {
    double before = double(items.rows(0).count);
    for (int64_t item = 1; item < items.count(); ++item) {
        const double more = double(items.rows(item).count), weight = before * more / (before + more);
        const double *sum = sums.first + item * channels, *squares = sums.second + item * channels;
        for (int64_t c = begin; c < end; ++c) {
            const double distance = sum[c] / more - sums.first[c] / before;
            sums.second[c] += squares[c] + distance * distance * weight;
            sums.first[c] += sum[c];
        }
        before += more;
    }
}

}  // namespace

void norm_rows_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                       const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    const KernelSet& k = kernels();
    const Items items(norm);
    const Sums sums(items, norm.c);
    const Arrays arrays(2, norm.c);
    float *scale = arrays[0], *shift = arrays[1];
    parallel_for(threads, items.count(), [&](int64_t i) {
        k.rows_moments(items.rows(i), x + items.offset(i), sums.first + i * norm.c, sums.second + i * norm.c);
    });
    for_channels(threads, norm.c, [&](int64_t begin, int64_t end) {
        add_moments(items, sums, norm.c, begin, end);
        for (int64_t c = begin; c < end; ++c) {
            const double variance = sums.second[c] / count_of(norm);
            mean[c] = float(sums.first[c] / count_of(norm));
            var[c] = float(variance);
            invstd[c] = float(1.0 / std::sqrt(variance + norm.eps));
            const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
            scale[c] = a.scale;
            shift[c] = a.shift;
        }
    });
    parallel_for(threads, items.count(), [&](int64_t i) {
        const int64_t item = items.count() - 1 - i, at = items.offset(item);  // the last are still in the cache
        k.rows_apply(items.rows(item), RowsApply{x + at, residual ? residual + at : nullptr, y + at, scale, shift,
                                                 norm.relu != 0, stream(norm)});
        k.fence();
    });
}

void norm_rows_backward(const granet_norm& norm, const float* g, const float* x, const float* y, const float* gamma,
                        const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                        float* dgamma, float* dbeta, int threads) {
    const KernelSet& k = kernels();
    const Items items(norm);
    const Sums sums(items, norm.c);
    const Arrays arrays(4, norm.c);
    float *scale = arrays[0], *shift = arrays[1], *factor = arrays[2], *offset = arrays[3];
    for (int64_t c = 0; c < norm.c; ++c) {
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        scale[c] = a.scale;
        shift[c] = a.shift;
    }
    const auto part = [&](int64_t item) {
        const int64_t at = items.offset(item);
        return RowsGradient{g + at,    x + at, y ? y + at : nullptr, scale,
                            shift,     mean,   dx + at,              dresidual ? dresidual + at : nullptr,
                            norm.relu != 0, stream(norm)};
    };
    parallel_for(threads, items.count(), [&](int64_t i) {
        k.rows_gradient_sums(items.rows(i), part(i), sums.first + i * norm.c, sums.second + i * norm.c);
    });
    for_channels(threads, norm.c, [&](int64_t begin, int64_t end) {
        for (int64_t item = 1; item < items.count(); ++item) {
            for (int64_t c = begin; c < end; ++c) {
                sums.first[c] += sums.first[item * norm.c + c];
                sums.second[c] += sums.second[item * norm.c + c];
            }
        }
        for (int64_t c = begin; c < end; ++c) {
            const double sum = sums.first[c], product = sums.second[c];
            dbeta[c] = float(sum);
            dgamma[c] = float(product * double(invstd[c]));
            const Correction d = correction(scale[c], mean[c], invstd[c], sum, product, count_of(norm));
            factor[c] = d.factor;
            offset[c] = d.offset;
        }
    });
    parallel_for(threads, items.count(), [&](int64_t i) {
        const int64_t item = items.count() - 1 - i;  // the last are still in the cache
        k.rows_gradient_apply(items.rows(item), part(item), factor, offset);
        k.fence();
    });
}

}  // namespace granet
