// Geometry of one pass: how images are cut into panels, bands and tiles.
//
// A panel holds `groups` x lanes images of every source channel, zero-padded, vector by vector:
//     [channel][phase][panel_h][panel_w][group][lane]
// so that the source of any tap lies at a constant distance from the destination pixel, whatever stride, padding and
// dilation are. A strided source (forward) is split into phases, pixels that agree modulo the stride; a strided
// destination (input gradient) likewise, each of its phases with taps of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "granet_cpu.h"
#include "kernels.h"
#include "layout.h"

namespace granet {

// One axis of an image: which source phase, which destination phase and which displacement each tap has.
struct Axis {
    int64_t source, target;              // pixels
    int64_t source_phases, target_phases;
    int64_t low, high;                   // least and greatest displacement of a tap, in source phase pixels
    std::vector<int64_t> source_phase, target_phase, shift;  // one a tap

    int64_t grid() const { return (target + target_phases - 1) / target_phases; }
};

Axis forward_axis(int64_t source, int64_t target, int64_t taps, int64_t stride, int64_t padding, int64_t dilation);
Axis dgrad_axis(int64_t source, int64_t target, int64_t taps, int64_t stride, int64_t padding, int64_t dilation);

struct Geometry {
    Axis y, x;
    int64_t images, channels, rows;  // of source; rows: destination channels
    int groups;                      // vectors of images side by side
    int64_t band;                    // grid rows of one panel
    int th, tw;                      // the tile: grid rows, and vectors of a grid row
    int64_t vector;                  // bytes
    int height;                      // rows of the weight at a time, which share their entries; 1: any
    const WholeKernel* whole;        // for images that fit in registers, then y and x have no border; or NULL

    int64_t panel_h() const { return band + y.high - y.low; }
    int64_t panel_w() const { return x.grid() + x.high - x.low; }
    int64_t pitch() const { return panel_w() * groups * vector; }             // bytes of a panel row
    int64_t phase_pitch() const { return panel_h() * pitch(); }               // of a source phase
    int64_t channel_pitch() const { return y.source_phases * x.source_phases * phase_pitch(); }
    int64_t panel_bytes() const { return channels * channel_pitch(); }
    int64_t region_bytes() const { return th * tw * y.target_phases * x.target_phases * vector; }  // of a row's tile
    int64_t gradient_bytes() const { return rows * th * row_vectors() * vector; }  // of all rows' grid rows of a tile
    int64_t row_vectors() const { return x.grid() * groups; }
    int64_t panels() const;  // of all images
    int64_t bands() const { return (y.grid() + band - 1) / band; }
    int64_t lanes() const { return vector / int64_t(sizeof(float)); }
    int64_t panel_images() const { return groups * lanes(); }
    // Whether a thread's memory for a panel, and for `more` bytes, stays modest, and the tables are not mostly empty.
    bool is_supported(int64_t more) const {
        return y.target_phases * x.target_phases <= MAX_PHASES && panel_bytes() + more <= MAX_BYTES;
    }
    static constexpr int64_t MAX_PHASES = 1024, MAX_BYTES = int64_t(64) << 20;
};

// How many vectors of images to put side by side, of `pixels` pixels each, `most` at most, for a kernel of one tap: the
// fewest idle lanes are not the least work, since each panel takes every weight's address anew.
int cheapest_groups(int64_t images, int64_t lanes, int64_t pixels, int most);

// The widest tile within a row of `vectors`, `largest` at most, that cuts the row into equal parts if it can.
int tile_width(int64_t vectors, int largest);

// Chooses groups, band and tile for the instruction set, to multiply (tiles) or for a weight gradient (dots), with a
// weight of which a share of `density` is kept.
enum class Use { tiles, dots };
Geometry make_geometry(const Axis& y, const Axis& x, int64_t images, int64_t channels, int64_t rows,
                       const KernelSet& kernels, Use use, bool shares_rows, double density);

Access access_of(const Geometry& g, bool by_output, int64_t block);

// Images in memory.
struct Images {
    const float* data;
    const int64_t* strides;  // n, c, h, w in floats
    int64_t n;
};

// Which gradients of a layer are wanted, and of what.
struct Gradients {
    Images gradient, source;  // incoming; the layer's input, for dw
    const float* weight;      // for dx
    float* dx;                // NULL: not wanted
    const int64_t* dx_strides;
    float* dw;                // NULL: not wanted
};

inline const char* at(const float* data, int64_t floats) { return reinterpret_cast<const char*>(data + floats); }

// Fills a panel as the tiles ask for it: from the first row of a band to its last.
class Packer {
   public:
    Packer(const Geometry& geometry, const KernelSet& kernels, const Images& images, int64_t panel, int64_t band,
           char* memory);
    // Makes the source of the grid rows below `end` (counted from the start of the band) ready.
    void reach(int64_t end);

   private:
    void clear_border();
    void pack_rows(int64_t begin, int64_t end);
    void pack_row_of_pixels(const float* image, int valid, int64_t begin, int64_t end, char* to) const;

    const Geometry& g_;
    const KernelSet& k_;
    const Images& images_;
    int64_t first_image_;
    char* memory_;
    int64_t origin_;          // source phase row in panel row 0
    int64_t next_;            // image row to pack next
    std::vector<int32_t> at_;  // byte offset within a channel of each pixel of the rows of the band, -1: not needed
    int64_t first_row_, last_row_;  // image rows of the band
    std::vector<char> used_y_, used_x_;  // whether a tap reads this source phase
    bool every_row_;                     // whether all are used
};

// Writes rows [row_begin, row_end) of a finished tile to the images. A row holds `region` bytes:
// th * target phases x (tw / groups) * target phases pixels of `groups` vectors.
struct Region {
    int64_t image, y, x;   // first image; first pixel of the destination
    int64_t height, width;  // pixels
    int64_t groups, vector;
    int64_t bytes() const { return height * width * groups * vector; }
};
void unpack(const KernelSet& kernels, const char* vectors, const Region& region, int64_t row_begin, int64_t row_end,
            float* images, const int64_t strides[4], int64_t n, int64_t h, int64_t w, bool stream);

}  // namespace granet
