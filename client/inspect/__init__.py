"""First contact with a user's data: what is in a file or folder, and a first file of settings for it.

Nothing here sends anything or is used by a run. What is printed stays on the screen of the site's own staff.
"""
