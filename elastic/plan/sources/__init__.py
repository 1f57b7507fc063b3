"""Loaders of planner data published by others."""
