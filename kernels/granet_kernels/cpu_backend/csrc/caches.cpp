#include "caches.h"

#include <cstdio>
#include <fstream>
#include <string>

namespace granet {
namespace {

std::string read(int index, const char* name) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" + name);
    std::string text;
    file >> text;
    return text;
}

Caches find() {
    Caches found{32 << 10, 1 << 20};
    for (int index = 0; index < 4; ++index) {
        const std::string level = read(index, "level"), size = read(index, "size");
        long kilobytes = 0;
        if (read(index, "type") == "Instruction" || std::sscanf(size.c_str(), "%ldK", &kilobytes) != 1) continue;
        if (level == "1" && kilobytes >= 16) found.first = int64_t(kilobytes) << 10;
        if (level == "2" && kilobytes >= 128) found.second = int64_t(kilobytes) << 10;
    }
    return found;
}

}  // namespace

const Caches& caches() {
    static const Caches found = find();
    return found;
}

}  // namespace granet
