"""Reward models: their contract, weighted sums, ImageReward and the rewards on CLIP."""
