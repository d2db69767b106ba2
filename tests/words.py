"""The vocabulary of the small models of the commands' and the examples' tests: two kinds of things to tell apart."""

FRUIT = ("apple", "banana", "cherry", "grape", "lemon", "mango")
ANIMALS = ("cat", "dog", "horse", "mouse", "sheep", "tiger")
WORDS = {"fruit": FRUIT, "animal": ANIMALS}
