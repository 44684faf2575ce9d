"""Ray's own benchmark, `ray microbenchmark`, for Ray and for rtml: the same rows, each in its system's own idiom."""
