"""Value-guided decoding (Q#, Zhou et al. 2025, arXiv 2502.20548, and CD): a frozen policy's logits
shifted by a learned value.

A library: recipes/star_graph decodes with it.
"""
