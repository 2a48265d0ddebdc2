#include "linear.h"

#include <algorithm>
#include <iterator>
#include <memory>

#include "caches.h"
#include "gather.h"
#include "parallel.h"
#include "sums.h"

namespace granet {
namespace {

constexpr int64_t PANELS = 8;  // at least, if there are images for it: threads share the work and pack none twice
constexpr int64_t ENOUGH = 4;  // vectors a weight; with fewer, its addresses and sums cost more than its products
constexpr int64_t ROWS = 128;  // of the input packed at a time: longer runs in memory
constexpr double PART_OF_SECOND_LEVEL = 0.625;

// Images side by side in a panel, `groups` vectors of them: [channel][group][lane].
struct Batch {
    int64_t images, lanes, groups;

    int64_t pitch() const { return groups * lanes * int64_t(sizeof(float)); }  // bytes of a channel
    int64_t together() const { return groups * lanes; }
    int64_t panels() const { return (images + together() - 1) / together(); }
};

// groups: 0 if no panel of enough images stays in the cache.
Batch batch_of(const KernelSet& k, const granet_conv& c) {
    const int64_t vectors = (c.n + k.lanes - 1) / k.lanes, enough = std::min(ENOUGH, vectors);
    const int64_t wanted = std::clamp<int64_t>(vectors / PANELS, enough, std::max<int64_t>(enough, k.most_pairs));
    const auto cache = int64_t(PART_OF_SECOND_LEVEL * double(caches().second));
    const int64_t most = std::min(wanted, cache / (c.out * k.lanes * int64_t(sizeof(float))));
    return {c.n, k.lanes, most < enough ? 0 : cheapest_groups(c.n, k.lanes, 1, int(most))};
}

class LinearPass {
   public:
    LinearPass(const KernelSet& kernels, granet_layout* layout, const granet_conv& c, const Gradients& wanted,
               int threads)
        : batch(batch_of(kernels, c)),
          table(layout->table(access_of(batch, c))),
          k_(kernels),
          wanted_(wanted),
          outputs_(c.out),
          inputs_(c.in),
          values_(wanted_.dx ? table->nnz() * sizeof(float) : 0),
          stream_(goes_past_cache(c.n * c.in)) {
        if (wanted_.dx) take_values(*layout, threads);
    }
    size_t panel_bytes() const { return size_t(outputs_ * batch.pitch()); }
    size_t rows_bytes() const { return 2 * size_t(ROWS * batch.pitch()); }  // of the input and of its gradient

    // Inputs [begin, end) of a panel of images.
    void run(int64_t panel, int64_t begin, int64_t end, char* memory, char* rows, float* sums) const;

    Batch batch;
    std::shared_ptr<const Table> table;

   private:
    void take_values(const granet_layout& layout, int threads);
    static Access access_of(const Batch& batch, const granet_conv& c) {
        Access access;
        access.by_output = false;
        access.channel_pitch = batch.pitch();
        access.block = c.out;
        access.phase = {0};
        access.tap_offset = {0};
        access.lists_entries = true;
        return access;
    }
    void pack(const Images& images, int64_t first, int64_t channel, int64_t count, char* to) const;

