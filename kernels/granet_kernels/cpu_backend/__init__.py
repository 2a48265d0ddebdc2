"""The ops on a CPU: a native library, the index of a mask, and the choice between native and dense code."""
