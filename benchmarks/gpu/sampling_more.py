"""Block `sampling_more`: the variants of `sampling` by which its figures are explained: vLLM's own
settings, four engines, the newer model runner, a busy thread beside the engine.
"""

from benchmarks.gpu.sampling import MORE, main

if __name__ == "__main__":
    main(MORE)
