"""DPO training: pair source, TRL trainer on Ray Train, checkpoints, policy versions.

Started as ``python -m trainer --job ID``; nothing imports it from another package.
"""
