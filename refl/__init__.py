"""The nouns of Reward Feedback Learning: models, rewards, prompts, randomness, logs. Verbs are scripts."""

import os

# Set before the libraries are imported: they are told what they should not say, and that all files are local.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
