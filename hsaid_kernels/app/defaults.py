"""The settings of `hsaid train` where none are given."""

# Chosen on the embedded data's validation languages (docs/method.md); STEPS_IF_LARGE by what two cores do in minutes.
STEPS, BATCH_SIZE, LEARNING_RATE, INTRINSIC_DIM, MAX_LENGTH = 300, 32, 0.05, 5000, 32
LARGE, STEPS_IF_LARGE = 50_000_000, 60  # weights
MBERT_STEPS = 5
