#include "layout.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <utility>

#include "parallel.h"

namespace granet {
namespace {

constexpr size_t MAX_TABLES = 6;  // a layer sees few geometries: forward, dgrad, and those of a last, smaller batch
constexpr int64_t SHORT_ROW = 32;  // entries, on average; a mispredicted end of a longer one does not count

// Appends the numbers of the bytes that are not 0, eight at a time where all are.
void append_kept(const unsigned char* mask, int64_t count, std::vector<int32_t>& index) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word;
        std::memcpy(&word, mask + i, 8);
        if (word == 0) continue;
        for (int k = 0; k < 8; ++k)
            if (mask[i + k]) index.push_back(int32_t(i + k));
    }
    for (; i < count; ++i)
        if (mask[i]) index.push_back(int32_t(i));
}

void append_kept_strided(const unsigned char* mask, const int64_t shape[4], const int64_t strides[4],
                         std::vector<int32_t>& index) {
    int32_t i = 0;
    for (int64_t c = 0; c < shape[1]; ++c)
        for (int64_t y = 0; y < shape[2]; ++y)
            for (int64_t x = 0; x < shape[3]; ++x, ++i)
                if (mask[c * strides[1] + y * strides[2] + x * strides[3]]) index.push_back(i);
}

bool rows_contiguous(const int64_t shape[4], const int64_t strides[4]) {
    int64_t expected = 1;
    for (int d = 3; d > 0; --d) {
        if (shape[d] != 1 && strides[d] != expected) return false;
        expected *= shape[d];
    }
    return true;
}

// The rows of each group by rising length.
std::vector<uint8_t> order_by_length(const Table& table) {
    const int64_t segments = table.access.phases * table.blocks;
    std::vector<uint8_t> order(segments * table.rows);
    std::vector<std::pair<int32_t, uint8_t>> group;
    for (int64_t segment = 0; segment < segments; ++segment)
        for (int64_t begin = 0; begin < table.rows; begin += ORDERED) {
            const int64_t first = segment * table.rows + begin, count = std::min(ORDERED, table.rows - begin);
            group.clear();
            for (int64_t i = 0; i < count; ++i)
                group.emplace_back(table.ptr[first + i + 1] - table.ptr[first + i], uint8_t(i));
            std::sort(group.begin(), group.end());
            for (int64_t i = 0; i < count; ++i) order[first + i] = group[i].second;
        }
    return order;
}

std::shared_ptr<const Table> make_table(const granet_layout& layout, const Access& access) {
    const int64_t taps = layout.taps(), outputs = layout.shape[0], inputs = layout.shape[1];
    auto table = std::make_shared<Table>();
    table->access = access;
    table->rows = access.by_output ? outputs : inputs;
    table->ranks = access.by_tap ? taps : 1;
    const int64_t sources = access.by_output ? inputs : outputs;
    table->blocks = (sources + access.block - 1) / access.block;

    const auto for_each = [&](auto&& f) {  // in the order of the mask: within a row of the table, by rising source
        std::vector<int32_t> channel_of(inputs * taps), tap_of(inputs * taps);
        for (int64_t c = 0, i = 0; c < inputs; ++c)
            for (int64_t tap = 0; tap < taps; ++tap, ++i) {
                channel_of[i] = int32_t(c);
                tap_of[i] = int32_t(tap);
            }
        for (int64_t o = 0; o < outputs; ++o)
            for (int32_t k = layout.ptr[o]; k < layout.ptr[o + 1]; ++k) {
                const int32_t c = channel_of[layout.index[k]], tap = tap_of[layout.index[k]];
                const int64_t row = access.by_output ? o : c, source = access.by_output ? c : o;
                const int64_t segment = access.phase[tap] * table->blocks + source / access.block;
                const int64_t rank = access.by_tap ? access.rank[tap] : 0;
                f((segment * table->rows + row) * table->ranks + rank, source, o, c, tap);
            }
    };

    // Of shared rows, the first has the entries of all.
    const int32_t height = access.height;
    const auto owner = [&](int64_t slot) { return slot - slot % height; };
    std::vector<int32_t> next(access.phases * table->blocks * table->rows * table->ranks + 1, 0);
    for_each([&](int64_t slot, int64_t, int64_t, int64_t, int32_t) { ++next[owner(slot) + 1]; });
    for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
    table->ptr = next;
    for (size_t i = 0; i + 1 < next.size(); ++i) next[i] = table->ptr[owner(int64_t(i))] + int32_t(i) % height;
    table->offset.resize(layout.nnz() / height);
    table->position.resize(layout.nnz());
    if (access.lists_entries) table->entry.reserve(layout.nnz());
    for_each([&](int64_t slot, int64_t source, int64_t o, int64_t c, int32_t tap) {
        const int32_t j = next[slot];
        next[slot] += height;
        if (access.lists_entries) table->entry.push_back(j);
        table->offset[j / height] = int32_t(source * access.channel_pitch + access.tap_offset[tap]);
        table->position[j] = int32_t(o * layout.strides[0] + c * layout.strides[1] +
                                     tap / layout.shape[3] * layout.strides[2] +
                                     tap % layout.shape[3] * layout.strides[3]);
    });
    if (table->ranks == 1 && height == 1 && table->blocks > 1 &&
        layout.nnz() <= SHORT_ROW * access.phases * table->blocks * table->rows)
        table->order = order_by_length(*table);
    return table;
}

