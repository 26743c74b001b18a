//! Tests of the cache against a small apiserver in memory.
