// Batch norm of images as rows. A channel lies all over the memory, so that the images are read twice, once for the sums
// and once for the results.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "norm.h"
#include "parallel.h"

namespace granet {
namespace {

// Images in channels_last are rows of channels, one a pixel. In NCHW a row is a whole image, and as many columns of it as
// there are pixels belong to one channel.
struct Matrix {
    explicit Matrix(const granet_norm& norm)
        : rows(norm.channels_last ? norm.n * norm.pixels : norm.n),
          repeat(norm.channels_last ? 1 : norm.pixels),
          columns(norm.c * repeat) {}
    int64_t rows, repeat, columns;
};

// Items are worth a thread, and many enough for all threads, but sums of them are to be small beside the images.
constexpr int64_t LEAST_FLOATS = 1 << 14, LEAST_ROWS = 64, MOST_ITEMS = 64;
constexpr int64_t COLUMNS = 256;  // of which one thread adds up the sums

// The rows in items. How they are cut depends on the shape alone, since sums are added up item by item: any number of
// threads gives the same bits.
class Items {
   public:
    explicit Items(const Matrix& matrix) : rows_(matrix.rows), columns_(matrix.columns) {
        step_ = std::max({(rows_ + MOST_ITEMS - 1) / MOST_ITEMS, LEAST_FLOATS / columns_, LEAST_ROWS});
        step_ = (step_ + LEAST_ROWS - 1) / LEAST_ROWS * LEAST_ROWS;
    }

    int64_t count() const { return (rows_ + step_ - 1) / step_; }
    Rows rows(int64_t item) const { return {std::min(step_, rows_ - item * step_), columns_}; }
    int64_t offset(int64_t item) const { return item * step_ * columns_; }

   private:
    int64_t rows_, columns_, step_;
};

// Two sums of each item and column.
struct Sums {
    explicit Sums(const Items& items, int64_t columns)
        : memory(2 * sizeof(double) * size_t(items.count() * columns)),
          first(memory.as<double>()),
          second(first + items.count() * columns) {}

    Scratch memory;
    double *first, *second;
};

// `count` arrays of a float a column.
struct Arrays {
    Arrays(int count, int64_t columns) : memory(sizeof(float) * size_t(count * columns)), columns_(columns) {}
    float* operator[](int i) const { return memory.as<float>() + i * columns_; }

