"""The fused linear cross-entropy over sparse soft targets: `reference` (dense float64) and `xla` (by blocks)."""
