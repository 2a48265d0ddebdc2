// One image for 3 x 3 convolutions with padding 1, and where their taps read it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace granet {

// With stride 1, a channel is the image's, with a row of zeros above and below. With stride 2 (and an even number of
// rows and columns), it is four planes: the even rows' even and odd pixels, and those of the odd rows below a row of
// zeros. Rows are as long as those that a tile writes: so all vectors begin where cache lines do, but for those of taps
// to the left or right, whose pixel beyond the end of the row is masked.
class NearPanel {
   public:
    NearPanel(const KernelSet& kernels, int64_t h, int64_t w, int64_t stride);

    int64_t pitch() const { return pitch_; }                     // bytes of a channel
    int64_t row() const { return w_ * int64_t(sizeof(float)); }  // bytes of a row
    int64_t planes() const { return stride_ * stride_; }
    const Tap* taps() const { return taps_; }  // by number, three a row of the kernel
    // `channels` of an image that lie so many floats apart.
    void pack(const float* image, int64_t channel_stride, int64_t channels, char* panel) const;

   private:
    void pack_whole(const float* channel, char* to) const;
    void pack_planes(const float* channel, char* to) const;
    int64_t plane(bool odd_row, bool odd_column) const;  // in rows, from the start of the channel

    const KernelSet& k_;
    int64_t h_, w_, stride_, pitch_;  // h, w: of what is written
    Tap taps_[WHOLE_TAPS];
};

}  // namespace granet
