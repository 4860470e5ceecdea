"""DICOM files: which of them hold a picture, and from their stored values to 8-bit pictures."""