bool rows_agree(const granet_layout& layout, int height) {
    const auto begin = layout.index.begin();
    for (int64_t o = 0; o < layout.shape[0]; ++o) {
        const int32_t *ptr = layout.ptr.data() + o, *first = ptr - o % height;
        if (!std::equal(begin + first[0], begin + first[1], begin + ptr[0], begin + ptr[1])) return false;
    }
    return true;
}

bool columns_agree(const granet_layout& layout, int height) {
    for (int64_t o = 0; o < layout.shape[0]; ++o) {
        const int32_t begin = layout.ptr[o], count = layout.ptr[o + 1] - begin;
        if (count % height != 0) return false;
        for (int32_t k = 0; k < count; ++k) {
            const int32_t first = layout.index[begin + k - k % height];
            if (first % height != 0 || layout.index[begin + k] != first + k % height) return false;
        }
    }
    return true;
}

}  // namespace
}  // namespace granet

bool granet_layout::shares_rows(bool by_output, int height) {
    const std::lock_guard<std::mutex> lock(granet::tables_mutex());
    for (const Shared& each : shared)
        if (each.by_output == by_output && each.height == height) return each.shares;
    const bool shares = taps() == 1 && shape[by_output ? 0 : 1] % height == 0 &&
                        (by_output ? granet::rows_agree(*this, height) : granet::columns_agree(*this, height));
    shared.push_back({by_output, height, shares});
    return shares;
}

std::shared_ptr<const granet::Table> granet_layout::find(const granet::Access& access) {
    for (const auto& each : tables)
        if (each->access == access) return each;
    return nullptr;
}

// Made outside the lock, which is only ever held for a moment: should two threads make the same, one is dropped.
std::shared_ptr<const granet::Table> granet_layout::table(const granet::Access& access) {
    {
        const std::lock_guard<std::mutex> lock(granet::tables_mutex());
        if (auto found = find(access)) return found;
    }
    auto made = granet::make_table(*this, access);
    const std::lock_guard<std::mutex> lock(granet::tables_mutex());
    if (auto found = find(access)) return found;
    if (tables.size() == granet::MAX_TABLES) tables.erase(tables.begin());
    tables.push_back(made);
    return made;
}

granet_layout* granet_layout_new(const unsigned char* mask, const int64_t shape[4], const int64_t strides[4]) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 16;  // loops look a little ahead
    const int64_t row = shape[1] * shape[2] * shape[3];
    if (shape[0] * row > limit) return nullptr;
    try {
        auto layout = std::make_unique<granet_layout>();
        std::memcpy(layout->shape, shape, sizeof(layout->shape));
        std::memcpy(layout->strides, strides, sizeof(layout->strides));
        layout->ptr.push_back(0);
        const bool contiguous = granet::rows_contiguous(shape, strides);
        for (int64_t o = 0; o < shape[0]; ++o) {
            if (contiguous)
                granet::append_kept(mask + o * strides[0], row, layout->index);
            else
                granet::append_kept_strided(mask + o * strides[0], shape, strides, layout->index);
            layout->ptr.push_back(int32_t(layout->index.size()));
        }
        return layout.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

void granet_layout_free(granet_layout* layout) { delete layout; }

int64_t granet_layout_nnz(const granet_layout* layout) { return layout->nnz(); }

int64_t granet_layout_bytes(const granet_layout* layout) {
    const std::lock_guard<std::mutex> lock(granet::tables_mutex());
    int64_t words = int64_t(layout->ptr.size() + layout->index.size()), bytes = 0;
    for (const auto& table : layout->tables) {
        words += int64_t(table->ptr.size() + table->offset.size() + table->position.size() +
                         table->entry.size());
        bytes += int64_t(table->order.size());
    }
    return words * int64_t(sizeof(int32_t)) + bytes;
}
