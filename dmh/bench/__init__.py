"""`dmh bench`: what dmh costs, as ratios to the least it could cost and to what a user would use instead."""
