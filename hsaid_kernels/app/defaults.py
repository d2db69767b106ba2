"""Default settings of `hsaid train`."""

# Chosen on the validation languages of the embedded data (docs/training.md). STEPS_IF_LARGE takes minutes on two cores.
STEPS, BATCH_SIZE, LEARNING_RATE, INTRINSIC_DIM, MAX_LENGTH = 300, 32, 0.05, 5000, 32
LARGE, STEPS_IF_LARGE = 50_000_000, 60  # models with at least LARGE weights are trained for STEPS_IF_LARGE steps
MBERT_STEPS = 5
