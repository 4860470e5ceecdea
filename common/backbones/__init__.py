"""Frozen pre-trained encoders. One file is one kind; see `Kind` for what it must provide.

A coordinator calls `pretrained` to load weights; a site receives them by digest and calls `from_blob`, which builds
the same architecture, loads strictly and verifies. Both end in a `Backbone`, frozen and in eval mode for ever.
"""
