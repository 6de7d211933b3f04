"""Reward models: their contract, weighted sums, ImageReward."""