   private:
    Scratch memory;
    int64_t columns_;
};

// f(begin, end) for ranges of channels.
template <typename F>
void for_channels(int threads, const Matrix& matrix, const F& f) {
    const int64_t channels = matrix.columns / matrix.repeat, piece = std::max<int64_t>(1, COLUMNS / matrix.repeat);
    parallel_for(threads, (channels + piece - 1) / piece,
                 [&](int64_t i) { f(i * piece, std::min(channels, (i + 1) * piece)); });
}

// Puts the sum of all items in the place of the first one's, and the sum of squares about its mean (Chan et al.).
void add_moments(const Items& items, const Sums& sums, int64_t columns, int64_t begin, int64_t end) {
    double before = double(items.rows(0).count);
    for (int64_t item = 1; item < items.count(); ++item) {
        const double more = double(items.rows(item).count), weight = before * more / (before + more);
        const double *sum = sums.first + item * columns, *squares = sums.second + item * columns;
        for (int64_t c = begin; c < end; ++c) {
            const double distance = sum[c] / more - sums.first[c] / before;
            sums.second[c] += squares[c] + distance * distance * weight;
            sums.first[c] += sum[c];
        }
        before += more;
    }
}

// The sum of `repeat` columns of so many rows, and the sum of squares about its mean.
struct Moments {
    double sum, squares;
};
Moments moments_of(const Sums& sums, double rows, int64_t column, int64_t repeat) {
    Moments m{sums.first[column], sums.second[column]};
    double before = rows;
    for (int64_t i = column + 1; i < column + repeat; ++i) {
        const double distance = sums.first[i] / rows - m.sum / before, weight = before * rows / (before + rows);
        m.squares += sums.second[i] + distance * distance * weight;
        m.sum += sums.first[i];
        before += rows;
    }
    return m;
}

}  // namespace

void norm_rows_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                       const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    const KernelSet& k = kernels();
    const Matrix matrix(norm);
    const Items items(matrix);
    const Sums sums(items, matrix.columns);
    const Arrays arrays(2, matrix.columns);
    float *scale = arrays[0], *shift = arrays[1];
    parallel_for(threads, items.count(), [&](int64_t i) {
        k.rows_moments(items.rows(i), x + items.offset(i), sums.first + i * matrix.columns,
                       sums.second + i * matrix.columns);
    });
    for_channels(threads, matrix, [&](int64_t begin, int64_t end) {
        add_moments(items, sums, matrix.columns, begin * matrix.repeat, end * matrix.repeat);
        for (int64_t c = begin; c < end; ++c) {
            const int64_t column = c * matrix.repeat;
            const Moments m = moments_of(sums, double(matrix.rows), column, matrix.repeat);
            const double variance = m.squares / count_of(norm);
            mean[c] = float(m.sum / count_of(norm));
            var[c] = float(variance);
            invstd[c] = float(1.0 / std::sqrt(variance + norm.eps));
            const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
            std::fill_n(scale + column, matrix.repeat, a.scale);
            std::fill_n(shift + column, matrix.repeat, a.shift);
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
    const Matrix matrix(norm);
    const Items items(matrix);
    const Sums sums(items, matrix.columns);
    const Arrays arrays(5, matrix.columns);
    float *scale = arrays[0], *shift = arrays[1], *factor = arrays[2], *offset = arrays[3], *means = arrays[4];
    for (int64_t c = 0; c < norm.c; ++c) {
        const int64_t column = c * matrix.repeat;
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        std::fill_n(scale + column, matrix.repeat, a.scale);
        std::fill_n(shift + column, matrix.repeat, a.shift);
        std::fill_n(means + column, matrix.repeat, mean[c]);
    }
    const auto part = [&](int64_t item) {
        const int64_t at = items.offset(item);
        return RowsGradient{g + at,    x + at, y ? y + at : nullptr, scale,
                            shift,     means,  dx + at,              dresidual ? dresidual + at : nullptr,
                            norm.relu != 0, stream(norm)};
    };
    parallel_for(threads, items.count(), [&](int64_t i) {
        k.rows_gradient_sums(items.rows(i), part(i), sums.first + i * matrix.columns,
                             sums.second + i * matrix.columns);
    });
    for_channels(threads, matrix, [&](int64_t begin, int64_t end) {
        for (int64_t item = 1; item < items.count(); ++item) {
            for (int64_t i = begin * matrix.repeat; i < end * matrix.repeat; ++i) {
                sums.first[i] += sums.first[item * matrix.columns + i];
                sums.second[i] += sums.second[item * matrix.columns + i];
            }
        }
        for (int64_t c = begin; c < end; ++c) {
            const int64_t column = c * matrix.repeat;
            const double sum = std::accumulate(sums.first + column, sums.first + column + matrix.repeat, 0.0);
            const double product = std::accumulate(sums.second + column, sums.second + column + matrix.repeat, 0.0);
            dbeta[c] = float(sum);
            dgamma[c] = float(product * double(invstd[c]));
            const Correction d = correction(scale[column], mean[c], invstd[c], sum, product, count_of(norm));
            std::fill_n(factor + column, matrix.repeat, d.factor);
            std::fill_n(offset + column, matrix.repeat, d.offset);
        }
    });
    parallel_for(threads, items.count(), [&](int64_t i) {
        const int64_t item = items.count() - 1 - i;  // the last are still in the cache
        k.rows_gradient_apply(items.rows(item), part(item), factor, offset);
        k.fence();
    });
}

}  // namespace granet
