"""Measurements that the README quotes. Each is one command and prints what it ran on."""
