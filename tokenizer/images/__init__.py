"""Where images come from, in every layout that is read, and how they are cropped."""
