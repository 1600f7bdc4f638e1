"""The Belief State Transformer (Hu et al. 2025, arXiv 2410.23506): model, losses over pairs,
trainer, decoding, checkpoints. recipes/belief_state and recipes/star_graph train with it.
"""
