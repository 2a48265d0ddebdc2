// Batch norm of images of few pixels in NCHW. A row is an image, or those channels of it that are worked on together:
// they are read from memory once, and passed over again while they lie in the cache. All pixels of a channel share its
// numbers.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "norm.h"
#include "parallel.h"

namespace granet {
namespace {

constexpr int64_t FLOATS = 1 << 16;    // worked on together, about
constexpr int64_t WHOLE_VECTORS = 16;  // so many channels fill whole vectors, whatever their pixels

// The channels in pieces. How they are cut depends on the shape alone.
class Pieces {
   public:
    explicit Pieces(const granet_norm& norm) : norm_(norm) {
        const int64_t fitting = FLOATS / (norm.n * norm.pixels) / WHOLE_VECTORS * WHOLE_VECTORS;
        step_ = std::min(norm.c, std::max(WHOLE_VECTORS, fitting));
    }

    int64_t count() const { return (norm_.c + step_ - 1) / step_; }
    int64_t begin(int64_t piece) const { return piece * step_; }
    int64_t end(int64_t piece) const { return std::min(norm_.c, (piece + 1) * step_); }
    int64_t offset(int64_t piece) const { return begin(piece) * norm_.pixels; }
    Rows rows(int64_t piece) const {
        return {norm_.n, (end(piece) - begin(piece)) * norm_.pixels, norm_.c * norm_.pixels};
    }
    int64_t columns() const { return step_ * norm_.pixels; }

   private:
    const granet_norm& norm_;
    int64_t step_;
};

// A thread's arrays of a number a column.
class Columns {
   public:
    Columns(const Pieces& pieces, int threads)
        : columns_(pieces.columns()),
          memory_(threads, pieces.count(), 2 * sizeof(double) * size_t(columns_), 5 * sizeof(float) * size_t(columns_)) {}

    class Lease {
       public:
        explicit Lease(const Columns& columns) : columns_(columns.columns_), lease_(columns.memory_) {}
        double* sums(int i) const { return reinterpret_cast<double*>(lease_.first()) + i * columns_; }
        float* array(int i) const { return reinterpret_cast<float*>(lease_.second()) + i * columns_; }

       private:
        int64_t columns_;
        ThreadScratch::Lease lease_;
    };

   private:
    int64_t columns_;
    ThreadScratch memory_;
};

double sum_of(const double* values, int64_t count) { return std::accumulate(values, values + count, 0.0); }

// The sum of squares about the mean, of columns that have these sums, and these squares about means of their own.
double squares_of(const double* sums, const double* squares, int64_t count, double rows, double mean) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double distance = sums[i] * (1 / rows) - mean;
        total += squares[i] + rows * distance * distance;
    }
    return total;
}

}  // namespace

void norm_few_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                      const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    const KernelSet& k = kernels();
    const Pieces pieces(norm);
    const Columns columns(pieces, threads);
    parallel_for(threads, pieces.count(), [&](int64_t piece) {
        const Columns::Lease lease(columns);
        double *sums = lease.sums(0), *squares = lease.sums(1);
        float *scale = lease.array(0), *shift = lease.array(1);
        const Rows rows = pieces.rows(piece);
        const int64_t at = pieces.offset(piece);
        k.rows_moments(rows, x + at, sums, squares);
        for (int64_t c = pieces.begin(piece); c < pieces.end(piece); ++c) {
            const int64_t column = c * norm.pixels - at;
            const double exact = sum_of(sums + column, norm.pixels) / count_of(norm);
            const double all = squares_of(sums + column, squares + column, norm.pixels, double(norm.n), exact);
            const double variance = all / count_of(norm);
            mean[c] = float(exact);
            var[c] = float(variance);
            invstd[c] = float(1.0 / std::sqrt(variance + norm.eps));
            const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
            std::fill_n(scale + column, norm.pixels, a.scale);
            std::fill_n(shift + column, norm.pixels, a.shift);
        }
        k.rows_apply(rows, RowsApply{x + at, residual ? residual + at : nullptr, y + at, scale, shift, norm.relu != 0,
                                     stream(norm)});
        k.fence();
    });
}

void norm_few_backward(const granet_norm& norm, const float* g, const float* x, const float* y, const float* gamma,
                       const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                       float* dgamma, float* dbeta, int threads) {
    const KernelSet& k = kernels();
    const Pieces pieces(norm);
    const Columns columns(pieces, threads);
    parallel_for(threads, pieces.count(), [&](int64_t piece) {
        const Columns::Lease lease(columns);
        double *sums = lease.sums(0), *products = lease.sums(1);
        float *scale = lease.array(0), *shift = lease.array(1), *means = lease.array(2);
        float *factor = lease.array(3), *offset = lease.array(4);
        const Rows rows = pieces.rows(piece);
        const int64_t at = pieces.offset(piece);
        for (int64_t c = pieces.begin(piece); c < pieces.end(piece); ++c) {
            const int64_t column = c * norm.pixels - at;
            const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
            std::fill_n(scale + column, norm.pixels, a.scale);
            std::fill_n(shift + column, norm.pixels, a.shift);
            std::fill_n(means + column, norm.pixels, mean[c]);
        }
        const RowsGradient args{g + at, x + at,
                                y ? y + at : nullptr, scale,
                                shift, means,
                                dx + at, dresidual ? dresidual + at : nullptr,
                                norm.relu != 0, stream(norm)};
        k.rows_gradient_sums(rows, args, sums, products);
        for (int64_t c = pieces.begin(piece); c < pieces.end(piece); ++c) {
            const int64_t column = c * norm.pixels - at;
            const double sum = sum_of(sums + column, norm.pixels), product = sum_of(products + column, norm.pixels);
            dbeta[c] = float(sum);
            dgamma[c] = float(product * double(invstd[c]));
            const Correction d = correction(scale[column], mean[c], invstd[c], sum, product, count_of(norm));
            std::fill_n(factor + column, norm.pixels, d.factor);
            std::fill_n(offset + column, norm.pixels, d.offset);
        }
        k.rows_gradient_apply(rows, args, factor, offset);
        k.fence();
    });
}

}  // namespace granet
