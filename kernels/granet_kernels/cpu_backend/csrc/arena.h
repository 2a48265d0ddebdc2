// Memory in blocks that are cut from a few large segments, and joined again when they are given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace granet {

// Not for several threads at once. Addresses are those of pages.
class Arena {
   public:
    // Throws std::bad_alloc.
    char* take(size_t bytes);
    // Memory that is not from here, or given back before, is left alone. Never fails.
    void give(char* memory);
    // Gives what is not in use back to the system. Returns how many bytes that may have been.
    int64_t release();

   private:
    struct Block {
        char* memory;
        size_t size;
        size_t touched;  // so many bytes from its start may hold pages of the system
        bool used;
        bool first;  // of its segment: not to be joined with the block before it
    };

    size_t best(size_t size) const;
    size_t add_segment(size_t size);
    void join_next(size_t i);
    void trim();

    std::vector<Block> blocks_;  // of all segments, by rising address; no two free ones of a segment follow each other
    size_t used_ = 0;
    size_t peak_ = 0;  // of used_, since the last trim
    int64_t requests_ = 0;
};

}  // namespace granet
