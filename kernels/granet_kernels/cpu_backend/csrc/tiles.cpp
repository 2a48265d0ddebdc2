#include "tiles.h"

#include <algorithm>

namespace granet {
namespace {

// One panel and band, for one range of rows.
class Item {
   public:
    Item(const TilePass& pass, int64_t number, char* panel, char* vectors)
        : p_(pass),
          g_(pass.geometry),
          panel_number_(number / pass.splits / g_.bands()),
          band_(number / pass.splits % g_.bands()),
          row_begin_(g_.rows / g_.height * (number % pass.splits) / pass.splits * g_.height),
          row_end_(g_.rows / g_.height * (number % pass.splits + 1) / pass.splits * g_.height),
          panel_(panel),
          vectors_(vectors) {}

    void run() {
        Packer packer(g_, p_.kernels, p_.source, panel_number_, band_, panel_);
        const int64_t height = std::min(g_.band, g_.y.grid() - band_ * g_.band);
        for (int64_t i = 0; i < height; i += g_.th) {
            const int th = int(std::min<int64_t>(g_.th, height - i));
            packer.reach(i + th);
            for (int64_t j = 0; j < g_.row_vectors(); j += g_.tw)
                tile(i, j, th, int(std::min<int64_t>(g_.tw, g_.row_vectors() - j)));
        }
        p_.kernels.fence();
    }

   private:
    void tile(int64_t i, int64_t j, int th, int tw) {
        const Region region{panel_number_ * g_.panel_images(),
                            (band_ * g_.band + i) * g_.y.target_phases,
                            j / g_.groups * g_.x.target_phases,
                            th * g_.y.target_phases,
                            tw / g_.groups * g_.x.target_phases,
                            g_.groups,
                            g_.vector};
        const char* source = panel_ + i * g_.pitch() + j * g_.vector;
        const int64_t step = p_.table->blocks == 1 ? CHUNK : row_end_ - row_begin_;
        for (int64_t row = row_begin_; row < row_end_; row += step) {
            const int64_t end = std::min(row + step, row_end_);
            for (int64_t block = 0; block < p_.table->blocks; ++block)
                for (int64_t phase = 0; phase < p_.table->access.phases; ++phase)
                    multiply(source, region, th, tw, row, end, block, phase);
            for (int64_t begin = row; begin < end; begin += CHUNK)
                unpack(p_.kernels, vectors_ + (begin - row) * region.bytes(), region, begin,
                       std::min(begin + CHUNK, end), p_.out, p_.out_strides, p_.source.n, g_.y.target, g_.x.target,
                       p_.stream);
        }
    }

    void multiply(const char* source, const Region& region, int th, int tw, int64_t row, int64_t end, int64_t block,
                  int64_t phase) {
        const int64_t width = region.width * g_.groups;  // vectors of a row of the region
        const int64_t phase_y = phase / g_.x.target_phases, phase_x = phase % g_.x.target_phases;
        TileArgs args{};
        args.source = source;
        args.source_pitch = g_.pitch();
        args.offset = p_.table->offset.data();
        args.value = p_.values;
        args.ptr = p_.table->row_ptr(phase, block, row);
        args.order = p_.table->order_of(phase, block, row, end);
        args.rows = end - row;
        args.bias = p_.bias ? p_.bias + row : nullptr;
        args.accumulate = block > 0;
        args.out = vectors_ + (phase_y * width + phase_x) * g_.vector;
        args.out_row = region.bytes();
        args.out_pitch = g_.y.target_phases * width * g_.vector;
        args.out_step = g_.x.target_phases * g_.vector;
        if (g_.whole)
            g_.whole->tile(args);
        else
            p_.kernels.tile(th, tw, g_.height > 1)(args);
    }

    const TilePass& p_;
    const Geometry& g_;
    int64_t panel_number_, band_, row_begin_, row_end_;
    char* panel_;
    char* vectors_;  // of finished tiles
};

}  // namespace

void run_tiles(const TilePass& pass, int64_t item, char* panel, char* vectors) {
    Item(pass, item, panel, vectors).run();
}

}  // namespace granet
