"""Side-by-side measurements: ours and the alternative in one process, in alternation, printed as ratios."""
