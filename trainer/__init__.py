"""DPO training: pair source, TRL trainer on Ray Train, checkpoints, policy versions.

Started as ``python -m trainer --job ID``; nothing imports it from another package.
"""

import os

# TRL reports its use over huggingface_hub, which reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
