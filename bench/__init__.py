"""Benchmarks against dense torch and against peers: `make bench` runs them all."""
