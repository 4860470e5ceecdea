"""What privacy needs in every room: accounting, clipping, noise, audit statistics."""
