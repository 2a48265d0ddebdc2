// Large results as tensors of DLPack: torch takes them as they are, and gives them back without Python.
#include <algorithm>
#include <cstdint>
#include <exception>

#include "granet_cpu.h"
#include "parallel.h"

namespace granet {
namespace {

// As https://github.com/dmlc/dlpack lays them down, before version 1.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t CPU = 1;
constexpr uint8_t FLOAT = 2;
constexpr int MOST_DIMENSIONS = 4;

struct Result {
    Result(int dimensions, const int64_t* sizes, const int64_t* steps, size_t bytes) : memory(bytes) {
        std::copy_n(sizes, dimensions, shape);
        std::copy_n(steps, dimensions, strides);
        managed.tensor = {memory.as<void>(), CPU, 0, dimensions, FLOAT, 32, 1, shape, strides, 0};
        managed.context = this;
        managed.deleter = [](DLManagedTensor* tensor) { delete static_cast<Result*>(tensor->context); };
    }
    DLManagedTensor managed;
    int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
    Scratch memory;
};

}  // namespace
}  // namespace granet

void* granet_tensor_new(int dimensions, const int64_t* shape, const int64_t* strides) {
    using namespace granet;
    if (dimensions > MOST_DIMENSIONS) return nullptr;
    size_t bytes = sizeof(float);
    for (int i = 0; i < dimensions; ++i)
        if (__builtin_mul_overflow(bytes, size_t(shape[i]), &bytes) || bytes > PTRDIFF_MAX) return nullptr;
    try {
        return &(new Result(dimensions, shape, strides, bytes))->managed;
    } catch (const std::exception&) {
        return nullptr;
    }
}
