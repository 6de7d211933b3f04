"""The nouns of Reward Feedback Learning: models, rewards, prompts, randomness, logs. Verbs are scripts."""

import os

# Set before the libraries are imported: less output, and local files only.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The sizes of a rollout vary, which fragments GPU memory in segments of fixed size.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
