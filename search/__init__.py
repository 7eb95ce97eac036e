"""Rank search: the best mixture under a parameter budget. Nothing here yet."""
