"""Value-guided decoding: Q# (Zhou et al. 2025, arXiv 2502.20548) and controlled decoding. A learned
value shifts the logits of a frozen policy. recipes/star_graph uses it.
"""
