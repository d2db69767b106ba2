"""Default settings of `hsaid train` and `hsaid measure`."""

# Chosen on the validation languages of the embedded data (docs/training.md). STEPS_IF_LARGE takes minutes on two cores.
STEPS, BATCH_SIZE, LEARNING_RATE, INTRINSIC_DIM, MAX_LENGTH = 300, 32, 0.05, 5000, 32
LARGE, STEPS_IF_LARGE = 50_000_000, 60  # models with at least LARGE weights are trained for STEPS_IF_LARGE steps
MBERT_STEPS = 5
# With --bits: that share of the steps more, on the levels. Their rate is this share of the rate, divided by 2**bits, as
# levels are nearer to each other (docs/certificates.md).
TUNED_STEPS, TUNED_RATE = 0.2, 2.0

# `hsaid measure`: "quick" takes minutes on two cores with the model that stands in for mBERT, "full" hours.
PROFILES: dict[str, dict[str, object]] = {
    "quick": {"methods": ["did", "hsaid-3"], "dims": [100, 1000, 10_000], "seeds": 2, "refine": 1, "steps": 100},
    "full": {
        "methods": ["did", "said", "hsaid-3", "L1|L2|L3|L4"],
        "dims": [100, 300, 1000, 3000, 10_000, 20_000],
        "seeds": 3,
        "refine": 2,
        "steps": STEPS,
    },
}
THRESHOLD = 0.9
