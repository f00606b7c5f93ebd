"""Engines behind Ray Serve: generators, reward scorers, batch runners and the trainer's launcher.

Classes here are plain, cheap to construct and started with ``start()``; :mod:`actors.deploy` alone
turns them into Serve deployments, and :mod:`actors.adapters` alone knows how to call those.
"""
