"""Carriers of a simulation's messages: this process alone, or Flower's engine."""
