"""Block `large_models_more`: what `large_models` leaves out, after what is more urgent."""

from benchmarks.gpu.large_models import main_of_more

if __name__ == "__main__":
    main_of_more()