    const KernelSet& k_;
    Gradients wanted_;
    int64_t outputs_, inputs_;
    Scratch values_;
    bool stream_;
};

// In the order of the weight's memory: input by input, each would come from another page. A thread has inputs of its
// own, so that no other writes to its cache lines.
void LinearPass::take_values(const granet_layout& layout, int threads) {
    auto* values = values_.as<float>();
    parallel_for(threads, threads, [&](int64_t part) {
        const auto begin = int32_t(inputs_ * part / threads), end = int32_t(inputs_ * (part + 1) / threads);
        for (int64_t o = 0; o < outputs_; ++o) {
            const float* row = wanted_.weight + o * layout.strides[0];
            const int32_t* last = layout.index.data() + layout.ptr[o + 1];
            const int32_t* index = std::lower_bound(layout.index.data() + layout.ptr[o], last, begin);
            const int32_t* entry = table->entry.data() + (index - layout.index.data());
            for (; index < last && *index < end; ++index, ++entry) values[*entry] = row[*index * layout.strides[1]];
        }
    });
}

// `count` channels, from `channel` on, of the images of a panel, from `first` on.
void LinearPass::pack(const Images& images, int64_t first, int64_t channel, int64_t count, char* to) const {
    const int64_t* s = images.strides;
    for (int64_t group = 0; group < batch.groups; ++group, to += batch.lanes * int64_t(sizeof(float))) {
        const int64_t image = first + group * batch.lanes;
        const int valid = int(std::clamp<int64_t>(images.n - image, 0, batch.lanes));
        const float* from = images.data + (valid ? image * s[0] : 0) + channel * s[1];
        if (s[1] == 1) {
            k_.pack_channels(from, s[0], valid, count, 0, to, batch.pitch());
            continue;
        }
        for (int64_t c = 0; c < count; ++c)
            k_.pack_channels(from + c * s[1], s[0], valid, 1, 0, to + c * batch.pitch(), 0);
    }
}

void LinearPass::run(int64_t panel, int64_t begin, int64_t end, char* memory, char* rows, float* sums) const {
    const int64_t first = panel * batch.together();
    pack(wanted_.gradient, first, 0, outputs_, memory);
    const PairKernel& kernels = k_.pairs[batch.groups - 1];
    const auto kernel = !wanted_.dw ? kernels.tile : !wanted_.dx ? kernels.dot : kernels.both;
    PairArgs args{};
    args.source = memory;
    args.offset = table->offset.data();
    args.value = values_.as<float>();
    args.input = rows;
    args.out = rows + ROWS * batch.pitch();
    args.sum = sums;
    for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t stop = std::min(row + ROWS, end);
        args.ptr = table->row_ptr(0, 0, row);
        args.rows = stop - row;
        if (wanted_.dw) pack(wanted_.source, first, row, stop - row, rows);
        kernel(args);
        if (!wanted_.dx) continue;
        const Region region{first, 0, 0, 1, 1, batch.groups, batch.lanes * int64_t(sizeof(float))};
        unpack(k_, args.out, region, row, stop, wanted_.dx, wanted_.dx_strides, batch.images, 1, 1, stream_);
    }
    k_.fence();
}

}  // namespace

bool linear_applies(const KernelSet& k, granet_layout* layout, const granet_conv& c) {
    const int64_t sides[] = {c.h, c.w, c.out_h, c.out_w, c.kh, c.kw};
    const bool is_linear = std::all_of(std::begin(sides), std::end(sides), [](int64_t side) { return side == 1; });
    return is_linear && c.pad_h == 0 && c.pad_w == 0 && c.n > 0 && layout->nnz() > 0 &&
           !layout->shares_rows(false, k.shared_rows) && batch_of(k, c).groups > 0;
}

// Cuts the images as the sums are, whichever gradients are wanted.
int run_linear(const KernelSet& k, granet_layout* layout, const granet_conv& c, const Gradients& wanted, int threads) {
    const LinearPass pass(k, layout, c, wanted, threads);
    const int64_t panels = pass.batch.panels();
    if (!wanted.dw) {
        const int64_t splits = row_splits(panels, c.out, c.in, pass.table->nnz(), threads);
        const ThreadScratch scratch(threads, panels * splits, pass.panel_bytes(), pass.rows_bytes());
        parallel_for(threads, panels * splits, [&](int64_t item) {
            const ThreadScratch::Lease lease(scratch);
            const int64_t split = item % splits;
            pass.run(item / splits, c.in * split / splits, c.in * (split + 1) / splits, lease.first(), lease.second(),
                     nullptr);
        });
        return GRANET_OK;
    }
    Cut cut = cut_of(*layout, panels, threads);
    cut.splits = std::min((threads + cut.chunks - 1) / cut.chunks, c.in);  // of the inputs, not of the outputs
    const ThreadScratch scratch(threads, cut.items(), pass.panel_bytes(), pass.rows_bytes());
    sum_chunks(k, *layout, *pass.table, cut, wanted.dw, threads,
               [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float* sums) {
                   const ThreadScratch::Lease lease(scratch);
                   for (int64_t panel = begin; panel < end; ++panel)
                       pass.run(panel, row_begin, row_end, lease.first(), lease.second(), sums);
               });
    return GRANET_OK;
}

}  // namespace granet
