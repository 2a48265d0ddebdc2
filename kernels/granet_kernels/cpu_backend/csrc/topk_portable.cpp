// The top-k loops, compiled for any CPU.
#include "topk_scan.h"

#include "topk_scan.inl"

const granet::topk::Scan& granet::topk::scan_portable(bool absolute) { return absolute ? table<true> : table<false>; }
