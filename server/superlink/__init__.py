"""The coordinator's standing process: Flower's SuperLink behind two filtered listeners."""
