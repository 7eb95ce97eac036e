"""Speed, each figure as a ratio to the best peer in the same run: `make bench`."""
