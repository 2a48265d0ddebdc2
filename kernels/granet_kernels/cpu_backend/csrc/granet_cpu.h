// The C ABI of granet's CPU kernels: pointers and sizes, nothing of torch or Python.
//
// Images are float32 with any strides, counted in elements; results are contiguous or channels_last, and a weight and
// its mask lie dense in memory. One mask has one granet_layout: build it when the mask has changed, pass it to every
// call. All functions may be called from several threads at once.
#pragma once

#include <stdint.h>

#define GRANET_API extern "C" __attribute__((visibility("default")))

// Raised with every change of what is declared here; the Python side refuses a library of another version.
#define GRANET_ABI_VERSION 7

typedef enum { GRANET_OK = 0, GRANET_OUT_OF_MEMORY = 1, GRANET_UNSUPPORTED = 2 } granet_status;

GRANET_API int granet_abi_version(void);

// "avx512", "avx2" or "portable": the code that runs. Setting it returns 0, or -1 if this CPU lacks it.
GRANET_API const char* granet_isa(void);
GRANET_API int granet_set_isa(const char* name);
GRANET_API int granet_has_openmp(void);

// A tensor of float32 for a large result, dense in memory in some order of its 4 dimensions or fewer: a DLManagedTensor
// of DLPack, whose deleter any thread may call. NULL: out of memory, or more dimensions. Its memory is aligned to pages
// and, given back, kept for later requests, unless much more is kept than they need.
GRANET_API void* granet_tensor_new(int dimensions, const int64_t* shape, const int64_t* strides);
// Gives all that is not in use to the system. Returns how many bytes that was.
GRANET_API int64_t granet_memory_release(void);

// The index tensors of one mask (out, in, kh, kw), True = kept. The weight and its gradient have the mask's strides.
typedef struct granet_layout granet_layout;

// NULL: out of memory, or a mask of 2^31 positions or more.
GRANET_API granet_layout* granet_layout_new(const unsigned char* mask, const int64_t shape[4],
                                            const int64_t strides[4]);
GRANET_API void granet_layout_free(granet_layout* layout);
GRANET_API int64_t granet_layout_nnz(const granet_layout* layout);
GRANET_API int64_t granet_layout_bytes(const granet_layout* layout);

// A convolution without groups; a linear layer is one with h = w = kh = kw = 1.
typedef struct {
    int64_t n, in, h, w, out, kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, out_h, out_w;
} granet_conv;

// y (n, out, out_h, out_w) = x (n, in, h, w) * W + bias (out,); bias may be NULL.
GRANET_API int granet_conv2d_forward(granet_layout* layout, const granet_conv* conv, const float* x,
                                     const int64_t x_strides[4], const float* weight, const float* bias, float* y,
                                     const int64_t y_strides[4], int threads);
// dx (n, in, h, w) from g (n, out, out_h, out_w).
GRANET_API int granet_conv2d_dgrad(granet_layout* layout, const granet_conv* conv, const float* g,
                                   const int64_t g_strides[4], const float* weight, float* dx,
                                   const int64_t dx_strides[4], int threads);
// All of dw is written: the gradient at kept positions, exactly zero elsewhere.
GRANET_API int granet_conv2d_wgrad(granet_layout* layout, const granet_conv* conv, const float* g,
                                   const int64_t g_strides[4], const float* x, const int64_t x_strides[4], float* dw,
                                   int threads);

// Both: the same bits as by the two functions above. Where both can read g together, panel by panel or image by image,
// in one pass fewer over it; reads_once says whether they do, 1 or 0, or 2 if they share the products' loads, too, so
// that one gradient alone takes much of the time of both.
GRANET_API int granet_conv2d_backward(granet_layout* layout, const granet_conv* conv, const float* g,
                                      const int64_t g_strides[4], const float* x, const int64_t x_strides[4],
                                      const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                                      int threads);
GRANET_API int granet_conv2d_reads_once(granet_layout* layout, const granet_conv* conv, const int64_t g_strides[4],
                                        const int64_t x_strides[4], const int64_t dx_strides[4], int threads);

// Batch norm with the statistics of the batch, and what may follow it: y = act((x - mean) * invstd * gamma + beta +
// residual), act being max(., 0) if `relu`. Images contiguous, (n, c, pixels) or, if `channels_last`, (n, pixels, c);
// the rest (c,). None of them empty; residual may be NULL. mean, invstd, var: written; var is the biased variance.
typedef struct {
    int64_t n, c, pixels;
    double eps;
    int relu, channels_last;
} granet_norm;
GRANET_API int granet_norm_forward(const granet_norm* norm, const float* x, const float* residual, const float* gamma,
                                   const float* beta, float* y, float* mean, float* invstd, float* var, int threads);
// dx, dgamma, dbeta and, if not NULL, dresidual from g. y is needed with a residual and relu, else it may be NULL.
GRANET_API int granet_norm_backward(const granet_norm* norm, const float* g, const float* x, const float* y,
                                    const float* gamma, const float* beta, const float* mean, const float* invstd,
                                    float* dx, float* dresidual, float* dgamma, float* dbeta, int threads);

// n matrices (rows, columns), one behind the other, transposed: to is (n, columns, rows). With rows = channels and
// columns = pixels, images in NCHW become channels_last, and the other way round.
GRANET_API int granet_transpose(int64_t n, int64_t rows, int64_t columns, const float* from, float* to, int threads);

// `count` values and as many bytes of a mask, 1 = kept, that lie in memory in the same order. is_zero_off: 1 if all bits
// of the values off the mask are 0, else 0. mask_values: to = mask ? values : 0; `to` may be the values.
GRANET_API int granet_is_zero_off(int64_t count, const float* values, const unsigned char* mask, int threads);
GRANET_API int granet_mask_values(int64_t count, const float* values, const unsigned char* mask, float* to,
                                  int threads);

// Max-pooling of 2 x 2 pixels with stride 2 over planes (planes, h, w), contiguous; an odd last row or column is left
// out. which: the pixel of each output that was taken, 0 to 3 row by row; of equal ones the first; NaN is above all,
// the last one.
GRANET_API int granet_pool_forward(int64_t planes, int64_t h, int64_t w, const float* x, float* y, unsigned char* which,
                                   int threads);
GRANET_API int granet_pool_backward(int64_t planes, int64_t h, int64_t w, const float* g, const unsigned char* which,
                                    float* dx, int threads);

// Exact top-k over segments that may lie anywhere: scores[s] points at sizes[s] floats, masks[s] at sizes[s] bytes.
// counts holds one number a segment, or with `global` a single one over all segments together. With `absolute`, by
// |score|. Order: -inf < ... < -0 == +0 < ... < inf < NaN, ties to the lower segment, then to the lower index.
// eligible, or an eligible[s], may be NULL: every unit is.
GRANET_API int granet_topk_mask(int64_t segments, const float* const* scores, const unsigned char* const* eligible,
                                const int64_t* sizes, const int64_t* counts, int global, int absolute,
                                unsigned char* const* masks, int threads);
