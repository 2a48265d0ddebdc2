// Every second float of a row, as a stride of 2 takes them.
// Included by kernels.inl.

inline Vec load_up_to(const float* from, int64_t count) {
    if (count >= LANES) return *(const Vec*)from;
    return count > 0 ? load_first(from, int(count)) : Vec{};
}

inline void store_up_to(Vec vector, float* to, int64_t count) {
    if (count >= LANES)
        *(Vec*)to = vector;
    else if (count > 0)
        store_first(vector, to, int(count));
}

void take_second(const float* from, int64_t floats, float* to, float* others) {
    for (int64_t i = 0; i < floats; i += 2 * LANES) {
        Vec even, odd;
        split_pairs(load_up_to(from + i, floats - i), load_up_to(from + i + LANES, floats - i - LANES), even, odd);
        store_up_to(even, to + i / 2, (floats - i + 1) / 2);
        if (others) store_up_to(odd, others + i / 2, (floats - i) / 2);
    }
}

void put_second(const float* from, int64_t floats, float* to) {
    for (int64_t i = 0; i < floats; i += 2 * LANES) {
        Vec a, b;
        join_pairs(load_up_to(from + i / 2, (floats - i + 1) / 2), Vec{}, a, b);
        store_up_to(a, to + i, floats - i);
        store_up_to(b, to + i + LANES, floats - i - LANES);
    }
}
