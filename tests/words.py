"""The vocabulary of the model in tests/app/conftest.py: two kinds of things to tell apart."""

FRUIT = ("apple", "banana", "cherry", "grape", "lemon", "mango")
ANIMALS = ("cat", "dog", "horse", "mouse", "sheep", "tiger")
WORDS = {"fruit": FRUIT, "animal": ANIMALS}
