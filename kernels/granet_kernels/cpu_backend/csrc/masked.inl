// Values under a mask of bytes, 1 = kept, that lies as they do. Included by kernels.inl.

// -1 in each lane whose value is kept.
inline __attribute__((always_inline)) IntVec kept_lanes(const unsigned char* mask) {
    return load_bytes(mask) != IntVec{};
}

// Whether all bits of the values off the mask are 0: -0 counts as another value.
bool is_zero_off(const float* values, const unsigned char* mask, int64_t count) {
    constexpr int64_t BLOCK = 64 * LANES;  // between two looks at what was found
    int64_t i = 0;
    while (i + LANES <= count) {
        IntVec found{};
        for (const int64_t end = i + BLOCK < count ? i + BLOCK : count; i + LANES <= end; i += LANES)
            found |= (IntVec)load(values + i) & ~kept_lanes(mask + i);
        for (int k = 0; k < LANES; ++k)
            if (found[k]) return false;
    }
    for (; i < count; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, sizeof bits);
        if (!mask[i] && bits) return false;
    }
    return true;
}

void mask_values(const float* values, const unsigned char* mask, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        *(Vec*)(to + i) = (Vec)((IntVec)load(values + i) & kept_lanes(mask + i));
    for (; i < count; ++i) to[i] = mask[i] ? values[i] : 0.0f;
}
