"""Prediction with a finished model: from files, tables or a site's own sources to a row for each record.

What it writes holds what the model says of records, and stays where the records are: nothing here is sent.
"""
