"""Real trainers with the losses of nvamp, each in an environment of its own.

    python -m tools.trainers --list

To add a trainer: a line in `recipes.py`, and a module of the recipe's name with a function `results`, which
yields a `Result` for each way of training.
"""
