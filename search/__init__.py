"""Rank search: the best mixture under a parameter budget, with Ray Tune and Optuna."""
